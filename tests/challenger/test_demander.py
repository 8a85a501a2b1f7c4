"""What others demand of a job neither stops an inquiry nor ends it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, cast

from bench._town import until
from challenger.demander import Demander, DemandLog, Progress
from challenger.inquiry import Inquiry, Step
from contracts.client import Chain, demand_id
from contracts.events import DemandAnswered, DemandOpened
from verifier.audit import WRONG, Verdict
from verifier.demand import Demand, Demanded, Wanted
from verifier.program import Kind
from verifier.referee.codec import Model

JOB = b"\x07" * 32
OURS, THEIRS = (Demand(JOB, 0, Wanted.PROMPT, r, 0, 0, 1) for r in (0, 1))
FOUND = Verdict(WRONG, 0, Kind.MLP, 0, 0, 0, 0)
FACTS: dict[str, Any] = {"contract": "0x", "block": 1, "log_index": 0, "transaction": b""}


class Thinker:
    """An inquiry that wants one answer, and convicts with it. Its first thought takes until `go`."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.fed: list[Demand] = []
        self.posted = SimpleNamespace(id=JOB, feed=lambda demand, _: self.fed.append(demand))
        self.posted.job = SimpleNamespace(requests=1)

    def step(self, _: int) -> Step:
        assert self.go.wait(60)
        return Step(wrong=(FOUND,)) if OURS in self.fed else Step(demands=(OURS,))


class Node:
    """A chain that takes every demand. Only what a Demander asks of one."""

    account = "us"

    def __init__(self) -> None:
        self.sent: list[Demand] = []
        self.demands = SimpleNamespace(
            address="0x", price_of=lambda *_: 1, demand=lambda demand, *_: self.sent.append(demand)
        )
        self.token = SimpleNamespace(allowance=lambda *_: 1)


def opened(demand: Demand) -> DemandOpened:
    return DemandOpened(id=demand_id(demand), job=JOB, demanded=Demanded(demand, "them", 0, 100, 1, 1), **FACTS)


def answered(demand: Demand) -> DemandAnswered:
    return DemandAnswered(id=demand_id(demand), job=JOB, openings=(), **FACTS)


def scene() -> tuple[Demander, Thinker, Node, DemandLog]:
    thinker, node, log = Thinker(), Node(), DemandLog()
    demander = Demander(cast(Chain, node), log, cast(Inquiry, thinker), cast(Model, None), 10)
    return demander, thinker, node, log


def outcome(demander: Demander) -> Progress:
    """The first that is not waiting."""
    seen: list[Progress] = []

    def told() -> bool:
        seen.append(demander.advance(50))
        return seen[-1] is not Progress.WAITING

    until(told, 10.0)
    return seen[-1]


def test_what_others_demand_is_not_waited_for() -> None:
    """An accomplice of the stage keeps one of its own open all the time."""
    demander, thinker, node, log = scene()
    thinker.go.set()
    log.feed([opened(THEIRS)])
    assert outcome(demander) is Progress.SENT and node.sent == [OURS]
    log.feed([opened(OURS)])
    assert [demander.advance(50) for _ in range(5)] == [Progress.WAITING] * 5 and node.sent == [OURS]
    log.feed([answered(OURS)])
    assert outcome(demander) is Progress.WRONG and demander.wrong == (FOUND,)
    demander.close()


def test_what_others_demanded_while_we_thought_is_used() -> None:
    """Where an inquiry looks is no secret: an accomplice asks for it first, and it is answered before we are ready."""
    demander, thinker, node, log = scene()
    assert demander.advance(50) is Progress.WAITING
    log.feed([opened(OURS), answered(OURS)])
    thinker.go.set()
    assert outcome(demander) is Progress.WRONG and demander.wrong == (FOUND,) and node.sent == []
    demander.close()
