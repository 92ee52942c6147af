"""The wire specification names every message, protects each of them, and states the constants of the code."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from edgepriv.wire import (  # noqa: F401 - they register their kinds
    enrolment,
    envelope,
    link,
    messages,
    output,
    reference,
    rounds,
    update,
)
from edgepriv.wire.message import KINDS

FOLDER = Path(envelope.__file__).parent
TEXT = (FOLDER / "README.md").read_text()


def rows(heading):
    """Cells of the first table after a heading, without its two head lines."""
    part = TEXT.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    table = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


PROTECTION = rows("Message x confidential to x authenticated by x replay protection")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_registered_message_has_its_row(kind):
    assert [row for row in PROTECTION if row[0].startswith(f"`{kind}`")], f"{kind} has no row"


def test_every_row_says_all_four_things():
    assert len(PROTECTION) > len(KINDS)
    for row in PROTECTION:
        assert len(row) == 4
        assert all(len(cell) > 2 for cell in row), row


def test_no_row_is_about_a_message_that_does_not_exist():
    named = {m[1] for row in PROTECTION if (m := re.match(r"`([a-z-]+)`", row[0]))}
    assert named <= KINDS.keys()


@pytest.mark.parametrize(("what", "constant", "value"), rows("Limits"))
def test_the_limits_are_those_of_the_code(what, constant, value):
    module, name = constant.strip("`").split(".")
    assert getattr(importlib.import_module(f"edgepriv.wire.{module}"), name) == int(value), what


def offsets(heading, number=0):
    part = TEXT.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    tables = re.split(r"\n\n", part)
    table = [t for t in tables if t.startswith("| offset")][number]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.mark.parametrize(
    ("table", "fixed"),
    [
        (offsets("The sealed link"), link.HEADER.size),
        (offsets("The sealed link", 1), messages._CHUNK.size),
        (offsets("Envelope of a frame"), envelope.BODY_OFFSET),
        (offsets("Updates and weights"), 8),
    ],
)
def test_fields_follow_each_other_without_gaps(table, fixed):
    at = 0
    for offset, size, _ in table:
        if not offset.isdigit() or not size.isdigit():
            assert int(offset.split(" ")[0]) == fixed if offset.isdigit() else True
            break
        assert int(offset) == at
        at += int(size)
    assert at == fixed


def test_magics_are_those_of_the_code():
    for magic in (link.MAGIC, envelope.MAGIC, update.MAGIC):
        assert f"`{magic.decode()}`" in TEXT


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (FOLDER / target).exists(), target
    modules = {path.name for path in FOLDER.glob("*.py")} - {"__init__.py"}
    assert {name for name in modules if f"({name})" not in TEXT} == set()
