"""The shared vectors against both referees: values and error names."""

import pytest

from tests.twin.evm import Answer, Contract
from tests.twin.vectors import FOLDERS, VECTORS, evm_answers, expected, load, python_answers

HAND_MADE = 3
# A twin's own vectors prove sameness, not truth: so many of each folder come from elsewhere.


def wrong(folder: str, answers: list[Answer]) -> list[str]:
    """The cases with another answer than their own."""
    cases = load(folder)
    return [
        f"{folder} '{case['name']}': expected {expected(case)}, got {answer}"
        for case, answer in zip(cases, answers, strict=True)
        if answer != expected(case)
    ]


def test_every_folder_is_read() -> None:
    assert {path.name for path in VECTORS.iterdir() if path.is_dir()} == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_python(folder: str) -> None:
    assert wrong(folder, python_answers(folder)) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_evm(folder: str, contracts: dict[str, Contract]) -> None:
    assert wrong(folder, evm_answers(folder, contracts)) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_some_cases_come_from_outside_the_twin(folder: str) -> None:
    assert sum("why" in case for case in load(folder)) >= HAND_MADE
