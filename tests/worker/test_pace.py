"""How many microbatches fill the ring."""

import math

import pytest

from worker.pace import MARGIN, MOST, Pace


def test_it_begins_with_one_for_each_stage_and_one_on_the_way() -> None:
    assert [Pace(n).microbatches for n in (2, 8)] == [3, 9]


@pytest.mark.parametrize(("latency", "needed"), [(0.0, 8), (0.016, 15), (0.064, 34), (0.256, 111)])
def test_it_fills_eight_stages_of_20_ms(latency: float, needed: int) -> None:
    """M* = ceil(N (1 + L / T))."""
    pace = Pace(8)
    pace.returned(8 * (0.02 + latency), 8 * 0.02, 0.02)
    assert pace.groups == pytest.approx(needed, abs=1)  # rounding of floats
    assert pace.microbatches == pytest.approx(MARGIN * needed, abs=1)


def test_waiting_in_queues_is_not_taken_for_latency() -> None:
    pace = Pace(4)
    pace.returned(0.5, 0.2, 0.05)
    before = pace.microbatches
    for _ in range(100):
        pace.returned(5.0, 0.2, 0.05)
    assert pace.microbatches == before


def test_it_follows_stage_times() -> None:
    """Prefill is slower than decoding: fewer microbatches fill the ring then."""
    pace = Pace(2)
    pace.returned(2.2, 0.2, 0.1)
    assert pace.groups == 22
    for _ in range(200):
        pace.returned(2.02, 0.02, 0.01)
    assert pace.groups == 202


@pytest.mark.parametrize("times", [(1.0, 0.0, 0.0), (1e9, 0.0, 1e-9), (0.1, 5.0, 0.0)])
def test_what_a_stage_tells_is_bounded(times: tuple[float, float, float]) -> None:
    pace = Pace(2)
    pace.returned(*times)
    assert 1 <= pace.groups <= pace.microbatches <= MOST and math.isfinite(pace.slowest_seconds)


def test_a_given_number_is_kept() -> None:
    pace = Pace(3, fixed=5)
    pace.returned(10.0, 0.1, 0.05)
    assert (pace.groups, pace.microbatches) == (5, 5)
    assert Pace(1).microbatches == 1


def test_nonsense_is_refused() -> None:
    for wrong in ((0, 0), (2, -1)):
        with pytest.raises(ValueError, match="expected one stage or more"):
            Pace(*wrong)
