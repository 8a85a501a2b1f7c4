"""A stage that dies, hangs or turns slow; a worker that stands in for another."""

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from contracts.client import Stage as Place
from tests.worker.pipeline_in_process import JOB, Greedy, Tiny, serve, split, wire, within
from verifier.audit import Auditor
from verifier.audit import Stage as AuditedStage
from verifier.commit import Request
from verifier.tolerance import uniform_profile
from verifier.trace import RequestTrace
from worker import ring_pb2 as pb
from worker.attempt import judge
from worker.batch import Batch, Piece
from worker.cache import Cache
from worker.channel import Peer
from worker.config import Bounds, Serving
from worker.consent import place
from worker.errors import JobFailed, Stalled
from worker.pulse import Pulse
from worker.recorder import trace_path
from worker.stage import Captured, Stage

CALM = Serving(max_rows=16, beat_seconds=0.1, silence_seconds=30.0, attempts=2)
QUICK = replace(CALM, silence_seconds=2.0, slow_seconds=4.0, attempts=50)


# ---- the pulse


def test_silence_is_judged_once_the_predecessor_was_heard() -> None:
    pulse = Pulse("stage 4", Serving(beat_seconds=1, silence_seconds=5))
    for second in range(100):
        pulse.judge(second)
    pulse.beat(0.0, False, 99)
    for second in range(100, 105):
        pulse.judge(second)
    with pytest.raises(Stalled, match=r"stage 4: silent for 6\.0 s"):
        pulse.judge(105)


def test_who_had_no_time_to_listen_judges_nobody() -> None:
    pulse = Pulse("stage 4", Serving(beat_seconds=1, silence_seconds=5))
    pulse.beat(0.0, False, 0)
    pulse.judge(0)
    pulse.judge(60)
    for second in range(61, 66):
        pulse.judge(second)
    with pytest.raises(Stalled):
        pulse.judge(66)


def test_a_message_that_waits_for_room_is_no_silence() -> None:
    pulse = Pulse("stage 4", Serving(beat_seconds=1, silence_seconds=5))
    pulse.came(0)
    for second in range(50):
        pulse.judge(second)
    pulse.queued(50)
    pulse.judge(51)


def test_who_was_heard_while_it_was_asked_is_not_given_up() -> None:
    """Over a slow link the answer is late too."""
    pulse = Pulse("stage 4", Serving(beat_seconds=1, silence_seconds=5))

    async def no_answer() -> bool:
        pulse.beat(0.0, False, time.monotonic())
        return False

    async def nothing() -> bool:
        return False

    pulse.beat(0.0, False, time.monotonic() - 6)
    asyncio.run(judge(pulse, no_answer))
    pulse.beat(0.0, False, time.monotonic() - 6)
    with pytest.raises(Stalled, match="stage 4: silent for 6"):
        asyncio.run(judge(pulse, nothing))


def test_a_microbatch_that_is_held_too_long_is_judged() -> None:
    clock = Serving(beat_seconds=1, slow_seconds=20)
    sender, receiver = Pulse("", clock), Pulse("stage 4", clock)
    sender.took(3)
    sender.took(9)
    assert sender.held_seconds(10) == 7
    receiver.beat(sender.held_seconds(23), False, 23)
    receiver.judge(23)
    receiver.beat(sender.held_seconds(24), False, 24)
    with pytest.raises(Stalled, match=r"stage 4: has had a microbatch for 21\.0 s"):
        receiver.judge(24)
    with pytest.raises(KeyError), sender.computing():
        assert sender.held_seconds(24) == 21
        raise KeyError
    assert sender.held_seconds(24) == 15


def test_a_stage_that_gave_an_attempt_up_holds_what_it_computes_and_no_more() -> None:
    """Else it seems ill for ever, for the next attempt waits until it is well."""
    pulse = Pulse("stage 4", Serving(beat_seconds=1, slow_seconds=20))
    pulse.took(3)
    pulse.took(9)
    with pulse.computing():
        pulse.over()
        assert pulse.held_seconds(10) == 7
    assert pulse.held_seconds(10) == 0
    with pulse.computing():  # what the executor had queued
        assert pulse.held_seconds(10) == 0


