"""The shared vectors, and what each referee answers to them."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from contracts.build import ROOT
from tests.twin.evm import Answer, Contract, Refusal
from verifier.referee import codec, floats, ops, tree
from verifier.referee.errors import RefereeError

VECTORS = ROOT / "tests" / "vectors"
OPS = {op.name.lower(): op for op in ops.Op}
OTHERS = ("decode", "finish", "float_add", "tree", "vector")
FOLDERS = (*OPS, *OTHERS)

Case = dict[str, Any]


def load(folder: str) -> list[Case]:
    """The hand-made cases of a folder, then the generated ones."""
    out: list[Case] = []
    for name in ("hand", "generated"):
        cases = json.loads((VECTORS / folder / f"{name}.json").read_text(encoding="utf-8"))
        assert cases, f"expected cases in {folder}/{name}.json"
        out += cases
    return out


def expected(case: Case) -> Answer:
    """What both referees must answer: a number, bytes in hex, or a Refusal."""
    if "error" in case:
        return Refusal(case["error"])
    output: str = case["output"]
    return output if "hashes" in case or "values" in case else int(output)


def python_answers(folder: str) -> list[Answer]:
    return [_refusing(_python(folder), case) for case in load(folder)]


def evm_answers(folder: str, contracts: Mapping[str, Contract]) -> list[Answer]:
    cases, referee, harness = load(folder), contracts["Referee"], contracts["Harness"]
    if folder in OPS:
        return referee.calls("run", [(OPS[folder], *_run(case)) for case in cases])
    if folder == "finish":
        return referee.calls("finish", [_numbers(case, "op", "total", "a") for case in cases])
    if folder == "tree":
        return [_hex(answer) for answer in harness.calls("rootOfRange", [_range(case) for case in cases])]
    if folder == "vector":
        return [_vector(harness, case) for case in cases]
    if folder == "decode":
        shapes = [_numbers(case, "bits", "dtype", "fraction", "limit") for case in cases]
        return [answer[0] for answer in harness.calls("decode", [([bits], *rest) for bits, *rest in shapes])]
    assert folder == "float_add", f"expected one of {FOLDERS}, got {folder}"
    sums = [_numbers(case, "dtype", "x", "y") for case in cases]
    return [answer[0] for answer in harness.calls("add", [(dtype, [x], [y]) for dtype, x, y in sums])]


def _python(folder: str) -> Callable[[Case], Answer]:
    # Looked up at each call, so that a mutant is seen.
    if folder in OPS:
        return lambda case: ops.run(OPS[folder], *_run(case))
    return {
        "finish": lambda case: ops.finish(*_numbers(case, "op", "total", "a")),
        "tree": lambda case: tree.root_of_range(*_range(case)).hex(),
        "vector": lambda case: codec.encode_vector(map(int, case["values"]), case["wide"]).hex(),
        "decode": lambda case: _decode(*_numbers(case, "bits", "dtype", "fraction", "limit")),
        "float_add": lambda case: floats.add(floats.Dtype(int(case["dtype"])), *_numbers(case, "x", "y")),
    }[folder]


def _refusing(function: Callable[[Case], Answer], case: Case) -> Answer:
    try:
        return function(case)
    except RefereeError as error:
        return Refusal(type(error).__name__)


def _decode(bits: int, dtype: int, fraction: int, limit: int) -> int:
    return floats.decode(bits, floats.Dtype(dtype), fraction, limit)


def _vector(harness: Contract, case: Case) -> Answer:
    """The EVM's bytes, once it reads its own bytes back."""
    values, wide = [int(v) for v in case["values"]], case["wide"]
    data = b"".join(harness.calls("encodeValue", [(v, wide) for v in values]))
    back = harness.call("decodeValues", data, 0, len(values), wide)
    return data.hex() if list(back) == values else f"read back as {back}"


def _run(case: Case) -> tuple[list[list[int]], int, int]:
    return [[int(v) for v in values] for values in case["args"]], int(case["a"]), int(case["b"])


def _numbers(case: Case, *names: str) -> list[int]:
    return [int(case[name]) for name in names]


def _range(case: Case) -> tuple[list[bytes], int, int, list[bytes]]:
    hashes, siblings = ([bytes.fromhex(each) for each in case[name]] for name in ("hashes", "siblings"))
    return hashes, int(case["first"]), int(case["count"]), siblings


def _hex(answer: Answer) -> Answer:
    return answer if isinstance(answer, Refusal) else answer.hex()
