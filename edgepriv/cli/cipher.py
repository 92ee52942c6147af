"""``edgepriv cipher``: what the image cipher costs and how it measures."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import click

from edgepriv.cli import LazyGroup
from edgepriv.errors import ConfigError, MissingDependencyError, MissingFileError


@click.group(cls=LazyGroup)
def cipher() -> None:
    """Measure the image cipher. Metrics can show that a cipher is bad, never that it is good."""


@cipher.command("bench")
@click.option(
    "--size", "sizes", multiple=True, type=click.Choice(["VGA", "1080p", "4K"]), help="Repeatable; default all."
)
@click.option("--alg", type=click.Choice(["aes-256-gcm", "chacha20-poly1305"]), help="Default: what the CPU does best.")
@click.option("--rounds", default=0, type=click.IntRange(0, 1000), help="Rounds of measurement; 0 takes 20, 15 and 4.")
@click.option("--json", "as_json", is_flag=True)
def bench(sizes: tuple[str, ...], alg: Any, rounds: int, as_json: bool) -> None:
    """Time sealing and opening against the AEAD alone, in one run."""
    from edgepriv.cipher import bench as stand

    document = stand.run(list(sizes or stand.SIZES), alg=alg, rounds=rounds)
    click.echo(json.dumps(document) if as_json else _bench_text(document))


@cipher.command("report")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--profile", default="flep3", show_default=True, type=click.Choice(["flep3", "flep3-strong", "aead"]))
@click.option("--alg", type=click.Choice(["aes-256-gcm", "chacha20-poly1305"]), help="Default: what the CPU does best.")
@click.option("--cipher", "other", metavar="MODULE:NAME", help="Measure another cipher: a class with encrypt().")
@click.option("--pairs", default=200, show_default=True, help="Pairs of pictures for each column; at least 200.")
@click.option("--seed", type=click.IntRange(min=0), help="Repeatable keys and ids, for comparing runs.")
@click.option("--full", is_flag=True, help="Show every test, not only a line for each column.")
@click.option(
    "--html", "page", type=click.Path(path_type=Path, dir_okay=False), help="Also write a page with pictures."
)
@click.option("--json", "as_json", is_flag=True)
def report(
    images: tuple[Path, ...],
    profile: str,
    alg: Any,
    other: str | None,
    pairs: int,
    seed: int | None,
    full: bool,
    page: Path | None,
    as_json: bool,
) -> None:
    """Measure the cipher on IMAGES (files, or ``skimage:camera`` and the like, or ``black:HxWxC``).

    Columns: fresh (key freshness: every message has its own id), pinned (plaintext sensitivity: one id for a pair,
    judged for flep3-strong) and key (key sensitivity); for the whole cipher and for layers 1 and 2 alone. Ends with
    exit code 1 when a picture fails.
    """
    from edgepriv.cipher import report as stand
    from edgepriv.cli.seal import check_out, write_out
    from edgepriv.primitives import cpu

    if page:
        check_out(page)
    stand.check_pairs(pairs)
    subjects = _other(other) if other else stand.subjects_of(profile, alg or cpu.choose_alg())
    random = stand.seeded(seed)
    pictures = {str(path): _load(path) for path in images}
    for path, picture in pictures.items():
        if note := stand.bytes_of(path, picture)[1]:
            click.echo(f"{path}: {note}", err=True)
    reports = []
    for path, picture in pictures.items():
        click.echo(f"measuring {path}", err=True)
        reports.append(stand.measure(path, picture, subjects, pairs=pairs, random=random))
    document = stand.document(reports, cipher=other or profile, pairs=pairs)
    if page:
        from edgepriv.cipher.report_page import page as render

        write_out(page, render(document, reports).encode())
    click.echo(json.dumps(document) if as_json else _report_text(document, full=full))
    if any(entry["verdict"] == "fail" for entry in document["images"]):
        sys.exit(1)


def _other(name: str) -> dict[str, Any]:
    """Load a cipher by MODULE:NAME; its pinned column is printed, as for our stream profiles."""
    import importlib

    from edgepriv.cipher.report import Foreign

    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    hint = "MODULE:NAME of a class with encrypt(image, key, mid), made without arguments"
    try:
        found = getattr(importlib.import_module(module), attribute)
        cipher = found() if isinstance(found, type) else found
    except Exception as error:  # foreign code: whatever it raises, to the user the cipher cannot be had
        raise ConfigError(f"no cipher at {name}: {type(error).__name__}: {error}", hint=hint) from error
    return {"whole": (Foreign(cipher, name), False)}


def _load(path: Path) -> Any:
    import numpy as np

    from edgepriv.cli.seal import decode_pixels

    kind, _, name = str(path).partition(":")
    if kind == "black":
        try:
            return np.zeros([int(side) for side in name.split("x")], np.uint8)
        except (ValueError, MemoryError):
            raise ConfigError(f"{path} is not black:HEIGHTxWIDTH[xCHANNELS]") from None
    if kind == "skimage":
        try:
            from skimage import data
        except ImportError as error:
            raise MissingDependencyError("skimage: pictures need scikit-image", hint="edgepriv[demo] has it") from error
        if name not in {"camera", "astronaut", "coffee", "cat", "rocket"}:
            raise ConfigError(f"no picture {name!r}", hint="camera, astronaut, coffee, cat or rocket")
        return getattr(data, name)()
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise MissingFileError(f"cannot read {path}: {error.strerror}") from None
    return decode_pixels(raw, path, otherwise="convert it to 8-bit PNG")


def _report_text(document: dict[str, Any], *, full: bool) -> str:
    lines = [
        f"cipher {document['cipher']}, {document['pairs']} pairs, a test fails below p = {document['threshold_p']:.1e}"
    ]
    for entry in document["images"]:
        alone = f" (layers 1 and 2 alone: {entry['layers_verdict']})" if entry["layers_verdict"] else ""
        lines.append(f"{entry['path']}: {entry['verdict']}{alone}")
        lines += _critical_text(entry, full=full)
        tests = entry["metrics"]
        if full:
            lines += [_test_text(test) for test in tests]
            continue
        columns = dict.fromkeys((test["subject"], test["column"]) for test in tests)
        lines += [
            _column_text(subject, column, [t for t in tests if (t["subject"], t["column"]) == (subject, column)])
            for subject, column in columns
        ]
    return "\n".join(lines)


def _critical_text(entry: dict[str, Any], *, full: bool) -> list[str]:
    """Critical values for the picture's size: NPCR and UACI, or all of them."""
    from edgepriv.cipher.report_page import critical_text

    levels = entry["critical"]
    names = list(next(iter(levels.values()))) if full else ["npcr", "uaci"]
    lines = [f"  critical values for {math.prod(entry['shape']):,} bytes:"] if full else []
    for name in names:
        cells = "   ".join(f"{float(alpha) * 100:g} %: {critical_text(row[name])}" for alpha, row in levels.items())
        lines.append(f"  critical {name.replace('_', ' '):14} {cells}")
    return lines


