"""kill -9 of a stage in the middle of a job: how long until its spare serves, whether the tokens stay the same.

A chain with a block a second, three workers and a spare of one of them as processes of their own. One job is served
undisturbed; the same again, and once a third of its tokens are there the stage is killed. From the processes' logs:
when the spare noticed, when stage 0 began the attempt with the spare; from the last stage's answers: when the first
new token came. Then the job is audited, its window passes, and it is paid.
"""

import os
import re
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from bench._models import write_tolerant
from challenger.evidence import Archive, read_facts
from challenger.fetch import Fetcher
from challenger.judge import Judge
from contracts.client import Job, Stage, Status
from deploy.demo import nursery
from deploy.demo.village import Player, Village
from requester.client import Requester
from verifier.commit import Request, requests_root

STAGES = 3
WINDOW_SECONDS = 600
PATIENCE_SECONDS = 600.0
BAR_SECONDS = 5.0  # from the detection to the attempt with the spare; its prefill is measured apart
POLL_SECONDS = 0.05
FETCH_SECONDS = 120.0
FETCH_BYTES = 1 << 30


def run(
    stage: int = 1, requests: int = 4, prompt: int = 16, limit: int = 96, hidden: int = 256, layers: int = 6
) -> dict[str, Any]:
    """stage: who is killed; prompt, limit: tokens of each request; hidden, layers: of a random float32 Llama."""
    if not 0 <= stage < STAGES:
        raise ValueError(f"expected a stage below {STAGES}, came {stage}")
    nursery.warm()
    with tempfile.TemporaryDirectory(prefix="plumb-failover-") as name:
        home = Path(name)
        folder = home / "model"
        write_tolerant(folder, hidden=hidden, layers=layers)
        batch = [Request(tuple((7 * r + 13 * i) % 1000 + 1 for i in range(prompt + r)), limit) for r in range(requests)]
        serving, policy = {"beat_seconds": 0.5, "silence_seconds": 3.0}, {"replaceable": True}
        with Village(folder, home / "village", serving=serving, policy=policy) as village:
            scene = Scene(village, batch)
            return {"stages": STAGES, "killed": stage, "results": scene.play(stage)}


