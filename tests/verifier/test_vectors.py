"""tests/vectors against the Python twin, and fill.py against the generated files."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from verifier.referee.codec import decode_vector, encode_vector
from verifier.referee.errors import RefereeError
from verifier.referee.floats import Dtype, add, decode
from verifier.referee.ops import Op, finish, run
from verifier.referee.tree import root_of_range

TESTS = Path(__file__).resolve().parents[1]
VECTORS = TESTS / "vectors"
FOLDERS = sorted({op.name.lower() for op in Op} | {"finish", "decode", "float_add", "tree", "vector"})

Case = dict[str, Any]


def cases(folder: str, file: str) -> list[Case]:
    out: list[Case] = json.loads((VECTORS / folder / file).read_text())
    return out


def answer(folder: str, case: Case) -> str:
    """What the twin makes of a case, as its "output" is written. Raises a RefereeError."""
    match folder:
        case "finish":
            return str(finish(int(case["op"]), int(case["total"]), int(case["a"])))
        case "decode":
            bits, dtype, fraction, limit = (int(case[key]) for key in ("bits", "dtype", "fraction", "limit"))
            return str(decode(bits, Dtype(dtype), fraction, limit))
        case "float_add":
            return str(add(Dtype(int(case["dtype"])), int(case["x"]), int(case["y"])))
        case "tree":
            hashes, siblings = ([bytes.fromhex(x) for x in case[key]] for key in ("hashes", "siblings"))
            return root_of_range(hashes, int(case["first"]), int(case["count"]), siblings).hex()
        case "vector":
            values = [int(x) for x in case["values"]]
            assert decode_vector(bytes.fromhex(case["output"]), case["wide"]) == values
            return encode_vector(values, case["wide"]).hex()
    args = [[int(x) for x in values] for values in case["args"]]
    return str(run(Op[folder.upper()], args, int(case["a"]), int(case["b"])))


@pytest.mark.parametrize("file", ["hand.json", "generated.json"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_the_twin_gives_what_the_vectors_say(folder: str, file: str) -> None:
    for case in cases(folder, file):
        try:
            got = {"output": answer(folder, case)}
        except RefereeError as error:
            got = {"error": type(error).__name__}
        assert got == {key: case[key] for key in ("output", "error") if key in case}, case["name"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_cases_are_named_once_and_hand_made_ones_say_why(folder: str) -> None:
    hand, generated = cases(folder, "hand.json"), cases(folder, "generated.json")
    assert len(hand) >= 3 and all(case["why"] for case in hand)
    assert len(generated) >= 20
    for group in (hand, generated):
        assert len({case["name"] for case in group}) == len(group)


def test_no_folder_is_unread() -> None:
    assert sorted(path.name for path in VECTORS.iterdir()) == FOLDERS


def test_filling_again_changes_nothing() -> None:
    spec = importlib.util.spec_from_file_location("fill", TESTS / "twin" / "fill.py")
    assert spec is not None and spec.loader is not None
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    made: dict[str, str] = fill.generated()
    assert sorted(made) == FOLDERS
    for folder, text in made.items():
        assert (VECTORS / folder / "generated.json").read_text() == text, folder
