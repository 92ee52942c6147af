"""``edgepriv protect audit``: attack a protected model as others will, and print the document."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgepriv.cli.protect_data import InputForm, load_samples
from edgepriv.errors import ConfigError, RiskThresholdError

if TYPE_CHECKING:
    from edgepriv.selective_encryption.attack.audit import Opened
    from edgepriv.selective_encryption.attack.document import Subject
    from edgepriv.selective_encryption.calibrate import Samples


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--data", required=True, help="Data of the attackers and of the judge: a folder, a file or 'digits'.")
@click.option("--original", type=click.Path(path_type=Path), help="The model before protection, BatchNorm kept.")
@click.option("--limit", default=10_000, show_default=True, help="Training samples that attackers may draw from.")
@click.option("--test-limit", default=2000, show_default=True, help="Samples that everybody is judged on.")
@click.option("--seeds", default=2, show_default=True, help="Attacker seeds; the worst counts.")
@click.option("--labels", default="20,100", show_default=True, help="Label counts of the attackers.")
@click.option("--shares", default="0.01,0.1", show_default=True, help="The same as shares of the data.")
@click.option("--no-decoys", is_flag=True, help="Do not run the decoy detectors.")
@click.option("--no-opened", is_flag=True, help="Do not attack the levels from below as their holders could.")
@click.option("--no-startup", is_flag=True, help="Do not measure the start-up.")
@click.option("--max-gain", type=float, help="End with exit code 3 when an attacker gains more.")
@click.option("--threads", default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="Where the attackers train: cuda for large networks.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def audit(folder: Path, data: str, original: Path | None, as_json: bool, **flags: Any) -> None:
    """Attack the protected model in FOLDER (the owner's copy: it needs the secrets to know the truth)."""
    from edgepriv.selective_encryption.select import compute

    compute.use(flags["threads"], flags["device"])
    subject, paper, plain, masked = _subject(folder, original)
    form = InputForm.from_fields(paper.about.get("input", {}))
    train = load_samples(data, form, split="train", limit=flags["limit"])
    test = load_samples(data, form, split="test", limit=flags["test_limit"])
    if not flags["no_opened"]:
        subject = replace(subject, opened=_opened(folder, paper, plain, test, flags["threads"]))
    result = _document(folder, subject, paper, (plain, masked), train, test, flags)
    click.echo(json.dumps(result, indent=1) if as_json else text(result))
    limit = flags["max_gain"]
    if limit is not None and result["worst_gain"] > limit:
        raise RiskThresholdError(f"an attacker gains {result['worst_gain']:.3f}, more than {limit:g}")


def _subject(folder: Path, original: Path | None) -> tuple[Subject, Any, Any, Any]:
    from edgepriv.selective_encryption import bundle_files, carrier
    from edgepriv.selective_encryption.attack.document import Subject
    from edgepriv.selective_encryption.restore import open_carrier, open_with_key

    paper, _ = bundle_files.read_manifest(folder, [bundle_files.read_issuer(folder)])
    if paper.sealed:
        raise ConfigError("the carrier is sealed as a whole: nobody without a key has anything to attack")
    key = bundle_files.read_secrets(folder)["key"]
    plain = open_with_key(paper, key, len(paper.levels), bundle_files.read_stored(folder, paper))
    masked = open_carrier(paper, bundle_files.read_stored(folder, paper))
    models = [carrier.from_files(dict(zip(m.names, m.files, strict=True))) for m in (plain, masked)]
    layers = carrier.layers(models[0], dense=bool(paper.about.get("dense")))
    selected = carrier.differing_units(models[0], models[1], layers)
    chosen = sum(int(selected[x.name].sum()) * x.unit_size for x in layers)
    share = chosen / sum(x.parameters for x in layers)
    source = carrier.load(original) if original is not None else models[0]
    kind = str(paper.about.get("decoys", "mixture"))
    return Subject(source, layers, selected, kind, share), paper, plain, masked


def _opened(folder: Path, paper: Any, plain: Any, test: Samples, threads: int) -> list[Opened]:
    """Each level below the whole model as its holder has it."""
    from edgepriv.selective_encryption import bundle_files, calibrate, carrier, levels
    from edgepriv.selective_encryption.attack.audit import Opened
    from edgepriv.selective_encryption.restore import open_with_key

    top, found = bundle_files.read_secrets(folder)["key"], []
    whole = carrier.from_files(dict(zip(plain.names, plain.files, strict=True)))
    layers = carrier.layers(whole, dense=bool(paper.about.get("dense")))
    for item in paper.levels[:-1]:
        key = levels.key_at(top, paper.binding.model_id, len(paper.levels), item.level)
        opened = open_with_key(paper, key, item.level, bundle_files.read_stored(folder, paper, level=item.level))
        part = carrier.from_files(dict(zip(opened.names, opened.files, strict=True)))
        quality = calibrate.quality(opened, test, threads=threads)
        found.append(Opened(item.level, quality, carrier.differing_units(whole, part, layers)))
    return found


def _document(
    folder: Path, subject: Subject, paper: Any, opened: tuple[Any, Any], train: Samples, test: Samples, flags: Any
) -> dict[str, Any]:
    from edgepriv.selective_encryption import calibrate
    from edgepriv.selective_encryption.attack.detect import DETECTORS
    from edgepriv.selective_encryption.attack.document import document

    plain, masked = (calibrate.quality(model, test, threads=flags["threads"]) for model in opened)
    return document(
        subject,
        train,
        test,
        masked_quality=masked,
        plain_quality=plain,
        levels=[{"level": x.level, "target": x.target, "accuracy": x.accuracy} for x in paper.levels],
        startup_ratio=None if flags["no_startup"] else _startup(folder, paper, opened[0]),
        seeds=flags["seeds"],
        labels=_numbers(flags["labels"], int),
        shares=_numbers(flags["shares"], float),
        flip=test.x.shape[1] == 3,
        detectors=() if flags["no_decoys"] else DETECTORS,
        log=lambda line: click.echo(line, err=True),
    )


def _numbers(text: str, kind: Any) -> list[Any]:
    try:
        return [kind(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise ConfigError(f"{text!r} is not a list of numbers", hint="for example 20,100") from None


def _startup(folder: Path, paper: Any, plain: Any) -> float:
    """Time both starts on copies in a private temporary folder."""
    from edgepriv.keys import Identity
    from edgepriv.selective_encryption import bundle_files, manifest, startup
    from edgepriv.selective_encryption.protection import Bundle

    key = bundle_files.read_secrets(folder)["key"]
    stored = bundle_files.read_stored(folder, paper)
    files = {name: bytes(content) for name, content in stored.items()}
    issuer = Identity.new("owner", "timer")  # signs copies that only the timed processes read
    bundle = Bundle(files, manifest.encode_manifest(paper, issuer), key, paper)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        startup.prepare(place, bundle, issuer, dict(zip(plain.names, map(bytes, plain.files), strict=True)))
        return startup.ratio(place)


def text(result: dict[str, Any]) -> str:
    """The document for people."""
    from edgepriv.selective_encryption.attack.audit import opened_line
    from edgepriv.selective_encryption.attack.document import detection

    lines = [
        (
            f"share {result['share']:.2%}: plain {result['plain_accuracy']:.3f}, masked "
            f"{result['masked_accuracy']:.3f}, chance {result['chance']:.3f}"
        ),
        f"{'attacker':34}{'labels':>7}{'accuracy':>10}{'scratch':>9}{'all conv':>10}{'gain':>8}",
    ]
    lines += [
        f"{run['name']:34}{run['data']:>7}{run['accuracy']:>10.3f}{run['scratch']:>9.3f}"
        f"{run['all_conv']:>10.3f}{run['gain']:>+8.3f}"
        for run in result["attackers"]
    ]
    lines.append(f"worst gain with labels {result['worst_gain']:+.3f}, without {result['label_free_gain']:+.3f}")
    lines += [f"holder of {opened_line(row)}" for row in result["opened_levels"]]
    lines += [detection(row) for row in result["decoys"]]
    if result["startup_ratio"] is not None:
        lines.append(f"start-up with all levels: {result['startup_ratio']:.2f} x the plain file's CPU time")
    return "\n".join(lines)
