"""Fills tests/vectors/*/generated.json from the Python twin: `python tests/twin/fill.py`.

Deterministic: the same bytes on every machine. The hand-made cases in hand.json beside them are never touched: vectors
from a twin prove sameness, those prove truth.

Rationale: long, because it is a list: a function an op.
"""

import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, the project's is not

from verifier.referee import sampling  # noqa: E402
from verifier.referee.codec import encode_vector  # noqa: E402
from verifier.referee.errors import RefereeError  # noqa: E402
from verifier.referee.fixed import LOG2E, isqrt  # noqa: E402
from verifier.referee.floats import INVALID, Dtype, add, decode  # noqa: E402
from verifier.referee.ops import Op, finish, run  # noqa: E402
from verifier.referee.tree import Tree, leaf, root_of_range  # noqa: E402

VECTORS = ROOT / "tests" / "vectors"
Case = dict[str, Any]
Lists = list[list[int]]

ACTIVATION = 1 << 50
WEIGHT = 1 << 32  # 2^(8 + G), G = 24
RANDOM_CASES = 16


class Draw:
    """Seeded draws that favour the edges."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)

    def near(self, edge: int) -> int:
        """A value of any magnitude up to +-edge, often small, zero or the edge itself."""
        kind = self.random.randrange(8)
        if kind == 0:
            return self.random.choice([0, 1, -1, edge, -edge, edge - 1, 1 - edge])
        return self.random.choice([-1, 1]) * self.random.randrange(1 << self.random.randint(1, edge.bit_length() - 1))

    def upto(self, edge: int) -> int:
        return abs(self.near(edge))

    def many(self, edge: int, n: int) -> list[int]:
        return [self.near(edge) for _ in range(n)]

    def length(self) -> int:
        return self.random.choice([1, 2, 3, 7, 16])

    def bits(self, dtype: Dtype) -> int:
        """Any float; now and then a zero, a subnormal, the largest, an infinity or a NaN."""
        edge = [0, 1, (1 << dtype.mantissa_bits) - 1, dtype.infinity - 1, dtype.infinity, dtype.nan]
        if self.random.randrange(4) == 0:
            return self.random.choice(edge) | self.random.choice([0, dtype.sign])
        # Around one, so that sums round and cancel.
        exponent = dtype.bias + self.random.randint(-12, 12)
        mantissa = self.random.randrange(1 << dtype.mantissa_bits)
        return exponent << dtype.mantissa_bits | mantissa | self.random.choice([0, dtype.sign])


def dot(d: Draw, x: int, y: int, longest: int) -> list[tuple[str, Lists]]:
    """Edge cases and random ones of a sum of products within +-x and +-y."""
    out: list[tuple[str, Lists]] = [
        ("full chunk at the bound", [[x] * longest, [y] * longest]),
        ("full chunk at the negative bound", [[-x] * longest, [y] * longest]),
        ("cancels", [[x, -x], [y, y]]),
        ("zeros", [[0] * 4, [y] * 4]),
    ]
    for i in range(RANDOM_CASES):
        n = d.length()
        out.append((f"random {i}", [d.many(x, n), d.many(y, n)]))
    return out


def cases_add(d: Draw) -> list[tuple[str, Lists, int, int]]:
    out = []
    for dtype in Dtype:
        out += [(f"{dtype.name.lower()} {i}", [[d.bits(dtype)], [d.bits(dtype)]], 0, int(dtype)) for i in range(10)]
    return out


def cases_sumsq(d: Draw) -> list[tuple[str, Lists, int, int]]:
    edge = [("bound", [[-ACTIVATION] * 256], 0, 0), ("zero", [[0]], 0, 0)]
    return edge + [(f"random {i}", [d.many(ACTIVATION, d.length())], 0, 0) for i in range(RANDOM_CASES + 4)]


def cases_rsqrt(d: Draw) -> list[tuple[str, Lists, int, int]]:
    eps = 11529215046068  # 1e-5
    out = [
        ("no sum", [[0]], eps, 4096),
        ("widest argument", [[0]], 1, (1 << 32) - 1),
        ("largest sum", [[(1 << 100) * 8192]], eps, 8192),
        ("a negative sum counts as zero", [[-1]], eps, 4096),
        ("divides by zero", [[0]], 0, 4096),
        ("no terms", [[0]], eps, 0),
    ]
    return out + [(f"random {i}", [[d.upto(1 << 112)]], eps, 1 << i) for i in range(RANDOM_CASES)]


def cases_norm(d: Draw) -> list[tuple[str, Lists, int, int]]:
    out = [
        ("saturates", [[ACTIVATION], [1 << 58], [WEIGHT]], 24, 0),
        ("saturates below", [[-ACTIVATION], [1 << 58], [WEIGHT]], 24, 0),
        ("tie below zero, inner", [[-1], [1 << 39], [1 << 24]], 24, 0),
        ("tie below zero, outer", [[-1], [1 << 40], [1 << 23]], 24, 0),
        ("tie above zero, outer", [[1], [1 << 40], [1 << 23]], 24, 0),
        ("float32 gain", [[ACTIVATION], [1 << 58], [1 << 40]], 32, 0),
    ]
    for i in range(RANDOM_CASES + 4):
        out.append((f"random {i}", [[d.near(ACTIVATION)], [d.upto(1 << 45)], [d.near(WEIGHT)]], 24, 0))
    return out


def cases_linear(d: Draw) -> list[tuple[str, Lists, int, int]]:
    out = [(name, args, 24, 0) for name, args in dot(d, ACTIVATION, WEIGHT, 256)]
    return [
        *out,
        ("float32 weights", [[ACTIVATION] * 256, [-(1 << 40)] * 256], 32, 0),
        ("unequal", [[1, 2], [3]], 24, 0),
    ]


def cases_rope(d: Draw) -> list[tuple[str, Lists, int, int]]:
    out = []
    for half in (0, 1):
        out.append((f"bound, half {half}", [[ACTIVATION, -ACTIVATION], [(1 << 64) - 1]], 131071, half))
        for quarter in range(4):
            f = quarter << 62 | d.random.randrange(1 << 62)
            out.append((f"quarter {quarter}, half {half}", [d.many(ACTIVATION, 2), [f]], 1, half))
        for i in range(8):
            f = d.random.randrange(1 << 64)
            out.append((f"random {i}, half {half}", [d.many(1 << 40, 2), [f]], d.random.randrange(1 << 17), half))
    return out


def cases_score(d: Draw) -> list[tuple[str, Lists, int, int]]:
    out: list[tuple[str, Lists, int, int]] = []
    for name, args in dot(d, ACTIVATION, ACTIVATION, 256):
        out.append((name, args, isqrt(LOG2E**2 // len(args[0])), 4))
    for i in range(6):
        out.append((f"head of 64, {i}", [d.many(1 << 33, 64), d.many(1 << 33, 64)], isqrt(LOG2E**2 // 64), 1))
    return out


def cases_max(d: Draw) -> list[tuple[str, Lists, int, int]]:
    edge: list[tuple[str, Lists, int, int]] = [
        ("nothing", [[]], 0, 0),
        ("all at the lower bound", [[-(1 << 51)] * 256], 0, 0),
        ("last", [[-2, -2, -1]], 0, 0),
    ]
    return edge + [(f"random {i}", [d.many(1 << 51, d.length())], 0, 0) for i in range(RANDOM_CASES + 2)]


def cases_exp(d: Draw) -> list[tuple[str, Lists, int, int]]:
    shifts = [0, 1, (1 << 30) - 1, 1 << 30, (1 << 30) + 1, 39 << 30, 40 << 30, 41 << 30, (63 << 30) - 1, 63 << 30]
    shifts += [64 << 30, 65 << 30, 1 << 51, -1, -(1 << 51)]
    out = [(f"{-x} below", [[-x], [0]], 0, 0) for x in shifts]
    for i in range(RANDOM_CASES):
        y = d.near(1 << 50)
        out.append((f"random {i}", [[y - d.upto(1 << 35)], [y]], 0, 0))
    return out


def cases_sum(d: Draw) -> list[tuple[str, Lists, int, int]]:
    edge = [("bound", [[1 << 40] * 256], 0, 0), ("zeros", [[0] * 3], 0, 0), ("cancels", [[7, -7]], 0, 0)]
    return edge + [(f"random {i}", [d.many(1 << 40, d.length())], 0, 0) for i in range(RANDOM_CASES + 2)]


def cases_wsum(d: Draw) -> list[tuple[str, Lists, int, int]]:
    return [(name, args, 0, 4) for name, args in dot(d, 1 << 40, ACTIVATION, 16)]


def cases_div(d: Draw) -> list[tuple[str, Lists, int, int]]:
    pairs = [(1 << 107, 1), (-(1 << 107), 1), (-1, 2), (-7, 7), (-8, 7), (1, 0), (-1, 0), (5, -1), (0, 5)]
    pairs += [(1 << 107, 1 << 57), (-(1 << 107), 1 << 57)]
    pairs += [(d.near(1 << 107), d.upto(1 << 57)) for _ in range(RANDOM_CASES)]
    return [(f"case {i}", [[x], [y]], 0, 0) for i, (x, y) in enumerate(pairs)]


def cases_gated(d: Draw) -> list[tuple[str, Lists, int, int]]:
    edges = [0, 1, -1, 1 << 30, -(1 << 30), 44 << 30, -(44 << 30), -(45 << 30), ACTIVATION, -ACTIVATION]
    out = [(f"x {x}", [[x], [1 << 30]], 0, 0) for x in edges]
    out += [("saturates", [[ACTIVATION], [-ACTIVATION]], 0, 0), ("ends at -0.5", [[1 << 40], [-1]], 0, 0)]
    return out + [(f"random {i}", [[d.near(1 << 36)], [d.near(ACTIVATION)]], 0, 0) for i in range(RANDOM_CASES)]


def cases_verdict(d: Draw) -> list[tuple[str, Lists, int, int]]:
    a, widest = 1 << 49, [(1 << 32) - 1, (1 << 32) - 1, (1 << 64) - 1]
    cell = [1, 250, 1 << 20]
    out: list[tuple[str, Lists, int, int]] = [
        ("widest", [[ACTIVATION] * 256, [-ACTIVATION] * 256, widest], a, 0),
        ("widest, no floor", [[ACTIVATION] * 256, [-ACTIVATION] * 256, [1, (1 << 32) - 1, 1 << 10]], a, 0),
        ("invalid at the bound", [[a, 5], [INVALID, 5], cell], a, 0),
        ("invalid above the bound", [[a + 1, 5], [INVALID, 5], cell], a, 0),
        ("invalid below minus the bound", [[-a - 1, 5], [INVALID, 5], cell], a, 0),
        ("invalid at minus the bound", [[-a, 5], [INVALID, 5], cell], a, 0),
        ("invalid above half precision's", [[(32752 << 30) + 1], [INVALID], cell], 32752 << 30, 0),
        ("excused, another wrong", [[a + 1, 5], [INVALID, 1 << 40], cell], a, 0),
        ("all excused", [[a + 1] * 3, [INVALID] * 3, cell], a, 0),
        ("unequal", [[1, 2], [3], cell], a, 0),
        ("no cell", [[1], [1], [1, 1]], a, 0),
    ]
    for i in range(RANDOM_CASES):
        standard = d.many(1 << 36, d.length())
        line = isqrt((sum(x * x for x in standard) + len(standard) * (1 << 40)) // 250**2)
        served = [standard[0] + line + d.random.randint(0, 1), *standard[1:]]
        out.append((f"on the line {i}", [standard, served, cell], a, 0))
    return out


def cases_logit(d: Draw) -> list[tuple[str, Lists, int, int]]:
    return [(name, args, 24, 0) for name, args in dot(d, ACTIVATION, WEIGHT, 256)]


def cases_compare(d: Draw) -> list[tuple[str, Lists, int, int]]:
    out = []
    for i in range(20):
        served, margin = d.near(ACTIVATION), d.upto(1 << 40)
        out.append((f"case {i}", [[served, served + margin + i % 3 - 1], [1, 1, margin]], 0, 0))
    return [*out, ("widest", [[-ACTIVATION, ACTIVATION], [1, 1, (1 << 64) - 1]], 0, 0)]


def draw(d: Draw, **fields: int) -> list[int]:
    """The fields of verifier.referee.sampling.Draw: mostly what a request may ask for."""
    made = {
        "temperature": d.random.choice([1, 655, 1 << 15, 1 << 16, 1 << 17, 1 << 24, (1 << 32) - 1, 0]),
        "top_k": d.random.choice([0, 1, 2, 5, 40]),
        "top_p": d.random.choice([0, 1, 30000, 58982, 65534, 65535, 65536, 70000]),
        "seed": d.random.choice([0, 1, d.random.getrandbits(64), (1 << 64) - 1]),
        "request": d.random.choice([0, 7, (1 << 32) - 1]),
        "position": d.random.choice([0, 33, 8191]),
        "token": d.random.choice([0, 258, 128255]),
        "unit": d.random.choice([0, 258, 700, 128255]),
        "first": d.random.choice([0, 256, 512]),
    } | fields
    return list(made.values())


def chunk(d: Draw) -> tuple[list[int], int, int, int]:
    """Logits of a chunk near one another, the judged one's, the largest of all, and a margin; edges often hit."""
    centre, width = d.near(1 << 36), 1 << d.random.randint(24, 36)
    logits = [centre + d.random.randint(-width, width) for _ in range(d.random.choice([1, 2, 7, 31]))]
    margin = d.random.choice([0, 1, 1 << 20, 1 << 27, d.random.randint(0, width)])
    judged = d.random.choice(logits) + d.random.choice([0, 1, -1]) * d.random.choice([0, margin, margin + 1])
    return logits, judged, max(logits) + d.random.choice([0, 0, width]), margin


