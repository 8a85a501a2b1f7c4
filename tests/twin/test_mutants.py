"""The test of the tests: the vectors see a fault seeded in each op and format, in Python and Solidity."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from contracts.build import ROOT
from tests.twin.evm import Contract, Evm, compiled
from tests.twin.test_vectors import wrong
from tests.twin.vectors import FOLDERS, OPS, OTHERS, evm_answers, python_answers
from verifier.referee import codec, fixed, floats, ops, tree

# ---- Python: what to replace, and by what

Args = Sequence[Sequence[int]]


def _without_last(args: Args, a: int, b: int) -> int:
    x, y = args
    return sum(v * w for v, w in zip(x[:-1], y[:-1], strict=True))


def _truncated(args: Args, a: int, b: int) -> int:
    (x,), (y,) = args
    return fixed.cl(abs(x) // y * (1 if x >= 0 else -1)) if y > 0 else 0


def _inclusive_verdict(args: Args, a: int, b: int) -> int:
    """`>=` where the law says `>`: the same verdict with a distance that is one larger."""
    standard, served, (num, den, floor) = args
    if floats.INVALID in served:
        return ops.verdict(args, a, b)
    distance = sum((s - d) ** 2 for s, d in zip(served, standard, strict=True))
    return int(distance * den**2 >= num**2 * (sum(d * d for d in standard) + len(standard) * floor**2))


def _floored(x: int, s: int) -> int:
    return x >> s


def _self_paired(hashes: Sequence[bytes]) -> list[bytes]:
    """Pairs an unpaired last node with itself."""
    filled = [*hashes, hashes[-1]] if len(hashes) & 1 else list(hashes)
    return [tree.node(filled[i], filled[i + 1]) for i in range(0, len(filled), 2)]


def _rounded_decode(bits: int, dtype: floats.Dtype, fraction: int, limit: int) -> int:
    twice = _DECODE(bits, dtype, fraction + 1, limit)
    return twice if twice == floats.INVALID else fixed.rs(twice, 1)


_DECODE, _ROUND, _ENCODE = floats.decode, floats._round, codec.encode_vector


def _of_one_list(change: Callable[[Sequence[int]], int]) -> Callable[[Args, int, int], int]:
    return lambda args, a, b: change(args[0])


def _drawn(field: int, function: Callable[[Args, int, int], int]) -> Callable[[Args, int, int], int]:
    """An op that is handed a draw with one more in one field."""
    return lambda args, a, b: function([*args[:-1], [v + (i == field) for i, v in enumerate(args[-1])]], a, b)


def _inclusive_margin(args: Args, a: int, b: int) -> int:
    """`>=` where the law says `>`."""
    served, other, standing, (num, den, margin), draw = args
    return ops.choice([served, other, standing, [num, den, margin - 1], draw], a, b)


FUNCTIONS: dict[str, Callable[[Args, int, int], int]] = {
    "sumsq": _of_one_list(lambda x: sum(v * abs(v) for v in x)),
    "linear": _without_last,
    "max": _of_one_list(lambda x: max(map(abs, x))),
    "sum": _of_one_list(lambda x: sum(x[1:])),
    "wsum": _without_last,
    "div": _truncated,
    "verdict": _inclusive_verdict,
    "logit": _without_last,
    "compare": lambda args, a, b: int(args[0][1] - args[0][0] >= args[1][2]),
    "same": lambda args, a, b: int(list(args[0][1:]) != list(args[1][1:])),
    "rank": _drawn(7, ops.rank),
    "mass": _drawn(2, ops.mass),
    "standing": _drawn(1, ops.standing),
    "choice": _inclusive_margin,
}

NAMES: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "add": (ops, "valid", lambda value: value),
    "rsqrt": (ops, "isqrt", lambda x: fixed.isqrt(x) + 1),
    "norm": (ops, "rs", _floored),
    "rope": (ops, "sincos", lambda position, f: fixed.sincos(position, f)[::-1]),
    "score": (ops, "cl", lambda x: x),
    "exp": (ops, "exp2", lambda d: fixed.exp2(-abs(d))),
    "gated": (ops, "rs", _floored),
    "finish": (ops, "rs", _floored),
    "decode": (floats, "decode", _rounded_decode),
    "float_add": (floats, "_round", lambda magnitude, dtype: _ROUND(magnitude | 1, dtype)),
    "tree": (tree, "pair", _self_paired),
    "vector": (codec, "encode_vector", lambda values, wide: _ENCODE((-v for v in values), wide)),
}


def test_a_python_fault_is_seeded_for_every_folder() -> None:
    assert sorted([*FUNCTIONS, *NAMES]) == sorted(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_vectors_see_a_fault_in_python(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if folder in FUNCTIONS:
        monkeypatch.setitem(ops._FUNCTIONS, OPS[folder], FUNCTIONS[folder])
    else:
        monkeypatch.setattr(*NAMES[folder])
    try:
        survived = not wrong(folder, python_answers(folder))
    except (ValueError, ArithmeticError):
        survived = False
    assert not survived, f"the fault in {folder} went unseen"


# ---- Solidity: which text to replace, and by what. Faults of one batch touch disjoint folders: one compilation.

_OPS, _FLOATS, _TREE, _CODEC = (f"contracts/src/referee/{name}.sol" for name in ("Ops", "Floats", "Tree", "Codec"))
_SAMPLING = "contracts/src/referee/Sampling.sol"
_PRODUCTS = "if (op == Op.LINEAR || op == Op.WSUM || op == Op.LOGIT) return linear(args);"

IN_OPS: dict[str, tuple[str, str, str]] = {
    "add": (_OPS, "Floats.decodeServed(bits, b, 0)", "Floats.decodeServed(bits, b, Floats.INVALID)"),
    "sumsq": (_OPS, "return dot(args[0], args[0]);", "args[0][0] = 0; return dot(args[0], args[0]);"),
    "rsqrt": (_OPS, "(x > 0 ? uint256(x) : 0)", "uint256(x)"),
    "norm": (_OPS, "Fixed.rs(_only(args[0]) * _only(args[1]), 40)", "((_only(args[0]) * _only(args[1])) >> 40)"),
    "linear": (_OPS, _PRODUCTS, f"if (op == Op.LINEAR) return linear(args) >> 1; {_PRODUCTS}"),
    "rope": (_OPS, "Fixed.rs(x0 * c, 30) - Fixed.rs(x1 * s, 30)", "Fixed.rs(x0 * c - x1 * s, 30)"),
    "score": (_OPS, "Fixed.cl(Fixed.rs(dot(args[0], args[1]), 30))", "Fixed.rs(dot(args[0], args[1]), 30)"),
    "max": (_OPS, "if sgt(other, largest)", "if or(sgt(other, largest), sgt(sub(0, other), largest))"),
    "exp": (_OPS, "Fixed.exp2(_only(args[0]) - _only(args[1]))", "Fixed.exp2(_only(args[1]) - _only(args[0]))"),
    "sum": (_OPS, "let place := add(x, 32) } lt(place, end)", "let place := add(x, 64) } lt(place, end)"),
    "wsum": (
        _OPS,
        "Op op = named(number);\n        // The sums",
        "Op op = named(number); if (op == Op.WSUM) return sumsq(args);\n // ",
    ),
    "div": (_OPS, "Fixed.divFloor(x, y)", "x / y"),
    "gated": (
        _OPS,
        "Fixed.rs(Fixed.silu(_only(args[0])) * _only(args[1]), 30)",
        "((Fixed.silu(_only(args[0])) * _only(args[1])) >> 30)",
    ),
    "verdict": (_OPS, "> num * num * size", ">= num * num * size"),
    "logit": (_OPS, _PRODUCTS, f"if (op == Op.LOGIT) return Fixed.cl(linear(args)); {_PRODUCTS}"),
    "compare": (_OPS, "> args[1][2]", ">= args[1][2]"),
    "same": (_OPS, "let size := shl(5, mload(x))", "let size := shr(1, shl(5, mload(x)))"),
}

IN_SAMPLING: dict[str, tuple[str, str, str]] = {
    "rank": (_SAMPLING, "if (logits[i] >= edge && i != judged) ++count;", "if (logits[i] >= edge) ++count;"),
    "mass": (_SAMPLING, "a := add(a, xor(above_, own))", "a := add(a, 1)"),
    "standing": (_SAMPLING, "rank_ >= int256(draw.topK)", "rank_ > int256(draw.topK)"),
    "choice": (_SAMPLING, "lead > margin * int256(ONE)", "lead >= margin * int256(ONE)"),
}

SHARED: dict[str, tuple[str, str, str]] = {
    "decode": (_FLOATS, "beyond = bias + limit;", "beyond = bias + limit + 1;"),
    "finish": (_OPS, "? Fixed.cl(Fixed.rs(total, a))", "? Fixed.rs(total, a)"),
    "float_add": (_FLOATS, "(lost == half && kept & 1 == 1)", "lost == half"),
    "tree": (
        _TREE,
        "case 0 { mstore(write, mload(read)) }",
        "case 0 { mstore(left, mload(read)) mstore(add(left, 32), mload(read)) "
        "pop(staticcall(gas(), 2, preimage, 65, write, 32)) }",
    ),
    "vector": (_CODEC, "(value << 1) ^ (value >> 255)", "value << 1"),
}


def deployed(evm: Evm, faults: dict[str, tuple[str, str, str]]) -> dict[str, Contract]:
    """The contracts with all these faults in their text."""
    texts: dict[str, str] = {}
    for folder, (path, old, new) in faults.items():
        text = texts.get(path) or (ROOT / path).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{folder}: expected '{old}' once in {path}, got {text.count(old)}"
        texts[path] = text.replace(old, new)
    return {name: evm.deploy(code) for name, code in compiled(texts).items()}


@pytest.fixture(scope="module")
def mutants(evm: Evm) -> dict[str, dict[str, Contract]]:
    """The faulty contracts by the folder whose fault they hold."""
    return {
        folder: batch
        for faults in (IN_OPS | IN_SAMPLING, SHARED)
        for batch in [deployed(evm, faults)]
        for folder in faults
    }


def test_a_solidity_fault_is_seeded_for_every_folder() -> None:
    assert sorted(IN_OPS | IN_SAMPLING) == sorted(OPS)
    assert sorted(SHARED) == sorted(OTHERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_vectors_see_a_fault_in_solidity(folder: str, mutants: dict[str, dict[str, Contract]]) -> None:
    assert wrong(folder, evm_answers(folder, mutants[folder])), f"the fault in {folder} went unseen"
