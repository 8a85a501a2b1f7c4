"""Randomised games on a small model against the real contracts: honest parties never lose, and no lie escapes.

Every game draws its segment, its place, its lies, silences and bad manners from (seed, number). Games of even number
go through a shuffled census of lies alone - each kind of segment, instruction, class of element and depth, by worker
and by challenger; the others have several lies, nothing but nonsense, or an exact segment. Rows are by segment kind
and by who is at fault:
  worker             served something wrong and denies it
  challenger         accuses an honest worker
  sender             the hand-off that it signed is not what it committed to; the accused shows it
  silent worker      is right, but stops answering somebody who lies
  silent challenger  is right, but stops answering somebody who lies
`honest_lost` counts parties that were right and answered, and lost; `lies_escaped` guilty workers that were not
convicted. Either, or a call that was not refused as it must be, makes the command fail.
"""

import tempfile
from collections import Counter
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

from bench._arena import NOBODY, Arena, Unfair
from bench._docket import Docket, Played
from bench._market import CHALLENGER, CONFIG, Market, write_model
from deploy.deployment import deploy
from deploy.devnet import Devnet
from deploy.keys import dev_account
from verifier.weights import Weights

FUNDS = 10**30
KEPT_FAILURES = 20
ODD: dict[str, Any] = {"hidden_size": 329, "intermediate_size": 601, "vocab_size": 301}  # no block is full at the end


def run(games: int = 10_000, seed: int = 1, first: int = 0, head_dim: int = 64) -> dict[str, Any]:
    """games: how many; first: the number of the first, to play one again (`--seed S --first N --games 1`); head_dim:
    of the model. With another than 64 nothing in the model divides into blocks, and the vocabulary is odd.

    Returns {"results": one row a kind and party at fault, "census", "failures", ...}. Raises ValueError.
    """
    if games < 1 or first < 0:
        raise ValueError(f"expected one game or more from number 0 or later, got {games} from {first}")
    rows: dict[tuple[str, str], Counter[str]] = {}
    failures: list[str] = []
    depths: Counter[str] = Counter()
    started = perf_counter()
    with tempfile.TemporaryDirectory() as folder, Devnet() as devnet:
        market = Market(
            devnet.url, deploy(devnet.url, dev_account(0), withdrawal_seconds=60), _weights(Path(folder), head_dim)
        )
        market.settle_in()
        market.chain(CHALLENGER).disputes.deposit(FUNDS // 2)
        arena = Arena(devnet, market.addresses.disputes)
        docket = Docket(market, arena, seed)
        built_seconds, started = perf_counter() - started, perf_counter()
        for number in range(first, first + games):
            try:
                played = docket.play(number, Random(f"{seed}/{number}"))
            except Unfair as unfair:
                failures.append(f"game {number}: {docket.told}: {unfair}")
                continue
            row = rows.setdefault((played.kind, played.liar), Counter())
            _count(row, played)
            depths.update(played.depths)
            if played.wrong:
                failures.append(f"game {number}: {docket.told}: {played}")
            if (number - first) % 500 == 499:
                print(f"  {number - first + 1} games, {perf_counter() - started:.0f} s", flush=True)
        arena.close()
    seconds = perf_counter() - started
    return {
        "results": [{"segment": kind, "liar": liar, **_row(row)} for (kind, liar), row in sorted(rows.items())],
        "games": games,
        "honest_lost": sum(row["honest_lost"] for row in rows.values()),
        "lies_escaped": sum(row["lies_escaped"] for row in rows.values()),
        "census": docket.census,
        "depths": dict(sorted(depths.items())),
        "seconds": {"set_up": round(built_seconds, 1), "games": round(seconds, 1), "a_game": round(seconds / games, 4)},
        "failures": failures[:KEPT_FAILURES],
        "failed": len(failures),
    }


def _weights(folder: Path, head_dim: int) -> Weights:
    changes = {} if head_dim == CONFIG["head_dim"] else {**ODD, "head_dim": head_dim}
    return Weights.open(write_model(folder, **changes), threads=1)


def _count(row: Counter[str], played: Played) -> None:
    row["games"] += 1
    row["convicted"] += played.convicted != NOBODY
    row["honest_lost"] += played.honest_lost
    row["lies_escaped"] += played.lie_escaped
    row["moves_max"] = max(row["moves_max"], played.moves)


def _row(row: Counter[str]) -> dict[str, int]:
    return {name: row[name] for name in ("games", "convicted", "honest_lost", "lies_escaped", "moves_max")}