def cases_rank(d: Draw) -> list[tuple[str, Lists, int, int]]:
    full = [[5] * 256, [5], [1, 1, 0], draw(d, token=1, unit=2, first=0)]
    out: list[tuple[str, Lists, int, int]] = [("full chunk of equals, one of them judged", full, 0, 0)]
    for i in range(2 * RANDOM_CASES):
        logits, judged, _, margin = chunk(d)
        fields = {"unit": 3, "first": 0} if i % 3 == 0 else {}
        out.append((f"random {i}", [logits, [judged], [1, 1, margin], draw(d, **fields)], 0, 0))
    return [*out, ("no draw", [[1], [1], [1, 1, 1], [1]], 0, 0)]


def cases_mass(d: Draw) -> list[tuple[str, Lists, int, int]]:
    cell = [1, 1, (1 << 64) - 1]
    bound = [[ACTIVATION] * 256, [-ACTIVATION], [ACTIVATION], cell, draw(d, temperature=1, top_p=1, token=1, unit=2)]
    out: list[tuple[str, Lists, int, int]] = [("bound", bound, 0, 0)]
    for i in range(3 * RANDOM_CASES):
        logits, judged, largest, margin = chunk(d)
        fields = {"token": 3, "unit": 3 + i % 2, "first": 0} if i % 3 else {}
        args = [logits, [judged], [largest], [1, 1, margin], draw(d, **fields)]
        out.append((f"random {i}", args, 0, 0))
    return out


