"""What became of a job, read from the chain's events alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from contracts.events import Event, GameEnded, GameMoved, JobPaid, JobRefunded, JobReleased, StageConvicted
from deploy.demo.scenarios import Ending
from verifier.game import Segment

FLAG = 2
NOBODY = 255


@dataclass(frozen=True)
class Outcome:
    """stage: the convicted one, or the one that was accused in vain. segment: what a game was about."""

    ending: Ending
    stage: int | None
    segment: Segment | None


def events_of(events: Sequence[Event], job: bytes) -> list[Event]:
    """Those that concern one job."""
    return [event for event in events if job in (getattr(event, "id", None), getattr(event, "job", None))]


def outcome(story: Sequence[Event]) -> Outcome:
    """story: the events of one job, in order."""
    segments = {event.id: event.game.segment for event in story if isinstance(event, GameMoved)}
    ends = [event for event in story if isinstance(event, GameEnded)]
    for conviction in (event for event in story if isinstance(event, StageConvicted)):
        end = next(event for event in ends if event.convicted == conviction.stage)
        ending = Ending.FLAGGED if end.reason == FLAG else Ending.SLASHED
        return Outcome(ending, conviction.stage, segments.get(end.id))
    for end in ends:
        if end.convicted == NOBODY:
            return Outcome(Ending.BOND_LOST, end.stage, segments.get(end.id))
    for event in story:
        if isinstance(event, JobPaid):
            return Outcome(Ending.PAID, None, None)
        if isinstance(event, JobRefunded):
            return Outcome(Ending.REFUNDED, None, None)
    return Outcome(Ending.UNFINISHED, None, None)


def is_final(story: Sequence[Event]) -> bool:
    """Whether all money has found its place."""
    return any(isinstance(event, JobPaid | JobRefunded | JobReleased) for event in story)
