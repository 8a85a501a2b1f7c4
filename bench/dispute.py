"""Disputes at real sizes: whole games about one layer, every instruction in turn made wrong, on a real EVM.

Each instruction is played twice: denied by a guilty worker, and alleged by a lying challenger. Gas is that of all
transactions of both sides, from the commitment to the end; `moves` counts those behind the commitment. LINK, which is
exact, is prepared and shown by the challenger between two layers of one stage.

`classic` stands beside each game as a reference: the descent in which one side answers every level with its list and
the other only chooses an entry, as Cartesi's and Truebit's games do. It has the same lists, but for k descents k + 1
choices and one answer (the first list, which our challenger posts with its challenge) are transactions of their own.
Rationale: an estimate from measured parts, not another contract: a choice is taken to cost what our cheapest descent of
the report costs without all calldata beyond the state and a choice of its own. That leaves out what it must hash to
show its place in a list, so the reference is, if anything, too cheap.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from bench._court import JUDGED, Batch, Court, Played
from bench._layer import STAGES, LayerWeights, served, shape_named
from bench._liar import Liar, Lie
from bench._memory import peak_bytes, reset_peak
from verifier import link
from verifier.canonical import Case
from verifier.game import Segment
from verifier.program import Kind
from verifier.referee.codec import GREEDY, Source
from verifier.referee.ops import Op
from verifier.tolerance import uniform_profile
from verifier.weights import identify

SEGMENTS = {
    "q": (Kind.Q,),
    "k": (Kind.K,),
    "v": (Kind.V,),
    "qkv": (Kind.Q, Kind.K, Kind.V),
    "attend": (Kind.ATTEND,),
    "mlp": (Kind.MLP,),
    "token": (Kind.TOKEN,),
    "sample": (Kind.SAMPLE,),
    "link": (Kind.LINK,),
}
ALL = "all"
TIGHT, LOOSE = (1, 1000, 1 << 10, 1 << 10), ((1 << 32) - 1, 1, 1 << 49, 1 << 49)  # num, den, floor, margin
SERVED_TOKEN = 5
DRAWN = {"temperature": 50_000, "top_k": 50, "top_p": 60_000, "seed": 7}  # usual parameters, all filters on
CHOICE_BYTES = 4 + 32 + 3 * 32 + 384 + 128  # id, places, the state and the instruction: what a choice must carry
BYTE_GAS = 16  # of a calldata byte that is not zero
FIGURES = (
    *("moves", "gas_total", "gas_worker", "gas_challenger", "max_tx_gas", "max_calldata_bytes"),
    *("trace_seconds", "solve_seconds", "peak_memory_bytes"),
)


def run(
    shape: str = "demo",
    segment: str = ALL,
    position: int = 8191,
    instruction: int | str = ALL,
    liar: str = ALL,
) -> dict[str, Any]:
    """segment: q, k, v, qkv, attend, mlp, token, sample, link or all; instruction: its number or all; liar: worker,
    challenger or all.

    Returns {"results": one row a game, "worst": the dearest of each figure, "dearest": the dearest transaction of each
    method}. Raises ValueError.
    """
    model_shape = shape_named(shape)
    if segment not in (*SEGMENTS, ALL):
        raise ValueError(f"expected a segment of {', '.join((*SEGMENTS, ALL))}, got {segment!r}")
    if not 0 <= position < model_shape.max_positions - 1:
        raise ValueError(f"expected a position below {model_shape.max_positions - 1}, got {position}")
    kinds = tuple(dict.fromkeys(kind for kinds in SEGMENTS.values() for kind in kinds))
    rows: list[dict[str, Any]] = []
    with Court(model_shape.layers, STAGES) as court:
        for kind in kinds if segment == ALL else SEGMENTS[segment]:
            for row in _games(court, shape, kind, position, instruction, liar):
                rows.append(row)
                print(f"  {row}", flush=True)
    _compare(rows)
    worst = {figure: max(row[figure] for row in rows) for figure in FIGURES}
    return {"results": rows, "worst": worst, "dearest": _dearest(rows)}


def _dearest(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each method the transaction that took most gas, and beside it the floor below which its calldata forbids."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        for method, gas, size, floor in row["transactions"]:
            if method not in found or gas > found[method]["gas"]:
                place = {"segment": row["segment"], "instruction": row["instruction"]}
                found[method] = place | {"gas": gas, "floor_gas": floor, "calldata_bytes": size}
    return found


def _compare(rows: list[dict[str, Any]]) -> None:
    """Adds the classic descent's moves and gas to each row."""
    descents = [sent for row in rows for sent in row["transactions"] if sent[0] == "descend"]
    choice = min((gas - BYTE_GAS * max(0, size - CHOICE_BYTES) for _, gas, size, _ in descents), default=0)
    for row in rows:
        lists = sum(sent[0] == "descend" for sent in row["transactions"])
        more = lists + 2 if lists else 0
        row["classic"] = {"moves": row["moves"] + more, "gas_total": row["gas_total"] + more * choice}


