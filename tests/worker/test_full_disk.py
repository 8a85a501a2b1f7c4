"""A disk that is full, for real, under a stage's traces and its state."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.worker.pipeline_in_process import JOB, Greedy, Tiny, serve, split, wire, within
from tests.worker.small_disk import fill, small_disk
from tests.worker.test_consent import WORK
from verifier.commit import Request
from worker.admission import check_disk
from worker.config import Serving
from worker.errors import JobFailed, Refused
from worker.job import JobFolder, JobState, Phase
from worker.repeat import RepeatableStage
from worker.retain import position_bytes
from worker.room import Room
from worker.stage import Stage


@pytest.mark.parametrize("stage", [0, 1])
def test_a_full_disk_fails_its_job_with_the_reason_and_the_others_are_served(
    tiny: Tiny, requests_batch: list[Request], greedy: Greedy, tmp_path: Path, stage: int
) -> None:
    folder, model = tiny

    async def work() -> list[JobState]:
        with ThreadPoolExecutor(1) as compute:
            stages = split(folder, 3, 2)
            serving = Serving(max_rows=16, attempts=2)
            failing = wire(tmp_path / "full", stages, requests_batch, serving, compute)
            served = wire(tmp_path / "roomy", stages, requests_batch, serving, compute)
            fill(tmp_path / "full" / str(stage) / "filler")
            for run in (*failing, *served):
                run.start()
            with pytest.raises(JobFailed, match="No space left on device"):
                await within(300, failing[0].finished)
            assert failing[0].state.phase is Phase.FAILED and "No space left on device" in failing[0].state.reason
            states = list(await within(300, asyncio.gather(*(run.finished for run in served))))
            await failing[1].close("the test is over")
            return states

    with small_disk(tmp_path / "full" / str(stage), 2**16):
        states = asyncio.run(work())
    assert [list(ids) for ids in states[1].tokens] == [greedy(model, request) for request in requests_batch]


def test_what_is_sealed_waits_for_a_full_disk(
    tiny: Tiny, requests_batch: list[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is served and signed then, and there is no other attempt: the last words need a few bytes, not the job."""
    monkeypatch.setattr("worker.job.DISK_SECONDS", 0.05)
    data = tmp_path / "data"
    save, taken = JobFolder.save_state, asyncio.Event()

    def full_behind_the_seal(self: JobFolder, state: JobState) -> None:
        save(self, state)
        if state.phase is Phase.SEALED and not taken.is_set():
            fill(data / "filler")
            taken.set()

    monkeypatch.setattr(JobFolder, "save_state", full_behind_the_seal)

    async def work() -> JobState:
        with ThreadPoolExecutor(1) as compute:
            (run,) = wire(data, split(tiny[0], 3, 1), requests_batch, Serving(max_rows=16), compute)
            run.start()
            await within(300, taken.wait())
            while "No space left on device" not in run.state.reason:
                await asyncio.sleep(0.01)
            assert run.state.phase is Phase.SEALED and not run.finished.done()
            (data / "filler").unlink()
            return await within(60, run.finished)

    with small_disk(data, 2**20):
        state = asyncio.run(work())
        assert JobFolder(data / "0", JOB).load_state() == state
    assert state.phase is Phase.FINISHED and state.reason == "" and state.attempt == 1


@pytest.mark.parametrize("retain", ["store", "regenerate"])
def test_what_a_signature_is_about_is_on_disk_before_it_is_given(
    tiny: Tiny, requests_batch: list[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retain: str
) -> None:
    """Contents and names, by the order of what is flushed: a power cut leaves what was, and that alone."""
    flushed: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "fsync", noted)
    stages = split(tiny[0], 3, 2, RepeatableStage if retain == "regenerate" else Stage)
    serve(tmp_path, stages, requests_batch, Serving(max_rows=16, retain=retain))
    last = {name: place for place, name in enumerate(flushed)}
    assert last[JOB.hex()] > last["state.json.part"]
    assert flushed.count(JOB.hex()) == sum(name in ("state.json.part", "requests.json.part") for name in flushed)
    kept = "inputs.safetensors" if retain == "regenerate" else "safetensors.part"
    assert flushed.count("roots.part") == 2 and last["roots.part"] < last["state.json.part"]
    for r in range(len(requests_batch)):
        assert sum(name.startswith(f"{r}.{kept}") for name in flushed) == (1 if retain == "regenerate" else 2)


def test_what_a_crash_left_of_an_attempt_is_gone_before_the_next(
    tiny: Tiny, requests_batch: list[Request], tmp_path: Path
) -> None:
    """It takes the next one's room; inputs that another setting kept would be told as this attempt's."""
    folder = JobFolder(tmp_path / "0", JOB)
    folder.path.mkdir(parents=True)
    for name in ("0.safetensors", "0.inputs.safetensors", "1.safetensors.part", "1.safetensors.4711.part"):
        (folder.path / name).write_bytes(b"of an attempt that a crash ended")
    serve(tmp_path, split(tiny[0], 3, 1), requests_batch)
    names = {path.name for path in folder.path.glob("*.safetensors*")}
    assert names == {f"{r}.safetensors" for r in range(len(requests_batch))}


@pytest.mark.parametrize("retain", ["store", "regenerate"])
def test_the_room_of_traces_is_known_before_they_are_there(
    tiny: Tiny, requests_batch: list[Request], tmp_path: Path, retain: str
) -> None:
    kind = RepeatableStage if retain == "regenerate" else Stage
    stages = split(tiny[0], 3, 2, kind)
    states = serve(tmp_path, stages, requests_batch, Serving(max_rows=16, retain=retain))
    for i, (stage, state) in enumerate(zip(stages, states, strict=True)):
        stored = sum(path.stat().st_size for path in (tmp_path / str(i)).rglob("*.safetensors"))
        bare = sum(node.positions for node in state.nodes) * position_bytes(stage, retain)
        assert bare <= stored <= bare + len(requests_batch) * 4096


def test_a_job_whose_traces_have_no_room_is_refused() -> None:
    check_disk(1000, 1000)
    with pytest.raises(Refused, match="disk: expected 1001 bytes free for traces, 1000 are"):
        check_disk(1001, 1000)


def test_more_jobs_at_a_time_than_there_is_room_for_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    """Each has a cache and a queue of its own, and all share one thread: a crowd would take the memory of those."""
    room = Room(Stage(tiny[0], 0, 3), Serving(max_jobs=2), tmp_path)
    room.check_jobs([WORK, WORK])
    with pytest.raises(Refused, match="jobs: expected at most 2 at a time, came 3"):
        room.check_jobs([WORK, WORK, WORK])
