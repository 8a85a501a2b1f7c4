"""docs/laws.md names tests that exist, for every law and rule, and no attack goes unnamed."""

import re
from functools import cache
from pathlib import Path

import pytest

from tests.contracts.faults import FAULTS, faulty
from tests.contracts.faults import test_of as named_by

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "laws.md"
NAMED = re.compile(r"`([\w/.]+)::(\w+)`")
DEFINED = {".py": re.compile(r"^(?:async )?def (\w+)\(", re.M), ".sol": re.compile(r"^ +function (\w+)\(", re.M)}
LAWS = 10
# Rules that no fault in the contracts takes out, and who sees it when they are.
ELSEWHERE = {
    "a drawn token is one token": "tests/twin/test_mutants.py",
    "a request is judged by its own law": "tests/twin/test_game_sample.py",
    "workers serve only what they computed": "tests/worker/test_admission.py",
    "what is judged is what was checked": "tests/twin/test_malformed.py",
}


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


def test_every_fault_fits_the_contracts() -> None:
    for path in {fault.path for fault in FAULTS}:
        assert "0xFA017" in faulty(path)


def test_every_fault_names_a_test_that_exists() -> None:
    assert len({fault.what for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        path, name = named_by(fault)
        assert name in defined(path), fault.what
        assert bool(fault.law) <= name.startswith("invariant_"), fault.what


def test_every_law_and_every_rule_is_taken_out_once() -> None:
    """Its own test, or the law that a campaign asks for, is what a fault of `make faults` must be seen by."""
    seen = {"::".join(named_by(fault)) for fault in FAULTS}
    laws = {fault.law for fault in FAULTS}
    for number, _, tests in rows("Laws"):
        assert f"law {number}" in laws or {"::".join(each) for each in NAMED.findall(tests)} & seen, number
    left = [rule for rule, _, tests in rows("Rules") if not {"::".join(each) for each in NAMED.findall(tests)} & seen]
    assert set(left) == set(ELSEWHERE)
