"""Plays the scenarios, one after the other, and reports what the chain says of each."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from challenger.store import GameState, Store
from contracts.events import Event
from deploy.demo.outcome import Outcome, events_of, is_final, outcome
from deploy.demo.scenarios import Ending, Scenario
from deploy.demo.village import DemoError, Player, Village
from requester.client import Requester, Terms, make_job
from requester.receipt import transactions
from verifier.commit import Request
from verifier.program import Kind

STAGES = 3
SCENARIO_SECONDS = 360.0
PROMPTS = (
    "The following functions",
    "Return a list of",
    "If the object is not",
    "This module provides",
    "An expression is",
    "Raised when the",
    "The with statement",
    "Note that the value",
)
LIMIT = 10

Progress = Callable[[str], None]


def terms_for(mute: bool, busy: float) -> Terms:
    """A job's times. busy: runnable processes a core; beyond two the parties, who share them, get as much more time."""
    patience = max(1.0, busy / 2)
    window, clock = round(20 * patience), round(10 * patience)
    if mute:
        return Terms(accept_seconds=15, serve_seconds=10, window=window, clock=clock, grace=5)
    return Terms(accept_seconds=60, serve_seconds=90, window=window, clock=clock, grace=5)


@dataclass
class Result:
    """One scenario's row of the report."""

    scenario: Scenario
    outcome: Outcome
    margin: float | None
    balances: dict[str, dict[str, str]]
    transactions: list[dict[str, Any]]
    seconds: float
    worst: dict[str, float] = field(default_factory=dict)

    @property
    def as_expected(self) -> bool:
        if self.outcome.ending != self.scenario.expected:
            return False
        guilty = self.scenario.expected in (Ending.SLASHED, Ending.FLAGGED)
        return not guilty or self.outcome.stage == self.scenario.stage

    def row(self) -> dict[str, Any]:
        segment = self.outcome.segment
        return {
            "name": self.scenario.name,
            "title": self.scenario.title,
            "stage": self.outcome.stage,
            "expected": str(self.scenario.expected),
            "actual": str(self.outcome.ending),
            "segment": None
            if segment is None
            else {
                "kind": Kind(segment.kind).name.lower(),
                "request": segment.request,
                "layer": segment.layer,
                "position": segment.position,
                "unit": segment.unit,
            },
            "margin": _json_number(self.margin),
            "worst": {kind: _json_number(ratio) for kind, ratio in self.worst.items()},
            "balances": self.balances,
            "transactions": self.transactions,
            "seconds": round(self.seconds, 1),
        }


