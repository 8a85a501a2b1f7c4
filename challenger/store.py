"""What a watchtower must not forget: how far it has read, what it audited, and its games.

The salt and the segment of a challenge are stored together with the audit's result, before anything about it is sent:
a process killed in between resumes the same challenge and never pays for a second one.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

from sqlalchemy import JSON, BigInteger, LargeBinary, String, create_engine, func, select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column


class Base(DeclarativeBase):
    pass


class JobState(enum.StrEnum):
    WATCHED = "watched"  # committed, not audited yet
    CLEAN = "clean"
    WITHHELD = "withheld"  # its data is being demanded on chain; the receipt says since which block
    SUSPECT = "suspect"  # a challenge was decided on
    UNJUDGED = "unjudged"  # not all of it could be judged, and nothing wrong was seen; the receipt says why


class GameState(enum.StrEnum):
    PLANNED = "planned"  # salt stored, nothing sent
    COMMITTED = "committed"
    OPEN = "open"
    WON = "won"  # the job's stake is not shared out yet
    CLOSED = "closed"  # won, and the stake shared out
    LOST = "lost"
    DROPPED = "dropped"  # never opened; the note says why


LIVE = (GameState.PLANNED, GameState.COMMITTED, GameState.OPEN)


class JobRow(Base):
    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(String(66), primary_key=True)
    window_end: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[str] = mapped_column(String(16), default=JobState.WATCHED)
    attempts: Mapped[int] = mapped_column(default=0)
    receipt: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)


class GameRow(Base):
    __tablename__ = "games"
    id: Mapped[str] = mapped_column(String(66), primary_key=True)  # the commitment
    job: Mapped[str] = mapped_column(String(66), index=True)
    segment: Mapped[dict[str, Any]] = mapped_column(JSON)
    salt: Mapped[bytes] = mapped_column(LargeBinary(32))
    block: Mapped[int] = mapped_column(BigInteger)  # nothing about it is on chain before
    state: Mapped[str] = mapped_column(String(16), default=GameState.PLANNED)
    evidence: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    note: Mapped[str] = mapped_column(String, default="")


class CursorRow(Base):
    __tablename__ = "cursor"
    name: Mapped[str] = mapped_column(String(16), primary_key=True)
    block: Mapped[int] = mapped_column(BigInteger)


class Store:
    """One database; every method is one transaction."""

    def __init__(self, url: str) -> None:
        self._engine: Engine = create_engine(url)
        Base.metadata.create_all(self._engine)

    def close(self) -> None:
        self._engine.dispose()

    def next_block(self, default: int) -> int:
        """Where to read on: behind what was read, but not behind the beginning of a live game or of demands, whose
        state is in the chain's events alone.
        """
        with Session(self._engine) as session:
            row = session.get(CursorRow, "chain")
            games = session.scalar(select(func.min(GameRow.block)).where(GameRow.state.in_(LIVE)))
            withheld = select(JobRow.receipt).where(JobRow.state == JobState.WITHHELD)
            demands = [int(receipt["block"]) for receipt in session.scalars(withheld)]
        return min(block for block in (row.block if row else default, games, *demands) if block is not None)

    def advance(self, block: int, committed: Sequence[tuple[str, int]]) -> None:
        """Moves the cursor to `block` and notes the jobs (id, window end) committed before it, in one transaction."""
        with Session(self._engine) as session, session.begin():
            for job, window_end in committed:
                if session.get(JobRow, job) is None:
                    session.add(JobRow(id=job, window_end=window_end))
            session.merge(CursorRow(name="chain", block=block))

    def due(self) -> list[JobRow]:
        """Jobs to audit, the one whose window ends first in front."""
        return self.jobs(JobState.WATCHED)

    def job(self, job: str) -> JobRow | None:
        with Session(self._engine, expire_on_commit=False) as session:
            return session.get(JobRow, job)

    def jobs(self, *states: JobState) -> list[JobRow]:
        with Session(self._engine, expire_on_commit=False) as session:
            found = select(JobRow).where(JobRow.state.in_(states)).order_by(JobRow.window_end)
            return list(session.scalars(found))

    def judged(self, job: str, state: JobState, receipt: dict[str, Any], games: Sequence[GameRow] = ()) -> None:
        """An audit's result, with the challenges that it leads to."""
        with Session(self._engine) as session, session.begin():
            row = session.get_one(JobRow, job)
            row.state, row.receipt = state, receipt
            session.add_all(games)

    def attempted(self, job: str) -> int:
        """Counts one more failed attempt at an audit; returns how many there were."""
        with Session(self._engine) as session, session.begin():
            row = session.get_one(JobRow, job)
            row.attempts += 1
            return row.attempts

    def games(self, *states: GameState) -> list[GameRow]:
        with Session(self._engine, expire_on_commit=False) as session:
            return list(session.scalars(select(GameRow).where(GameRow.state.in_(states)).order_by(GameRow.id)))

    def games_of(self, job: str) -> list[GameRow]:
        with Session(self._engine, expire_on_commit=False) as session:
            return list(session.scalars(select(GameRow).where(GameRow.job == job).order_by(GameRow.id)))

    def mark(self, game: str, state: GameState, note: str = "") -> None:
        with Session(self._engine) as session, session.begin():
            row = session.get_one(GameRow, game)
            row.state, row.note = state, note or row.note
