"""What the documents say is true: commands exist, links lead somewhere, examples run, example files are read."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "deploy" / "examples"
DOCUMENTS = sorted(
    p
    for p in [
        *ROOT.glob("*.md"),
        *ROOT.glob("deploy/**/*.md"),
        *ROOT.glob("edgepriv/**/*.md"),
        *ROOT.glob("gateway/**/*.md"),
    ]
)


def blocks(text: str) -> list[str]:
    return re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Lines of shell blocks that call one of the console commands, with continued lines joined."""
    found = []
    for block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words and words[0] in {"edgepriv", "edgepriv-gateway", "edgepriv-sim"}:
                found.append(words)
    return found


def tree(name: str) -> click.Command:
    if name == "edgepriv":
        from edgepriv.cli import root
    elif name == "edgepriv-gateway":
        from gateway.cli import root
    else:
        from firmware_sim.cli import root
    return root


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_of_a_document_exists_with_its_options(document: Path) -> None:
    for words in commands(document.read_text(encoding="utf-8")):
        command, rest = tree(words[0]), words[1:]
        while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
            inner = command.get_command(click.Context(command), rest[0])
            if inner is None and command.params and any(isinstance(p, click.Argument) for p in command.params):
                break
            assert inner is not None, f"{document.name}: {' '.join(words)}: no command {rest[0]!r}"
            command, rest = inner, rest[1:]
        known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
        if isinstance(command, click.Group):
            continue
        for word in rest:
            if word.startswith("--"):
                assert word.split("=")[0] in known, f"{document.name}: {' '.join(words)}: no option {word}"


def helps(command: click.Command, path: str) -> Iterator[tuple[str, str]]:
    """Every group of commands with its help at the width of a terminal."""
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=path, terminal_width=80)
        yield path, command.get_help(context)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None, name
            yield from helps(inner, f"{path} {name}")


@pytest.mark.parametrize("name", ["edgepriv", "edgepriv-gateway", "edgepriv-sim"])
def test_no_list_of_commands_cuts_its_sentences_off(name: str) -> None:
    for path, text in helps(tree(name), name):
        assert not [line for line in text.partition("Commands:")[2].splitlines() if line.endswith("...")], path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_local_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), (
            f"{document.relative_to(ROOT)} links to {target}, which is not there"
        )


@pytest.mark.parametrize("name", ["seal_and_open", "release_policies", "own_camera"])
def test_an_example_runs(name: str) -> None:
    done = subprocess.run([sys.executable, str(EXAMPLES / f"{name}.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_audit_example_judges_a_model(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
    from edgepriv.risk.reconstruction.networks import classifier
    from edgepriv.risk.reconstruction.onnx_writer import write_onnx

    write_onnx(classifier("linear", (8, 8, 1), 10), (8, 8, 1), 10, tmp_path / "m.onnx")
    command = [sys.executable, str(EXAMPLES / "audit_model.py"), str(tmp_path / "m.onnx"), "digits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "argmax: 3.3 bits" in done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_examples_are_short(path: Path) -> None:
    assert path.read_text().count("\n") <= 30


def test_the_example_configurations_are_read() -> None:
    from edgepriv.device.config import load_config as device
    from edgepriv.risk.config import load_config as risk
    from gateway.config import load as gateway

    assert device(EXAMPLES / "device.toml").release.policy == "argmax"
    assert risk(EXAMPLES / "risk.toml").audit.references == 5
    assert gateway(EXAMPLES / "gateway.toml").models.require_verdict


def test_the_public_names_are_all_there() -> None:
    import edgepriv

    assert all(getattr(edgepriv, name) is not None for name in edgepriv.__all__)
    with pytest.raises(AttributeError, match="no public name"):
        _ = edgepriv.no_such_name