def cases_standing(d: Draw) -> list[tuple[str, Lists, int, int]]:
    out: list[tuple[str, Lists, int, int]] = []
    for i in range(2 * RANDOM_CASES):
        top_k = d.random.choice([0, 1, 5])
        fields = {"token": 9, "unit": 9 - i % 2, "top_k": top_k}
        place = top_k + d.random.choice([-1, 0, 1])
        out.append((f"case {i}", [[place], [d.random.choice([-1, 0, 1, 1 << 90])], draw(d, **fields)], 0, 0))
    return out


def cases_choice(d: Draw) -> list[tuple[str, Lists, int, int]]:
    out: list[tuple[str, Lists, int, int]] = []
    for i in range(2 * RANDOM_CASES):
        tokens = {"unit": 258, "token": 258} if i % 8 == 0 else {"unit": i, "token": 100 + i}
        # A whole temperature makes the lead a whole number, which may equal the margin.
        fields = draw(d, **tokens, **({"temperature": 1 << 16} if i % 2 else {}))
        seen = sampling.Draw(*fields)
        lead = seen.temperature * (sampling.noise(seen, seen.unit) - sampling.noise(seen, seen.token)) >> 16
        served, margin = d.near(1 << 36), d.random.choice([0, 1 << 20, 1 << 27])
        other = served - lead + margin + d.random.choice([-1, 0, 1, 1 << 20, -(1 << 20)])
        out.append((f"case {i}", [[served], [other], [int(i % 7 > 0)], [1, 1, margin], fields], 0, 0))
    return out