def _column_text(subject: str, column: str, tests: list[dict[str, Any]]) -> str:
    """One line for a subject and column: what is judged, the lowest p-value, the means of NPCR and UACI."""
    means = {test["test"]: test["mean"] for test in tests}
    failed = [test["test"] for test in tests if test["judged"] and not test["pass"]]
    judged = [test for test in tests if test["judged"]]
    verdict = f"FAIL {', '.join(failed)}" if failed else "pass" if judged else "printed, not judged"
    lowest = f", {len(judged)} tests, lowest p {min(test['p'] for test in judged):.2g}" if judged else ""
    name = f"{column} ({tests[0]['label']})"
    return f"  {subject:6} {name:31} NPCR {means['npcr']:9.5f}  UACI {means['uaci']:9.5f}  {verdict}{lowest}"


def _test_text(test: dict[str, Any]) -> str:
    low, high = test["interval_05"]
    mark = ("pass" if test["pass"] else "FAIL") if test["judged"] else "printed"
    return (
        f"  {test['subject']:6} {test['column']:6} {test['label']:21} {test['test']:14} {test['mean']:11.5f}"
        f"  [{low:.5f}, {high:.5f}]  outside {test['outside_05']:3}/{test['of']}  p {test['p']:8.2g}  {mark}"
    )


def _bench_text(document: dict[str, Any]) -> str:
    lines = [f"backend {document['backend']}, {document['alg']}, CPU: {', '.join(document['cpu']) or 'no AES'}"]
    for frame in document["frames"]:
        lines.append(
            f"{frame['name']}: AEAD alone {frame['aead_ms']:.3f} ms, copy {frame['copy_ms']:.3f} ms, "
            f"MAC {frame['mac_ms']:.3f} ms, signature {frame['signature_ms']:.3f} ms, "
            f"extra memory {frame['peak_extra_frames']:.2f} frames"
        )
        for name, row in frame["profiles"].items():
            lines.append(
                f"  {name:12} seal {row['seal_ms']:8.3f} ms = {row['seal_ratio']:.2f}x"
                f"  with MAC {row['seal_mac_ms']:8.3f} ms = {row['seal_mac_ratio']:.2f}x"
                f"  open {row['open_ms']:8.3f} ms = {row['open_ratio']:.2f}x"
            )
        parts = "  ".join(f"{key} {ms:.3f}" for key, ms in frame["layer_ms"].items())
        lines.append(f"  parts (ms)   {parts}")
    lines += [f"{key}: {text}" for key, text in document["includes"].items()]
    return "\n".join(lines)
