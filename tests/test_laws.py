"""docs/laws.md names tests that exist, for every law and rule, and no attack goes unnamed."""

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "laws.md"
NAMED = re.compile(r"`([\w/.]+)::(\w+)`")
DEFINED = {".py": re.compile(r"^(?:async )?def (\w+)\(", re.M), ".sol": re.compile(r"^ +function (\w+)\(", re.M)}
LAWS = 10


def rows(heading: str) -> list[list[str]]:
    """The cells of the table beneath a heading, without its first two lines."""
    section = DOCUMENT.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


@cache
def defined(path: str) -> frozenset[str]:
    file = ROOT / path
    return frozenset(DEFINED[file.suffix].findall(file.read_text(encoding="utf-8"))) if file.is_file() else frozenset()


def test_every_law_has_its_row() -> None:
    assert [row[0] for row in rows("Laws")] == [str(number) for number in range(1, LAWS + 1)]


@pytest.mark.parametrize("heading", ["Laws", "Rules"])
def test_every_row_names_tests_that_exist(heading: str) -> None:
    for first, second, tests in rows(heading):
        named = NAMED.findall(tests)
        assert named, f"{first} {second}: no test"
        assert NAMED.sub("", tests).strip() == "", f"{first} {second}: expected nothing but tests, got {tests}"
        assert [f"{path}::{name}" for path, name in named if name not in defined(path)] == []


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/[\w/.]+)`", DOCUMENT.read_text(encoding="utf-8"))
    assert named and [path for path in named if not (ROOT / path).exists()] == []


def test_every_attack_and_every_law_of_a_campaign_is_named() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    folder = ROOT / "tests" / "contracts"
    files = [*sorted((folder / "attacks").glob("*.t.sol")), *sorted((folder / "invariants").glob("*.t.sol"))]
    assert files
    for file in files:
        path = file.relative_to(ROOT).as_posix()
        played = {name for name in defined(path) if re.match(r"test(Fuzz)?_|law\d+_", name)}
        assert [name for name in sorted(played) if f"`{path}::{name}`" not in text] == []


def test_every_law_of_a_campaign_is_asked_for() -> None:
    """A law is a function of its own and counts only if the invariant calls it."""
    text = (ROOT / "tests/contracts/invariants/GameInvariants.t.sol").read_text(encoding="utf-8")
    for name in re.findall(r"function (law\d+_\w+)\(", text):
        assert len(re.findall(rf"\b{name}\(\);", text)) >= 1, name