def cases_same(d: Draw) -> list[tuple[str, Lists, int, int]]:
    out = []
    for i in range(20):
        x = [d.bits(Dtype.BFLOAT16) for _ in range(d.length())]
        y = list(x)
        if i % 2:
            y[d.random.randrange(len(y))] ^= 1 << d.random.randrange(16)
        out.append((f"case {i}", [x, y], 0, 0))
    return [*out, ("unequal", [[1, 2], [1]], 0, 0), ("256 each", [[0x3F80] * 256, [0x3F80] * 256], 0, 0)]


def op_cases(op: Op) -> list[Case]:
    make: Callable[[Draw], list[tuple[str, Lists, int, int]]] = globals()[f"cases_{op.name.lower()}"]
    out = []
    for name, args, a, b in make(Draw(op.name)):
        case: Case = {"name": name, "args": [texts(x) for x in args], "a": str(a), "b": str(b)}
        out.append(case | outcome(lambda args=args, a=a, b=b: str(run(op, args, a, b))))  # type: ignore[misc]
    return out


def finish_cases() -> list[Case]:
    d = Draw("finish")
    picks = [(Op.LINEAR, 24), (Op.LINEAR, 32), (Op.LOGIT, 24), (Op.SUMSQ, 0), (Op.WSUM, 0), (Op.SUM, 0), (Op.MAX, 0)]
    totals = [(1 << 106), -(1 << 106), 1 << 23, -(1 << 23), (1 << 23) - 1, -(1 << 23) - 1]
    return [
        {
            "name": f"{op.name.lower()} {a} {i}",
            "op": str(int(op)),
            "total": str(total),
            "a": str(a),
            "output": str(finish(op, total, a)),
        }
        for op, a in picks
        for i, total in enumerate([*totals, *d.many(1 << 90, 4)])
    ]