class Demo:
    """Runs scenarios in one village. Honest workers stay for all; a dishonest one joins for its own scenario."""

    def __init__(self, village: Village, requests: Sequence[Request], progress: Progress) -> None:
        self.village = village
        self.requests = requests
        self.progress = progress
        layers = village.shape.layers
        if layers < STAGES:
            raise DemoError(f"expected a model of {STAGES} layers or more, got {layers}")
        cuts = [layers * stage // STAGES for stage in range(STAGES + 1)]
        self.ranges = list(pairwise(cuts))
        self.progress("starting three workers and a watchtower")
        # Side by side: each waits for a block after every transaction of its own.
        with ThreadPoolExecutor(STAGES + 1) as pool:
            watchtower = pool.submit(village.watcher, "watchtower")
            stages = [
                pool.submit(village.worker, "honest", *self.ranges[stage], f"stage-{stage}") for stage in range(STAGES)
            ]
            self.honest = [stage.result() for stage in stages]
            self.watchtower = watchtower.result()
        village.ready(*self.honest)
        village.watching(self.watchtower)

    def prepare(self, scenario: Scenario) -> list[Player]:
        """The line of a scenario. Its dishonest worker starts ahead of time: it loads during the scenario before."""
        line = list(self.honest)
        if scenario.role != "honest":
            name = f"{scenario.name}-{scenario.role}"
            line[scenario.stage] = self.village.worker(scenario.role, *self.ranges[scenario.stage], name)
        return line

    def play(self, scenarios: Sequence[Scenario]) -> list[Result]:
        results = []
        with ThreadPoolExecutor(1) as pool:
            upcoming = pool.submit(self.prepare, scenarios[0])
            for index, scenario in enumerate(scenarios):
                line = upcoming.result()
                self.village.ready(*line)
                self.progress(f"({scenario.name}) {scenario.title}")
                if index + 1 < len(scenarios):
                    upcoming = pool.submit(self.prepare, scenarios[index + 1])
                results.append(self._play(scenario, line))
                for player in line:
                    if player not in self.honest:
                        self.village.stop(player)
        return results

    def _play(self, scenario: Scenario, line: list[Player]) -> Result:
        village = self.village
        started = time.monotonic()
        accuser = village.watcher(f"{scenario.name}-accuser", "accuser") if scenario.accused else None
        if accuser is not None:
            village.watching(accuser)
        parties = {"requester": village.requester.account, "watchtower": self.watchtower.account}
        parties |= {f"stage {index}": player.account for index, player in enumerate(line)}
        if accuser is not None:
            parties["accuser"] = accuser.account
        before = {name: village.wealth(account) for name, account in parties.items()}
        first_block = village.bank.block_number() + 1
        pipeline = village.pipeline(line)
        requester = Requester(village.requester)
        busy = os.getloadavg()[0] / (os.cpu_count() or 1)
        terms = terms_for(scenario.role == "mute", busy)
        job = requester.open(make_job(village.requester, village.model_id, pipeline, self.requests, terms))
        requester.hand_over(job, self.requests)
        self.progress(f"    job 0x{job.hex()[:12]} opened, {len(self.requests)} prompts handed over")
        story = self._follow(job, first_block, [*line, *([accuser] if accuser else [])])
        if accuser is not None:
            village.stop(accuser)
        audit, margin = self._receipt(job)
        after = {name: village.wealth(account) for name, account in parties.items()}
        return Result(
            scenario,
            outcome(story),
            margin,
            {name: {"before": str(before[name]), "after": str(after[name])} for name in parties},
            self._transactions(story),
            time.monotonic() - started,
            audit,
        )

    def _follow(self, job: bytes, first_block: int, players: Sequence[Player]) -> list[Event]:
        """The job's events, once it is over. Tells of each as it comes."""
        told = 0
        deadline = time.monotonic() + SCENARIO_SECONDS
        story: list[Event] = []
        while time.monotonic() < deadline:
            story = events_of(list(self.village.bank.events(first_block)), job)
            for event in story[told:]:
                self.progress(f"    {type(event).__name__}")
            told = len(story)
            if is_final(story):
                break
            for player in [*players, self.watchtower]:
                self.village.alive(player)
            time.sleep(0.5)
        return story

    def _receipt(self, job: bytes) -> tuple[dict[str, float], float | None]:
        """From the watchtower's database: the worst ratio of each kind, and the ratio of the piece it challenged."""
        store = Store(f"sqlite:///{self.watchtower.log.parent / 'data' / 'challenger.db'}")
        try:
            row = store.job(job.hex())
            games = [game for game in store.games(*GameState) if game.job == job.hex()]
        finally:
            store.close()
        receipt = row.receipt if row is not None else {}
        worst = {kind: _number(ratio) for kind, ratio in receipt.get("worst", {}).items()}
        return worst, float(games[0].evidence["ratio"]) if games else None

    def _transactions(self, story: Sequence[Event]) -> list[dict[str, Any]]:
        return [
            {"method": item.method, "sender": item.sender, "gas": item.gas, "calldata_bytes": item.calldata_bytes}
            for item in transactions(self.village.bank, story)
        ]


def report(results: Sequence[Result]) -> dict[str, Any]:
    """The whole report. margins: of tolerated pieces; the exact ones have none."""
    tolerated = ("q", "k", "v", "attend", "mlp", "token")
    honest = [
        result.worst[kind]
        for result in results
        if result.scenario.expected in (Ending.PAID, Ending.BOND_LOST)
        for kind in tolerated
        if kind in result.worst
    ]
    convicting = [
        result.margin
        for result in results
        if result.scenario.expected in (Ending.SLASHED, Ending.FLAGGED)
        and result.margin is not None
        and result.margin != float("inf")
    ]
    return {
        "scenarios": [result.row() for result in results],
        "margins": {
            "worst_honest": _json_number(max(honest, default=None)),
            "smallest_convicting": min(convicting, default=None),
        },
    }


def make_requests(model: Path, vocabulary: int) -> tuple[Request, ...]:
    """The demo's prompts in the model's own tokens; for a model without a tokenizer, token ids."""
    if (model / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False, local_files_only=True)
        stops = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        return tuple(Request(tuple(tokenizer.encode(text)) * 2, LIMIT, stops) for text in PROMPTS)
    return tuple(
        Request(tuple((7 * r + 3 * i) % vocabulary for i in range(8 + r)), LIMIT) for r, _ in enumerate(PROMPTS)
    )


def write_report(path: Path, results: Sequence[Result]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report(results), indent=2) + "\n", encoding="utf-8")


def _number(ratio: float | str) -> float:
    return float("inf") if ratio == "exact" else float(ratio)


def _json_number(ratio: float | None) -> float | str | None:
    return "exact" if ratio == float("inf") else ratio
