"""The demo's scenarios: who plays, and what must come of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class Ending(StrEnum):
    """How a job ended, as the chain's events tell it."""

    PAID = "paid"
    SLASHED = "slashed"  # a stage was convicted by what was shown or proved
    FLAGGED = "flagged"  # a stage was convicted by its clock
    BOND_LOST = "bond_lost"  # a challenger lost its game
    REFUNDED = "refunded"
    UNFINISHED = "unfinished"


LAST = -1


@dataclass(frozen=True)
class Scenario:
    """role: the dishonest worker's (deploy/demo/players.py), at `stage`; accused: a false challenger joins."""

    name: str
    title: str
    expected: Ending
    role: str = "honest"
    stage: int = 1
    accused: bool = False
    movable: bool = True


SCENARIOS = (
    Scenario("a", "an honest batch", Ending.PAID, movable=False),
    Scenario("b", "int8 weights in place of the registered ones", Ending.SLASHED, "quantised"),
    Scenario("c", "one token's hidden state altered", Ending.SLASHED, "altering"),
    Scenario("d", "a token that the law does not allow", Ending.SLASHED, "choosing", LAST, movable=False),
    Scenario("e", "a false execution trace in the game", Ending.SLASHED, "lying"),
    Scenario("f", "silence in the game", Ending.FLAGGED, "silent"),
    Scenario("g", "a false accusation of an honest batch", Ending.BOND_LOST, accused=True, movable=False),
    Scenario("h", "a stage that never commits", Ending.REFUNDED, "mute"),
)


def select(only: str | None, stage: int | None, stages: int) -> list[Scenario]:
    """The scenarios to run, those that can move at `stage`.

    Raises ValueError for an unknown name, no stage, or a stage for the one scenario that stays where it is.
    """
    names = [scenario.name for scenario in SCENARIOS]
    if only is not None and only not in names:
        raise ValueError(f"expected a scenario of {', '.join(names)}, got {only!r}")
    chosen = [scenario for scenario in SCENARIOS if only in (None, scenario.name)]
    if stage is not None and not any(scenario.movable for scenario in chosen):
        movable = ", ".join(scenario.name for scenario in SCENARIOS if scenario.movable)
        raise ValueError(f"expected no stage for scenario {only}, got {stage}: only {movable} can move")
    if stage is not None and not 0 <= stage < stages:
        raise ValueError(f"expected a stage below {stages}, got {stage}")
    return [
        replace(scenario, stage=stage if stage is not None and scenario.movable else scenario.stage % stages)
        for scenario in chosen
    ]
