"""200,000 tokens through one pipeline, job after job: whether memory stays flat, whether a request is lost.

A chain with a block a second and a worker's process a stage, over loopback, mutual TLS and with commitments on. Each
job is opened, served, committed, fetched and checked against the roots on chain, and paid. Between two jobs, when
nothing is in flight, every process is looked at: resident memory, threads, open descriptors, bytes of its trace store.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from bench._models import write_tolerant
from contracts.client import Status
from deploy.demo import nursery
from deploy.demo.village import Player, Village
from requester.client import Requester, Terms, make_job
from verifier.commit import Output, Request

WARM_SHARE = 0.5  # of the jobs, not counted: pools and caches fill, and the heap takes the shape of what comes
POLL_SECONDS = 0.1
PATIENCE_SECONDS = 3600.0  # for one step of one job
TERMS = Terms(prompt_price=1000, token_price=2000, accept_seconds=3600, serve_seconds=36_000, clock=300, grace=60)
# A machine that is stopped for minutes, with everybody on it, is no failure of a stage.
SERVING = {"silence_seconds": 60.0, "slow_seconds": 3600.0, "stall_seconds": 3600.0}
# Flat: less is kept of a token for good than the least that a worker could keep of it, its id: an int of 28 bytes and
# its place in a list, 8. Who kept anything of every token is above that, and who keeps 74 KB of each of the default's
# jobs. A leak that has to do with jobs and not with tokens shows sooner in many small ones: `bytes_a_job` stands beside
# it, for a soak with few requests and a low limit. (Two workers and their requester in one process, trimmed after each
# ten tiny jobs, held 1.0 MB more after 70 of them and nothing more after the last 30; Python's objects, 3 more a job.)
FLAT_BYTES_A_TOKEN = 36.0

# What is freed goes back to the system, so that what grows is what is kept: large blocks are mapped apart, and no
# thread keeps an arena of its own, in which others' memory stays, a step of 20 MB at any time.
HEAP = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Sample:
    """One process at rest. tokens: generated before."""

    tokens: int
    seconds: float
    resident_bytes: int
    anonymous_bytes: int
    descriptors: int
    threads: int
    stored_bytes: int


def run(
    tokens: int = 200_000,
    requests: int = 32,
    prompt: int = 8,
    limit: int = 64,
    stages: int = 3,
    hidden: int = 64,
    layers: int = 3,
    retain: str = "store",
) -> dict[str, Any]:
    """tokens: at least so many in all; requests, prompt, limit: of a job; hidden, layers: of a random float32 Llama."""
    if not 1 <= stages <= layers:
        raise ValueError(f"expected 1 .. {layers} stages, came {stages}")
    for name, value in HEAP.items():
        os.environ.setdefault(name, value)
    nursery.warm()
    with tempfile.TemporaryDirectory(prefix="plumb-soak-") as name:
        home = Path(name)
        folder = home / "model"
        write_tolerant(folder, hidden=hidden, layers=layers)
        with Village(folder, home / "village", serving=SERVING | {"retain": retain}) as village:
            bounds = [round(i * layers / stages) for i in range(stages + 1)]
            line = [village.worker("honest", bounds[i], bounds[i + 1], f"stage{i}") for i in range(stages)]
            village.ready(*line)
            soak = Soak(village, line, requests, prompt, limit)
            while soak.tokens < tokens:
                soak.serve()
            return soak.report()


class Soak:
    """One pipeline, its jobs, and what was seen of its processes."""

    def __init__(self, village: Village, line: Sequence[Player], requests: int, prompt: int, limit: int) -> None:
        self.village = village
        self.line = list(line)
        self.size = (requests, prompt, limit)
        self.requester = Requester(village.requester)
        self.http = httpx.Client(trust_env=False, timeout=300.0)
        self.pipeline = village.pipeline(self.line)
        self.samples: dict[str, list[Sample]] = {}
        self.began = time.monotonic()
        self.jobs = self.tokens = self.billed = self.lost = self.twice = self.attempts = 0
        self.serving_seconds: list[float] = []
        self.look()

    # ---- a job

    def serve(self) -> None:
        """One job, from its opening to its pay. Raises TimeoutError, RequesterError."""
        chain, batch = self.village.requester, self.batch()
        id = self.requester.open(make_job(chain, self.village.model_id, self.pipeline, batch, TERMS))
        self.requester.hand_over(id, batch)
        self.reaches(id, Status.ACCEPTED)
        began = time.monotonic()
        self.reaches(id, Status.COMMITTED)
        self.serving_seconds.append(time.monotonic() - began)
        self.count(id, batch, self.requester.outputs(id, batch))
        self.village.devnet.pass_seconds(TERMS.window + 5)
        self.reaches(id, Status.PAID)
        self.jobs += 1
        for player in self.line:  # a stage that has seen its pay and removed its traces is at rest
            self.wait(lambda player=player: self.ask(player, f"/jobs/{id.hex()}")["phase"] == "closed")
            self.wait(lambda player=player: not any((self.data(player.name) / "jobs").rglob("*.safetensors")))
        self.look()
        print(f"  job {self.jobs}: {self.tokens} tokens, {time.monotonic() - self.began:.0f} s", flush=True)

    def batch(self) -> list[Request]:
        """No two requests of the soak are the same."""
        requests, prompt, limit = self.size
        first = self.jobs * requests
        return [
            Request(tuple((7 * (first + r) + 13 * i + (first + r) // 1000) % 1000 for i in range(prompt)), limit)
            for r in range(requests)
        ]

    def count(self, id: bytes, batch: Sequence[Request], outputs: Sequence[Output]) -> None:
        """What was served of each request, by its output and by the positions that every stage committed to."""
        held = [self.ask(player, f"/jobs/{id.hex()}/trace")["requests"] for player in self.line]
        for r, (request, output) in enumerate(zip(batch, outputs, strict=True)):
            due = len(request.prompt) + request.limit - 1
            positions = [stage[r]["positions"] for stage in held]
            self.lost += output.count < request.limit or min(positions) < due
            self.twice += output.count > request.limit or max(positions) > due
            self.tokens += output.count
        self.billed += self.village.requester.escrow.outputs(id)[1]
        self.attempts += self.ask(self.line[0], f"/jobs/{id.hex()}")["attempt"]

    def ask(self, player: Player, path: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.http.get(f"{player.url}{path}").raise_for_status().json()
        return answer

    def data(self, name: str) -> Path:
        return self.village.home / name / "data"

    def reaches(self, id: bytes, status: Status) -> None:
        self.wait(lambda: self.village.requester.escrow.status(id) is status)

    def wait(self, condition: Any) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            for player in self.line:
                self.village.alive(player)
            if time.monotonic() > end:
                raise TimeoutError(f"expected job {self.jobs} to take less than {PATIENCE_SECONDS:g} s a step")
            time.sleep(POLL_SECONDS)

    # ---- what is seen

    def look(self) -> None:
        processes = {player.name: player.process.pid or 0 for player in self.line}
        processes |= {"requester": os.getpid(), "chain": self.village.devnet.process_id}
        seconds = round(time.monotonic() - self.began, 1)
        for name, pid in processes.items():
            stored = stored_bytes(self.data(name)) if name.startswith("stage") else 0
            self.samples.setdefault(name, []).append(Sample(self.tokens, seconds, *read_process(pid), stored))

    def report(self) -> dict[str, Any]:
        results = [row(name, samples) for name, samples in self.samples.items()]
        stages = [found for found in results if found["name"].startswith("stage")]
        return {
            "results": results,
            "summary": {
                "tokens": self.tokens,
                "tokens_billed": self.billed,
                "jobs": self.jobs,
                "requests": self.jobs * self.size[0],
                "requests_lost": self.lost,
                "requests_served_twice": self.twice,
                "attempts_repeated": self.attempts - self.jobs,
                "flat": all(found["flat"] for found in stages),
                "flat_below_bytes_a_token": FLAT_BYTES_A_TOKEN,
                "tokens_per_second_while_serving": round(
                    self.tokens / self.jobs / median(self.serving_seconds) if self.jobs else 0.0, 1
                ),
                "seconds": round(time.monotonic() - self.began, 1),
            },
            "samples": {
                name: {field.name: [getattr(sample, field.name) for sample in samples] for field in fields(Sample)}
                for name, samples in self.samples.items()
            },
        }


def row(name: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """A process: before and after, and by how much it grows once it is warm."""
    warm = samples[int(WARM_SHARE * len(samples)) :]
    growth = slope([sample.tokens for sample in warm], [sample.resident_bytes for sample in warm])
    return {
        "name": name,
        "resident_bytes_warm": warm[0].resident_bytes,
        "resident_bytes_end": warm[-1].resident_bytes,
        "bytes_a_token": round(growth, 3),
        "bytes_a_job": round(slope(range(len(warm)), [sample.resident_bytes for sample in warm]), 1),
        "flat": growth < FLAT_BYTES_A_TOKEN,
        "descriptors_warm": warm[0].descriptors,
        "descriptors_end": warm[-1].descriptors,
        "threads_warm": warm[0].threads,
        "threads_end": warm[-1].threads,
        "stored_bytes_warm": warm[0].stored_bytes,
        "stored_bytes_end": warm[-1].stored_bytes,
    }


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The median of the slopes between all pairs (Theil and Sen): one step of the allocator does not tilt it."""
    slopes = [(y[j] - y[i]) / (x[j] - x[i]) for i in range(len(x)) for j in range(i + 1, len(x)) if x[j] > x[i]]
    return median(slopes) if slopes else 0.0


def read_process(pid: int) -> tuple[int, int, int, int]:
    """(resident bytes, those that no file stands behind, open descriptors, threads), as Linux tells them."""
    place = Path("/proc") / str(pid)
    told = dict(line.split(":", 1) for line in (place / "status").read_text(encoding="utf-8").splitlines())
    resident, anonymous = (1024 * int(told[key].split()[0]) for key in ("VmRSS", "RssAnon"))
    return resident, anonymous, len(os.listdir(place / "fd")), int(told["Threads"])


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
