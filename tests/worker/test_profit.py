"""The pricing bar."""

import pytest

from worker.errors import ConfigError
from worker.profit import Prices, bar, earnings, text


def test_the_bar_is_deserves() -> None:
    wanted = bar(8, Prices())
    assert round(wanted.dollars_per_day, 2) == 6.56
    assert round(wanted.tokens_per_day / 1e6, 1) == 21.9
    assert round(wanted.tokens_per_second) == 253
    assert round(earnings(1071, 8, Prices()).times, 2) == 4.23
    told = text(1071, 8, Prices())
    assert "253 tokens per second" in told and "serving: 1071.0 tokens per second" in told
    assert text(None, 8, Prices()) == told.splitlines()[0]


def test_power_is_paid_first() -> None:
    made = earnings(1000, 2, Prices(per_million_tokens=1.0, power_per_day=3.0))
    assert (round(made.revenue, 6), made.power, round(made.profit, 6)) == (86.4, 6.0, 80.4)


@pytest.mark.parametrize("wrong", [{"per_million_tokens": 0.0}, {"elsewhere_per_day": -1.0}])
def test_prices_that_cannot_be_meant_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expected dollars"):
        Prices(**wrong)
    with pytest.raises(ConfigError, match="expected one or more"):
        bar(0, Prices())
    with pytest.raises(ConfigError, match="expected 0 or more"):
        earnings(float("nan"), 1, Prices())
