"""What a stage is sent that it can't serve: each refused with its reason, by HTTP or over the wire, while other jobs of
the same pipeline are served. Real parts: a chain, agents with their HTTP and gRPC doors, a disk that is full.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from contracts.client import Status
from deploy.devnet import Devnet
from tests.worker.pipeline_in_process import Greedy, Tiny, within
from tests.worker.small_disk import fill, small_disk
from tests.worker.village import Village
from verifier.commit import Request, make_outputs, outputs_root

CACHE_POSITIONS = 120
GOOD = Request((5, 6, 7, 8, 9), 12)


@pytest.fixture
def village(tiny: Tiny, tmp_path: Path) -> Iterator[Village]:
    folder, _ = tiny
    with Devnet() as devnet:
        made = Village(devnet, tmp_path, folder)
        made.settle_in()
        made.configs = [
            replace(config, serving=replace(config.serving, cache_positions=CACHE_POSITIONS)) for config in made.configs
        ]
        yield made


async def served(village: Village, id: bytes, expected: list[list[int]], requests: list[Request]) -> None:
    await village.reaches(id, Status.COMMITTED)
    assert village.requester.escrow.outputs(id)[0] == outputs_root(make_outputs(expected, requests))


async def reason(village: Village, stage: int, id: bytes, part: str) -> str:
    """What the stage says of the job, once it holds `part`."""
    for _ in range(600):
        state = (await village.get(stage, f"/jobs/{id.hex()}")).json()
        if part in state["reason"]:
            return str(state["reason"])
        await asyncio.sleep(0.1)
    raise AssertionError(f"expected {part!r}, it says {state}")


def test_prompts_that_can_not_be_served_are_refused_and_the_others_served(
    village: Village, tiny: Tiny, greedy: Greedy
) -> None:
    _, model = tiny
    expected = [greedy(model, GOOD)]

    async def story() -> None:
        await village.wake()
        assert (await village.get(0, "/info")).json()["max_positions"] == CACHE_POSITIONS
        first = await village.open([GOOD])
        for bad, why in (
            (replace(GOOD, prompt=()), "request 1: expected a prompt of 1 token or more, got none"),
            (replace(GOOD, limit=0), "request 1: expected a limit of 1 token or more, got 0"),
            (
                replace(GOOD, prompt=(1,) * 117),
                "request 1: expected prompt and limit within 128 positions, got 117 + 12",
            ),
            (
                replace(GOOD, prompt=(1,) * 109),
                f"request 1: expected prompt and limit within the {CACHE_POSITIONS} positions kept here, came 109 + 12",
            ),
            (replace(GOOD, prompt=(1, 211)), "request 1: expected prompt ids below 211, got 211 at 1"),
            (replace(GOOD, stops=(300,)), "request 1: expected stop ids below 211, got 300 at 0"),
        ):
            # The job names these very prompts (of none there is no root): they aren't refused for being others.
            job = village.job([GOOD, bad if bad.prompt else GOOD])
            id = await asyncio.to_thread(village.requester.escrow.open, job)
            answer = await village.send(id, [GOOD, bad])
            assert (answer.status_code, answer.json()) == (409, {"error": why})
        last = await village.open([replace(GOOD, prompt=(1,) * 108)])
        await served(village, first, expected, [GOOD])
        await village.reaches(last, Status.COMMITTED)
        await village.sleep()

    asyncio.run(within(900, story()))


def test_a_stage_with_less_room_than_the_first_refuses_with_its_reason(village: Village) -> None:
    """Who has not the room is named at stage 0, which told the requester nothing of it."""
    small = village.configs[1]
    village.configs[1] = replace(small, serving=replace(small.serving, cache_positions=16))

    async def story() -> None:
        await village.wake()
        id = await village.open([GOOD])
        told = await reason(village, 0, id, "positions kept here")
        assert told.startswith("stage 1 (0x") and "refuses: request 0: expected prompt and limit within the 16" in told
        assert village.requester.escrow.status(id) is Status.OPEN
        fits = await village.open([replace(GOOD, limit=11)] * 3)  # one after the other: the first knows of its room
        await village.reaches(fits, Status.COMMITTED)
        assert (await village.get(0, f"/jobs/{fits.hex()}")).json()["attempt"] == 1
        await village.sleep()

    asyncio.run(within(900, story()))


@pytest.mark.parametrize("stage", [0, 1])
def test_a_disk_that_fills_up_fails_its_jobs_with_the_reason_and_later_ones_are_served(
    village: Village, tiny: Tiny, greedy: Greedy, stage: int
) -> None:
    _, model = tiny
    expected = [greedy(model, GOOD)]
    village.configs[0] = replace(village.configs[0], serving=replace(village.configs[0].serving, attempts=2))
    data = village.configs[stage].data

    async def story() -> None:
        await village.wake()
        large = [replace(GOOD, prompt=(r,) * 8, limit=100) for r in range(16)]
        id = await village.open(large)
        told = await reason(village, 0, id, "disk: expected ")
        assert told.endswith("are") and told.startswith("stage 1 (0x" if stage else "disk: expected")
        assert village.requester.escrow.status(id) is Status.OPEN

        id = await village.open(large[:2])  # fits; then something else takes the disk, to its last byte
        while not any((await village.get(1, f"/jobs/{id.hex()}/tokens")).json()["tokens"]):
            await asyncio.sleep(0.02)
        fill(data / "filler")
        told = await reason(village, 0, id, "No space left on device")
        assert stage == 0 or "a stage gave up: " in told
        assert (await village.get(0, f"/jobs/{id.hex()}")).json()["phase"] == "failed"
        fill(data / "more")  # what the attempts had written
        none = await asyncio.to_thread(village.requester.escrow.open, village.job([GOOD]))
        answer = await village.send(none, [GOOD])
        assert stage or (answer.status_code == 507 and "No space left on device" in answer.json()["error"])

        assert not list(data.rglob("*.safetensors*"))  # it makes room for others
        (data / "filler").unlink()
        (data / "more").unlink()
        later = await village.open([GOOD])
        await served(village, later, expected, [GOOD])
        await village.sleep()

    with small_disk(data, 2**20):
        asyncio.run(within(900, story()))