def test_before_a_finish_nobody_is_judged() -> None:
    pulse = Pulse("stage 4", Serving(beat_seconds=1, silence_seconds=5, slow_seconds=5))
    pulse.beat(0.0, True, 0)
    for second in range(100):
        pulse.judge(second)


# ---- attempts that go on where another broke


class Counting(Stage):
    """Notes the pieces it computes; breaks or hangs at some call, once."""

    at = 0
    hangs: threading.Event | None = None

    def forward(self, hidden: torch.Tensor, batch: Batch, cache: Cache) -> tuple[torch.Tensor, Captured]:
        self.seen = [*getattr(self, "seen", []), batch.pieces]
        if len(self.seen) == self.at:
            if self.hangs is None:
                raise RuntimeError("the device is lost")
            self.hangs.wait()
        return super().forward(hidden, batch, cache)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_tokens_are_kept_and_prefilled_and_the_trace_audits_clean(
    tiny: Tiny, greedy: Greedy, tmp_path: Path, broken: int
) -> None:
    folder, model = tiny
    requests = [Request(tuple(range(5, 12)), 12), Request((3,), 20), Request(tuple(range(40, 60)), 5)]
    stages = split(folder, 3, 3, Counting)
    stages[broken].at = 18  # type: ignore[attr-defined]
    states = serve(tmp_path, stages, requests, CALM)
    assert [list(ids) for ids in states[0].tokens] == [greedy(model, request) for request in requests]
    assert [state.attempt for state in states] == [2, 2, 2]
    long = [piece for pieces in stages[2].seen for piece in pieces if piece.request == 1 and piece.count > 3]  # type: ignore[attr-defined]
    assert long and long[0].first == 0, "the tokens of the first attempt were not prefilled"

    auditor = Auditor(stages[0].weights, uniform_profile(stages[0].shape, 1, 8, 1 << 24, 1 << 30))
    jobs = [next((tmp_path / str(i) / "jobs").iterdir()) for i in range(3)]
    for r in range(len(requests)):
        parts = [AuditedStage(i, RequestTrace.load(trace_path(jobs[i], r), stages[0].shape)) for i in range(3)]
        for part, receiver in zip(parts, [*parts[1:], None], strict=True):
            for layer in range(part.trace.first_layer, part.trace.end_layer):
                assert all(audit.worst().ratio < 0.5 for audit in auditor.layer(part, r, layer))
                link = auditor.link(part, r, layer, receiver)
                assert link is not None and link.worst().ratio == 0


def test_drawn_tokens_are_the_same_after_a_broken_attempt(tiny: Tiny, tmp_path: Path) -> None:
    folder, _ = tiny
    requests = [Request((7, 8, 9), 14, (), 70_000, 20, 60_000, 99), Request((1, 2), 9, (), 90_000, 0, 65_536, 5)]
    undisturbed = serve(tmp_path / "calm", split(folder, 3, 2), requests, CALM)
    stages = split(folder, 3, 2, Counting)
    stages[1].at = 11  # type: ignore[attr-defined]
    states = serve(tmp_path / "broken", stages, requests, CALM)
    assert states[0].tokens == undisturbed[0].tokens and states[0].attempt == 2


class Fickle(Counting):
    """A last stage whose second attempt chooses another third token for request 0."""

    def tokens(self, hidden: torch.Tensor, draws: object = ()) -> list[int]:
        ids = super().tokens(hidden, draws)  # type: ignore[arg-type]
        if len(self.seen) > self.at > 0:
            for i, draw in enumerate(draws):  # type: ignore[arg-type, var-annotated]
                if draw.index == 0 and draw.position == len(draw.request.prompt) + 1:
                    ids[i] = 77
        return ids