def decode_cases() -> list[Case]:
    d, out = Draw("decode"), []
    for dtype in Dtype:
        edges = [
            0,
            1,
            (1 << dtype.mantissa_bits) - 1,
            1 << dtype.mantissa_bits,
            dtype.infinity - 1,
            dtype.infinity,
            dtype.nan,
        ]
        for fraction, limit in ((30, 20), (dtype.weight_fraction_bits, 8)):
            over = limit + dtype.bias << dtype.mantissa_bits
            limits = [over - 1, over] if over <= dtype.infinity else []
            for i, bits in enumerate([*edges, *limits, *(d.bits(dtype) for _ in range(5))]):
                for signed in (bits, bits ^ dtype.sign):
                    value = decode(signed, dtype, fraction, limit)
                    fields = {
                        "bits": signed,
                        "dtype": int(dtype),
                        "fraction": fraction,
                        "limit": limit,
                        "output": value,
                    }
                    name = f"{dtype.name.lower()} {limit} {i}{'-' if signed & dtype.sign else '+'}"
                    out.append({"name": name} | {k: str(v) for k, v in fields.items()})
    return out


def float_add_cases() -> list[Case]:
    d, out = Draw("float_add"), []
    for dtype in Dtype:
        for i in range(24):
            x = d.bits(dtype)
            y = x ^ dtype.sign ^ d.random.randrange(4) if i % 4 == 0 else d.bits(dtype)
            fields = {"dtype": int(dtype), "x": x, "y": y, "output": add(dtype, x, y)}
            out.append({"name": f"{dtype.name.lower()} {i}"} | {k: str(v) for k, v in fields.items()})
    return out


