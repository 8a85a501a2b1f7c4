"""The tables of a watchtower's database, as the newest migration leaves them."""

from __future__ import annotations

import enum
from typing import Any

from sqlalchemy import JSON, BigInteger, LargeBinary, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


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


class MoveState(enum.StrEnum):
    SENT = "sent"  # or about to be: its fate is not known
    MINED = "mined"
    DEAD = "dead"  # another transaction took its nonce


class JobRow(Base):
    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(String(66), primary_key=True)
    window_end: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[str] = mapped_column(String(16), default=JobState.WATCHED, index=True)
    attempts: Mapped[int] = mapped_column(default=0)
    receipt: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    block: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")  # of its commitment


class GameRow(Base):
    __tablename__ = "games"
    id: Mapped[str] = mapped_column(String(66), primary_key=True)  # the commitment
    job: Mapped[str] = mapped_column(String(66), index=True)
    segment: Mapped[dict[str, Any]] = mapped_column(JSON)
    salt: Mapped[bytes] = mapped_column(LargeBinary(32))
    block: Mapped[int] = mapped_column(BigInteger)  # nothing about it is on chain before
    state: Mapped[str] = mapped_column(String(16), default=GameState.PLANNED, index=True)
    evidence: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    note: Mapped[str] = mapped_column(String, default="")
    ended: Mapped[int | None] = mapped_column(BigInteger)  # the block that it was over in


class MoveRow(Base):
    """A signed transaction. number: counts the transactions of an account, replacements included."""

    __tablename__ = "moves"
    hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    chain: Mapped[int] = mapped_column(BigInteger)
    account: Mapped[str] = mapped_column(String(42))
    nonce: Mapped[int] = mapped_column(BigInteger)
    number: Mapped[int] = mapped_column(BigInteger)
    label: Mapped[str] = mapped_column(String(64))
    raw: Mapped[bytes] = mapped_column(LargeBinary)
    state: Mapped[str] = mapped_column(String(8), default=MoveState.SENT, index=True)
    block: Mapped[int | None] = mapped_column(BigInteger)


class EvidenceRow(Base):
    """A file of a job's folder, as it was when it had been checked against the roots on chain."""

    __tablename__ = "evidence"
    job: Mapped[str] = mapped_column(String(66), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))


class BlockRow(Base):
    """A block that was read, of the last few."""

    __tablename__ = "blocks"
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    hash: Mapped[str] = mapped_column(String(64))


class CursorRow(Base):
    __tablename__ = "cursor"
    name: Mapped[str] = mapped_column(String(16), primary_key=True)
    block: Mapped[int] = mapped_column(BigInteger)