class Scene:
    """Three workers, a spare, and the jobs."""

    def __init__(self, village: Village, batch: Sequence[Request]) -> None:
        self.village = village
        self.batch = list(batch)
        self.requester = Requester(village.requester)
        self.http = httpx.Client(trust_env=False, timeout=10.0)
        self.nonce = 0

    def play(self, stage: int) -> list[dict[str, Any]]:
        layers = self.village.shape.layers
        bounds = [round(i * layers / STAGES) for i in range(STAGES + 1)]
        names = ["first", "second", "third"]
        line = [self.village.worker("honest", bounds[i], bounds[i + 1], names[i]) for i in range(STAGES)]
        spare = self.village.worker("honest", bounds[stage], bounds[stage + 1], "spare")
        self.village.ready(*line, spare)
        pipeline = self.village.pipeline(line)
        self.village.pipeline([spare if i == stage else player for i, player in enumerate(line)])

        calm_seconds, calm = self.serve(pipeline)
        undisturbed = {"name": "undisturbed", "seconds": calm_seconds, "tokens": sum(map(len, calm))}

        id = self.open(pipeline)
        dead = line[stage]
        before = {player.name: self.village.wealth(player.account) for player in (*line, spare)}
        enough = sum(request.limit for request in self.batch) // 3
        began = time.time()
        while self.tokens(line[-1] if stage != STAGES - 1 else line[0], id) < enough:
            self.pause(began)
        os.kill(dead.process.pid or 0, signal.SIGKILL)
        killed = time.time()
        self.village.players.remove(dead)
        ring = [spare if i == stage else player for i, player in enumerate(line)]
        again = self.first_token(ring, id, killed)
        self.await_status(id, Status.COMMITTED)
        seconds = time.time() - began
        outputs = [list(output.tokens) for output in self.requester.outputs(id, self.batch)]
        noticed = _when(spare.log, rf"job {id.hex()[:8]}: .*, for [0-9.]+ s$", killed)
        moved = _when(spare.log, rf"job {id.hex()[:8]}: we are its stage", killed)
        attempt = _when(ring[0].log, rf"job {id.hex()[:8]} attempt 1[0-9]{{3}} begins", killed)
        findings = self.audit(id)
        self.village.devnet.pass_seconds(WINDOW_SECONDS + 5)
        self.await_status(id, Status.PAID)
        paid = self.settled(ring, before)
        stages: tuple[Stage, ...] = self.village.bank.workers.pipeline_stages(self.village.bank.escrow.job(id).pipeline)
        disturbed = {
            "name": "killed",
            "stage": stage,
            "seconds": seconds,
            "tokens": sum(map(len, outputs)),
            "detected_seconds": noticed - killed,
            "moved_seconds": moved - noticed,
            "attempt_seconds": attempt - noticed,
            "prefill_seconds": again - attempt,
            "serving_again_seconds": again - noticed,
            "within_bar": again - noticed <= BAR_SECONDS + max(0.0, again - attempt),
            "tokens_identical": outputs == calm,
            "wrong_pieces": len(findings.wrong),
            "pieces": findings.pieces,
            "spare_serves": stages[stage].worker == spare.account,
            "paid": {name: amount for name, amount in paid.items() if name != dead.name},
            "paid_to_the_dead": self.village.wealth(dead.account) - before[dead.name],
        }
        return [undisturbed, disturbed]

    # ---- a job

    def open(self, pipeline: bytes) -> bytes:
        chain = self.village.requester
        self.nonce += 1
        now = max(chain.block_timestamp(), int(time.time()))
        draft = Job(
            model=self.village.model_id,
            pipeline=pipeline,
            requests_root=requests_root(self.batch),
            requests=len(self.batch),
            prompt_tokens=sum(len(request.prompt) for request in self.batch),
            max_tokens=sum(request.limit for request in self.batch),
            prompt_price=1000,
            token_price=2000,
            lock=0,
            gas_rate=1,
            accept_by=now + 300,
            commit_by=now + 3000,
            window=WINDOW_SECONDS,
            clock=300,
            grace=60,
            nonce=self.nonce,
        )
        id = self.requester.open(replace(draft, lock=chain.escrow.least_lock(draft)))
        self.requester.hand_over(id, self.batch)
        self.await_status(id, Status.ACCEPTED)
        return id

    def serve(self, pipeline: bytes) -> tuple[float, list[list[int]]]:
        """(seconds from acceptance to commitment, each request's tokens)."""
        id = self.open(pipeline)
        began = time.time()
        self.await_status(id, Status.COMMITTED)
        seconds = time.time() - began
        self.village.devnet.pass_seconds(WINDOW_SECONDS + 5)
        self.await_status(id, Status.PAID)
        return seconds, [list(output.tokens) for output in self.requester.outputs(id, self.batch)]

    def tokens(self, player: Player, id: bytes) -> int:
        """How many a stage says there are."""
        try:
            return sum(map(len, self.http.get(f"{player.url}/jobs/{id.hex()}/tokens").json()["tokens"]))
        except (httpx.HTTPError, KeyError):
            return 0

    def first_token(self, ring: Sequence[Player], id: bytes, since: float) -> float:
        """When the last stage has chosen one that stage 0 did not begin the attempt with; unix seconds."""
        pattern = rf"job {id.hex()[:8]} attempt 1[0-9]{{3}} begins with ([0-9]+) tokens"
        while not (found := re.findall(pattern, ring[0].log.read_text(errors="replace"))):
            self.pause(since)
        while self.tokens(ring[-1], id) <= int(found[0]):
            self.pause(since)
        return time.time()

    def await_status(self, id: bytes, status: Status) -> None:
        since = time.time()
        while self.village.requester.escrow.status(id) is not status:
            self.pause(since)

    def pause(self, since: float) -> None:
        if time.time() - since > PATIENCE_SECONDS:
            raise TimeoutError(f"expected this to take less than {PATIENCE_SECONDS:g} s")
        time.sleep(POLL_SECONDS)

    # ---- afterwards

    def audit(self, id: bytes) -> Any:
        """All of the job's pieces, as a watchtower does it."""
        judge = Judge(self.village.model)
        fetcher = Fetcher(Archive(self.village.home / "evidence"), FETCH_BYTES)
        facts = read_facts(self.village.requester, id)
        return judge.audit(fetcher.fetch(facts, judge.weights.shape, FETCH_SECONDS))

    def settled(self, ring: Sequence[Player], before: dict[str, int]) -> dict[str, int]:
        """What each has earned, once everybody's credit is drawn."""
        return {player.name: self.village.wealth(player.account) - before[player.name] for player in ring}


def _when(log: Path, pattern: str, since: float) -> float:
    """Unix seconds of the first such line after `since`. Raises LookupError."""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        at = re.match(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) ", line)
        if at is None or not re.search(pattern, line):
            continue
        seconds = datetime.strptime(at[1], "%Y-%m-%d %H:%M:%S,%f").timestamp()
        if seconds >= since:
            return seconds
    raise LookupError(f"{log}: expected a line like {pattern!r}")