def tree_cases() -> list[Case]:
    d, out = Draw("tree"), []

    def case(name: str, hashes: Sequence[bytes], first: int, count: int, siblings: Sequence[bytes]) -> None:
        fields: Case = {"name": name, "hashes": [x.hex() for x in hashes], "first": str(first), "count": str(count)}
        fields["siblings"] = [x.hex() for x in siblings]
        out.append(fields | outcome(lambda: root_of_range(hashes, first, count, siblings).hex()))

    for n in (1, 2, 3, 5, 6, 7, 8, 13, 33):
        leaves = [leaf(bytes([n, i])) for i in range(n)]
        tree = Tree(leaves)
        for first, length in {(0, n), (n - 1, 1), (n // 2, 1), (n // 3, max(1, n // 2))}:
            case(f"{length} from {first} of {n}", leaves[first : first + length], first, n, tree.prove(first, length))
    leaves = [leaf(bytes([i])) for i in range(11)]
    proof = Tree(leaves).prove(3, 4)
    case("one sibling too many", leaves[3:7], 3, 11, [*proof, leaves[0]])
    case("one sibling too few", leaves[3:7], 3, 11, proof[:-1])
    case("no siblings", leaves[3:7], 3, 11, [])
    case("no hashes", [], 3, 11, proof)
    case("past the end", leaves[3:7], 8, 11, proof)
    case("far past the end", leaves[3:7], 1 << 40, 11, proof)
    case("an empty level", leaves[:1], 0, 0, [])
    case("another place", leaves[3:7], 5, 11, proof)
    case("another sibling", leaves[3:7], 3, 11, [leaves[d.random.randrange(3, 8)], *proof[1:]])
    return sorted(out, key=lambda x: str(x["name"]))


def vector_cases() -> list[Case]:
    d, out = Draw("vector"), []
    for wide in (False, True):
        edge = 1 << (127 if wide else 63)
        lists = [[0], [1], [-1], [edge - 1], [-edge], [edge - 1, -edge, 0]]
        lists += [d.many(edge - 1, n) for n in (2, 5, 31, 32, 33, 64, 65)]
        for i, values in enumerate(lists):
            name = f"{'i128' if wide else 'i64'} {i}"
            out.append(
                {"name": name, "wide": wide, "values": texts(values), "output": encode_vector(values, wide).hex()}
            )
    return out


def texts(values: Sequence[int]) -> list[str]:
    return [str(x) for x in values]


def outcome(compute: Callable[[], str]) -> Case:
    """{"output": ...}, or {"error": its name}."""
    try:
        return {"output": compute()}
    except RefereeError as error:
        return {"error": type(error).__name__}


def generated() -> dict[str, str]:
    """The text of every generated.json, by its folder's name."""
    folders: dict[str, list[Case]] = {op.name.lower(): op_cases(op) for op in Op}
    folders |= {"finish": finish_cases(), "decode": decode_cases(), "float_add": float_add_cases()}
    folders |= {"tree": tree_cases(), "vector": vector_cases()}
    return {name: render(cases) for name, cases in folders.items()}


def render(cases: Sequence[Case]) -> str:
    """A JSON list with one case a line, so that a diff names the case."""
    return "[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n"


def main() -> None:
    for name, text in generated().items():
        folder = VECTORS / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "generated.json").write_text(text)


if __name__ == "__main__":
    main()