@pytest.mark.parametrize("parts", [1, 2])
def test_a_token_that_is_chosen_otherwise_is_not_committed_from_memory(
    tiny: Tiny, greedy: Greedy, tmp_path: Path, parts: int
) -> None:
    """What is committed is what the last attempt's own rows yield, tokens behind it included."""
    folder, model = tiny
    requests = [Request(tuple(range(5, 12)), 12), Request((3,), 20)]
    stages = [*split(folder, 3, parts)[:-1], Fickle(folder, (3 * (parts - 1) + 1) // parts if parts > 1 else 0, 3)]
    stages[-1].at = 9  # type: ignore[attr-defined]
    states = serve(tmp_path, stages, requests, CALM)
    first = greedy(model, requests[0])
    assert states[0].attempt == 3, "one broke, one diverged"
    assert list(states[0].tokens[0][:3]) == [*first[:2], 77]
    follow = Request((*requests[0].prompt, *first[:2], 77), 9)
    assert list(states[0].tokens[0][3:]) == greedy(model, follow)
    assert list(states[0].tokens[1]) == greedy(model, requests[1])


# ---- neighbours that fall silent or slow


class Dead:
    """A successor that takes everything and says nothing."""

    async def send(self, envelope: pb.Envelope) -> None:
        pass

    def drop(self, job: bytes, attempt: int) -> None:
        pass


def test_a_silent_stage_is_noticed_by_its_successor_and_so_by_stage_0(
    tiny: Tiny, tmp_path: Path, greedy: Greedy, caplog: pytest.LogCaptureFixture
) -> None:
    """The middle one dies in the first attempt; before the second, stage 0 waits until it is back."""
    folder, model = tiny
    requests = [Request(tuple(range(5, 12)), 30)]
    stages = split(folder, 3, 3)

    async def work() -> list[list[int]]:
        back = asyncio.Event()

        async def ready() -> list[Bounds]:
            if runs[0].state.attempt:
                back.set()
            return []

        with ThreadPoolExecutor(1) as compute:
            runs = wire(tmp_path, stages, requests, QUICK, compute)
            runs[0]._ready = ready
            alive = runs[1]._successor
            runs[0].start()
            while len(runs[2]._tokens[0]) < 5:
                await asyncio.sleep(0.01)
            runs[1]._successor = Dead()
            await within(60, back.wait())
            runs[1]._successor = alive
            states = await within(300, asyncio.gather(*(run.finished for run in runs)))
            assert states[0].attempt >= 2
            return [list(ids) for ids in states[0].tokens]

    assert asyncio.run(work()) == [greedy(model, requests[0])]
    assert "stage 1: silent for" in caplog.text


def test_a_hung_stage_is_noticed_though_it_beats(
    tiny: Tiny, tmp_path: Path, greedy: Greedy, caplog: pytest.LogCaptureFixture
) -> None:
    folder, model = tiny
    requests = [Request(tuple(range(5, 12)), 12)]
    stages = split(folder, 3, 3, Counting)
    hangs = stages[1].hangs = threading.Event()  # type: ignore[attr-defined]
    stages[1].at = 6  # type: ignore[attr-defined]

    async def work() -> None:
        async def ready() -> list[Bounds]:
            """As an agent asks: until nobody holds a microbatch for long. It gives up first, and computes on then."""
            while any(run.held_seconds() > QUICK.slow_seconds for run in runs):
                if runs[1]._broken:
                    hangs.set()
                await asyncio.sleep(0.1)
            return []

        with ThreadPoolExecutor(1) as a, ThreadPoolExecutor(1) as b:
            runs = wire(tmp_path, stages, requests, QUICK, a)
            runs[0]._ready = ready
            runs[1]._compute = b
            runs[0].start()
            states = await within(300, asyncio.gather(*(run.finished for run in runs)))
            assert [list(ids) for ids in states[0].tokens] == [greedy(model, requests[0])]

    try:
        asyncio.run(work())
    finally:
        hangs.set()
    assert "stage 1: has had a microbatch for" in caplog.text


def test_more_positions_than_the_tokens_chosen_are_refused_at_the_finish(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A stage 0 that goes on behind a stop id can't have that committed."""
    folder, _ = tiny
    stages = split(folder, 3, 2)
    out, _ = stages[1].forward(torch.zeros(5, 64), Batch((Piece(0, 0, 5),)), stages[1].cache())
    requests = [Request((1, 2, 3), 12, stops=(stages[1].tokens(out[2:3])[0],))]
    hidden = pb.Tensor(dtype=2, shape=[5, 64], data=bytes(256 * 5))
    rows = pb.Rows(pieces=[pb.Piece(request=0, first=0, count=5)], hidden=hidden)

    async def work() -> None:
        with ThreadPoolExecutor(1) as compute:
            runs = wire(tmp_path, stages, requests, CALM, compute)
            runs[1]._successor = Dead()
            for sequence, body in enumerate(({"rows": rows}, {"finish": pb.Finish(root=bytes(32), leaves=1)})):
                envelope = pb.Envelope(job=JOB, attempt=1, sequence=sequence, **body)
                await runs[1].receive(Peer("stage 0", "stage 0", b""), envelope)
            while "finished" not in caplog.text:
                await asyncio.sleep(0.01)
            for run in runs:
                await run.close("the test is over")

    asyncio.run(within(60, work()))
    assert "stage 0: finished, but request 0 has 5 positions and 1 tokens" in caplog.text


# ---- who may stand in for whom


def test_a_spare_is_in_a_pipeline_that_differs_in_one_worker() -> None:
    line = [Place("a", 0, 2, 5000), Place("b", 2, 4, 5000)]
    for relief, index in (
        ([Place("a", 0, 2, 5000), Place("c", 2, 4, 5000)], 1),
        ([Place("c", 0, 2, 4000), Place("b", 2, 4, 6000)], 0),
        (line, None),
        ([Place("c", 0, 2, 5000), Place("d", 2, 4, 5000)], None),
        ([Place("a", 0, 1, 5000), Place("c", 1, 4, 5000)], None),
        ([Place("c", 0, 4, 10_000)], None),
    ):
        assert place(tuple(line), tuple(relief)) == index


def test_what_breaks_while_a_ring_is_asked_for_is_told(
    tiny: Tiny, requests_batch: list[Request], tmp_path: Path
) -> None:
    """Whatever it is: else the job would stand until its deadline without a word."""
    folder, _ = tiny

    async def broken() -> Sequence[Bounds]:
        raise KeyError("a stage")

    async def work() -> None:
        with ThreadPoolExecutor(1) as compute:
            serving = Serving(max_rows=16, attempts=1)
            first, _ = wire(tmp_path, split(folder, 3, 2), requests_batch, serving, compute)
            first._ready = broken
            first.start()
            with pytest.raises(JobFailed, match="KeyError"):
                await within(20, first.finished)

    asyncio.run(work())


def test_a_stage_that_is_only_silent_is_asked_and_judged_by_its_answer(
    tiny: Tiny, tmp_path: Path, greedy: Greedy, caplog: pytest.LogCaptureFixture
) -> None:
    """Its beats are behind rows that a slow link takes long for."""
    folder, model = tiny
    requests = [Request(tuple(range(5, 12)), 12)]
    answers = [True, True, False]

    async def work() -> None:
        async def is_well() -> bool:
            if len(answers) == 1:
                alive.set_result(None)
            return answers.pop(0)

        with ThreadPoolExecutor(1) as compute:
            alive = asyncio.get_running_loop().create_future()
            runs = wire(tmp_path, split(folder, 3, 3), requests, replace(QUICK, silence_seconds=0.5), compute)
            runs[2]._is_well = is_well
            runs[0].start()
            while len(runs[2]._tokens[0]) < 2:
                await asyncio.sleep(0.01)
            link, runs[1]._successor = runs[1]._successor, Dead()
            await alive
            assert "silent for" not in caplog.text
            runs[1]._successor = link
            states = await within(300, asyncio.gather(*(run.finished for run in runs)))
            assert [list(ids) for ids in states[0].tokens] == [greedy(model, requests[0])] and states[0].attempt == 2

    asyncio.run(work())
    assert not answers and "stage 1: silent for" in caplog.text
