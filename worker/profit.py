"""What serving earns, against what the same machines earn elsewhere: `plumb profit`.

The bar is DeServe's: eight RTX 4090 that mine make 8 x 0.82 = 6.56 dollars a day, which at 0.30 dollars a million
tokens are 21.9 million tokens a day, 253 a second.
"""

import math
from dataclasses import dataclass

from worker.errors import ConfigError

DAY_SECONDS = 86_400


@dataclass(frozen=True)
class Prices:
    """Dollars. `elsewhere` is what one device earns in a day of the other work, its power already paid."""

    per_million_tokens: float = 0.30
    elsewhere_per_day: float = 0.82
    power_per_day: float = 0.0  # of one device, serving

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not math.isfinite(value) or value < 0 or (name == "per_million_tokens" and value == 0):
                raise ConfigError(f"{name}: expected dollars, 0 or more (a price above 0), came {value}")


@dataclass(frozen=True)
class Bar:
    """What a ring must make to pay as well as the other work."""

    dollars_per_day: float
    tokens_per_day: float
    tokens_per_second: float


@dataclass(frozen=True)
class Earnings:
    """Of a whole ring, a day; `times` is what it makes over what the bar asks for."""

    revenue: float
    power: float
    profit: float
    times: float


def bar(devices: int, prices: Prices) -> Bar:
    """Raises ConfigError."""
    if devices < 1:
        raise ConfigError(f"devices: expected one or more, came {devices}")
    dollars = devices * (prices.elsewhere_per_day + prices.power_per_day)
    tokens = dollars / prices.per_million_tokens * 1e6
    return Bar(dollars, tokens, tokens / DAY_SECONDS)


def earnings(tokens_per_second: float, devices: int, prices: Prices) -> Earnings:
    """Raises ConfigError."""
    if not math.isfinite(tokens_per_second) or tokens_per_second < 0:
        raise ConfigError(f"tokens per second: expected 0 or more, came {tokens_per_second}")
    wanted = bar(devices, prices).tokens_per_second
    revenue = tokens_per_second * DAY_SECONDS * prices.per_million_tokens / 1e6
    power = devices * prices.power_per_day
    times = tokens_per_second / wanted if wanted else math.inf
    return Earnings(revenue, power, revenue - power, times)


def text(tokens_per_second: float | None, devices: int, prices: Prices) -> str:
    """For people; the bar alone where no speed is given. Raises ConfigError."""
    wanted = bar(devices, prices)
    told = (
        f"the bar: {devices} devices earn {wanted.dollars_per_day:.2f} $/day elsewhere; at "
        f"{prices.per_million_tokens:.2f} $ a million that is {wanted.tokens_per_day / 1e6:.1f} M tokens/day, "
        f"{wanted.tokens_per_second:.0f} tokens per second"
    )
    if tokens_per_second is None:
        return told
    made = earnings(tokens_per_second, devices, prices)
    return told + (
        f"\nserving: {tokens_per_second:.1f} tokens per second earn {made.revenue:.2f} $/day, "
        f"{made.profit:.2f} after power; {made.times:.2f} times the bar"
    )