def _games(
    court: Court, shape_name: str, kind: Kind, position: int, instruction: int | str, liar: str
) -> Iterator[dict[str, Any]]:
    shape = shape_named(shape_name)
    reset_peak()
    if kind == Kind.LINK:
        if liar in (ALL, "worker"):
            yield _linked(court, shape_name, position)
        return
    last = kind in (Kind.TOKEN, Kind.SAMPLE)
    layer = shape.layers - 1 if last else 0
    with tempfile.TemporaryDirectory() as folder:
        weights = LayerWeights(shape, kind, layer, Path(folder))
        trace = served(weights.program, shape, kind, layer, position + 1)
        batch = Batch(trace, SERVED_TOKEN, DRAWN if kind == Kind.SAMPLE else {})
        word = batch.request.sampling(JUDGED) if kind == Kind.SAMPLE else GREEDY
        units = {
            Kind.TOKEN: shape.vocabulary,
            Kind.SAMPLE: SERVED_TOKEN + 1,
            Kind.ATTEND: shape.blocks,
            Kind.MLP: shape.blocks,
            Kind.Q: shape.heads,
        }
        segment = Segment(bytes(32), STAGES - 1 if last else 0, kind, JUDGED, layer, position, 0)
        segment = replace(segment, unit=units.get(kind, shape.kv_heads) - 1)
        token = SERVED_TOKEN if last else 0
        cases: dict[bool, Case] = {}
        started = perf_counter()
        for tight in (True, False):
            profile = uniform_profile(shape, *(TIGHT if tight else LOOSE))
            case = Case(identify(weights, profile), weights, profile, segment, trace, token, word)
            if tight:
                weights_seconds, started = perf_counter() - started, perf_counter()
                # SAMPLE: the served token's own membership. TOKEN: random logits. Others are wrong wherever one looks.
                while not case.verdict():
                    segment = replace(segment, unit=segment.unit - 1)
                    case = Case(case.model, weights, profile, segment, trace, token, word)
                case.steps()
                seconds = perf_counter() - started
            else:
                # What the profile has no say in is the same in both cases.
                judged = next(i for i, ins in enumerate(case.instructions) if ins.z.source == Source.PROFILE)
                case._vectors = {i: v for i, v in cases[True]._vectors.items() if i < judged}
                case._trees = {i: t for i, t in cases[True]._trees.items() if i < judged}
            cases[tight] = case
        print(f"{kind.name}: {weights_seconds:.1f} s for the weights' tree, {seconds:.2f} s for the trace", flush=True)
        chosen = range(len(case.instructions)) if instruction == ALL else [int(instruction)]
        for step in chosen:
            for accuses in (False, True):
                if liar not in (ALL, "challenger" if accuses else "worker"):
                    continue
                truth = cases[not accuses]
                elements = len(truth.vector(step))
                lie = Liar(truth, [Lie(step, elements - 1 - elements // 3, truth.chunks(step) - 1)], accuses)
                at = replace(segment, job=court.job(truth.model, batch))
                worker, challenger = (truth, lie) if accuses else (lie, truth)
                played = court.play(at, truth.model, batch.evidence(weights, kind), worker, challenger)
                place = {"shape": shape_name, "segment": kind.name.lower(), "position": position}
                op = f"{step} {Op(truth.instructions[step].op).name}"
                yield place | {"instruction": op} | _row(played, "challenger" if accuses else "worker", seconds)


def _linked(court: Court, shape_name: str, position: int) -> dict[str, Any]:
    """One element of the next layer's input is not what the layer's outputs add up to."""
    shape = shape_named(shape_name)
    with tempfile.TemporaryDirectory() as folder:
        weights = LayerWeights(shape, Kind.LINK, 0, Path(folder))
        trace = served(weights.program, shape, Kind.LINK, 0, position + 1)
        batch, profile = Batch(trace, SERVED_TOKEN), uniform_profile(shape, *TIGHT)
        model = identify(weights, profile)
        segment = Segment(bytes(32), 0, Kind.LINK, JUDGED, 0, position, shape.hidden - 1)
        started = perf_counter()
        premises, conclusion = link.premises(segment, trace), link.conclusion(segment, trace)
        seconds = perf_counter() - started
        node = batch.tree.opening(JUDGED)
        at = replace(segment, job=court.job(model, batch))
        played = court.show(at, model, [node, *conclusion], [node, *premises])
    place = {"shape": shape_name, "segment": "link", "position": position, "instruction": "none"}
    return place | _row(played, "worker", seconds)


def _row(played: Played, liar: str, trace_seconds: float) -> dict[str, Any]:
    receipts = [receipt for receipt, _ in played.sent]
    own = sum(receipt.gas for receipt, by_worker in played.sent if by_worker)
    total = sum(receipt.gas for receipt in receipts)
    return {
        "outcome": played.outcome,
        "liar": liar,
        "moves": len(receipts) - 1,
        "gas_total": total,
        "gas_worker": own,
        "gas_challenger": total - own,
        "max_tx_gas": max(receipt.gas for receipt in receipts),
        "max_calldata_bytes": max(receipt.calldata_bytes for receipt in receipts),
        "trace_seconds": round(trace_seconds, 3),
        "solve_seconds": round(played.solve_seconds, 3),
        "peak_memory_bytes": peak_bytes(),
        "transactions": [[r.method.removeprefix("Disputes."), r.gas, r.calldata_bytes, r.floor_gas] for r in receipts],
    }
