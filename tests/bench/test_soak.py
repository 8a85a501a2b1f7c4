"""What the soak calls flat, on memory whose growth is known."""

import pytest

from bench.soak import FLAT_BYTES_A_TOKEN, Sample, row, slope

TOKENS_A_JOB = 2048


def samples(bytes_a_job: float, noise: int = 0, jobs: int = 40) -> list[Sample]:
    """A process that keeps so much of each job, and whose allocator goes up and down."""
    return [
        Sample(j * TOKENS_A_JOB, float(j), 10**9 + int(j * bytes_a_job) + (noise if j % 3 else 0), 0, 9, 9, 0)
        for j in range(jobs)
    ]


@pytest.mark.parametrize(
    ("bytes_a_job", "flat"),
    [(0, True), (-5000, True), (30_000, True), (36 * TOKENS_A_JOB + 1000, False), (100_000, False)],
)
def test_a_process_is_flat_unless_it_keeps_the_ids_of_its_tokens(bytes_a_job: int, flat: bool) -> None:
    found = row("stage0", samples(bytes_a_job, noise=200_000))
    assert found["flat"] is flat
    assert abs(found["bytes_a_job"] - bytes_a_job) < 3000
    assert abs(found["bytes_a_token"] * TOKENS_A_JOB - bytes_a_job) < 3000


def test_one_step_of_the_allocator_is_no_growth() -> None:
    stepped = [
        Sample(s.tokens, s.seconds, s.resident_bytes + (20 * 2**20 if s.tokens > 70_000 else 0), 0, 9, 9, 0)
        for s in samples(0)
    ]
    assert row("stage0", stepped)["flat"] and slope([1], [5]) == 0.0
    assert FLAT_BYTES_A_TOKEN * TOKENS_A_JOB < 100_000
