"""What a watchtower must not forget: how far it has read, what it audited, its games, its moves and its evidence.

The salt and the segment of a challenge are stored together with the audit's result, before anything about it is sent,
and every transaction before it is sent: a process killed in between resumes the same challenge, sends the same bytes,
and never pays for a second one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from challenger.database import open_database
from challenger.schema import (
    BlockRow,
    CursorRow,
    EvidenceRow,
    GameRow,
    GameState,
    JobRow,
    JobState,
    MoveRow,
    MoveState,
)
from contracts.transport import Signed

__all__ = ["LIVE", "GameRow", "GameState", "JobRow", "JobState", "Journal", "Store"]

LIVE = (GameState.PLANNED, GameState.COMMITTED, GameState.OPEN)


class Store:
    """One database; every method is one transaction, of any thread."""

    def __init__(self, url: str) -> None:
        """Raises StoreError."""
        self._engine: Engine = open_database(url)

    def close(self) -> None:
        self._engine.dispose()

    # ---- reading the chain

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

    def advance(
        self, block: int, committed: Iterable[tuple[str, int, int]], seen: Mapping[int, bytes] | None = None
    ) -> None:
        """Moves the cursor to `block` and notes the jobs (id, window end, block) committed before it, with the hashes
        of blocks that were `seen`, in one transaction.
        """
        with Session(self._engine) as session, session.begin():
            for job, window_end, at in committed:
                row = session.get(JobRow, job)
                if row is None:
                    session.add(JobRow(id=job, window_end=window_end, block=at))
                elif at > row.block:  # the chain was reorganised
                    row.window_end, row.block = window_end, at
            session.merge(CursorRow(name="chain", block=block))
            for number, hash in (seen or {}).items():
                session.merge(BlockRow(number=number, hash=hash.hex()))

    def seen(self) -> dict[int, bytes]:
        """Hashes of the last blocks that were read, newest first."""
        with Session(self._engine) as session:
            rows = session.scalars(select(BlockRow).order_by(BlockRow.number.desc()))
            return {row.number: bytes.fromhex(row.hash) for row in rows}

    def unsee(self, below: int) -> None:
        """Forgets hashes of blocks before `below`."""
        with Session(self._engine) as session, session.begin():
            session.execute(delete(BlockRow).where(BlockRow.number < below))

    def rewind(self, block: int) -> list[str]:
        """The chain has other blocks from `block` on. Jobs committed there are forgotten until they are committed
        again, unless games were decided on; games that ended there are open again, and those that others made needless
        there are due again. Returns the jobs that are forgotten.
        """
        with Session(self._engine) as session, session.begin():
            session.execute(delete(BlockRow).where(BlockRow.number >= block))
            row = session.get(CursorRow, "chain")
            if row is not None:
                row.block = min(row.block, block)
            over = update(GameRow).where(GameRow.ended >= block, GameRow.state.in_((GameState.WON, GameState.LOST)))
            session.execute(over.values(state=GameState.OPEN, ended=None))
            needless = update(GameRow).where(GameRow.ended >= block, GameRow.state == GameState.DROPPED)
            session.execute(needless.values(state=GameState.PLANNED, ended=None))
            busy = select(GameRow.job)
            again = select(JobRow).where(
                JobRow.block >= block,
                JobRow.state.in_((JobState.WATCHED, JobState.CLEAN, JobState.UNJUDGED)),
                JobRow.id.not_in(busy),
            )
            jobs = list(session.scalars(again))
            for job in jobs:
                session.delete(job)
            return [job.id for job in jobs]

    # ---- jobs

    def due(self) -> list[JobRow]:
        """Jobs to audit, the one whose window ends first in front."""
        return self.jobs(JobState.WATCHED)

    def job(self, job: str) -> JobRow | None:
        with Session(self._engine, expire_on_commit=False) as session:
            return session.get(JobRow, job)

    def jobs(self, *states: JobState) -> list[JobRow]:
        with Session(self._engine, expire_on_commit=False) as session:
            found = select(JobRow).where(JobRow.state.in_(states)).order_by(JobRow.window_end, JobRow.id)
            return list(session.scalars(found))

    def judged(self, job: str, state: JobState, receipt: dict[str, Any], games: Sequence[GameRow] = ()) -> None:
        """An audit's result, with the challenges that it leads to. Demands, if that is what follows, have attempts of
        their own.
        """
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            row = session.get_one(JobRow, job)
            row.state, row.receipt = state, receipt
            if state == JobState.WITHHELD:
                row.attempts = 0
            session.add_all(games)

    def watch_again(self, job: str, note: str) -> None:
        """What was decided on a job stands on nothing any more: games that were not opened are dropped, and it is
        audited once more.
        """
        with Session(self._engine) as session, session.begin():
            row = session.get_one(JobRow, job)
            row.state, row.attempts, row.receipt = JobState.WATCHED, 0, {}
            unopened = (GameState.PLANNED, GameState.COMMITTED)
            for game in session.scalars(select(GameRow).where(GameRow.job == job, GameRow.state.in_(unopened))):
                game.state, game.note = GameState.DROPPED, note

    def attempted(self, job: str) -> int:
        """Counts one more failed attempt at an audit; returns how many there were."""
        with Session(self._engine) as session, session.begin():
            row = session.get_one(JobRow, job)
            row.attempts += 1
            return row.attempts

    # ---- games

    def games(self, *states: GameState) -> list[GameRow]:
        with Session(self._engine, expire_on_commit=False) as session:
            return list(session.scalars(select(GameRow).where(GameRow.state.in_(states)).order_by(GameRow.id)))

    def games_of(self, job: str) -> list[GameRow]:
        with Session(self._engine, expire_on_commit=False) as session:
            return list(session.scalars(select(GameRow).where(GameRow.job == job).order_by(GameRow.id)))

    def mark(self, game: str, state: GameState, note: str = "", ended: int | None = None) -> None:
        """ended: the block that the game was over in."""
        with Session(self._engine) as session, session.begin():
            row = session.get_one(GameRow, game)
            row.state, row.note = state, note or row.note
            row.ended = ended if ended is not None else row.ended

    def playing(self, ended_after: int) -> set[str]:
        """Jobs with games that are live, or were over only after a block: their evidence is needed."""
        late = GameRow.ended > ended_after
        with Session(self._engine) as session:
            return set(session.scalars(select(GameRow.job).where(GameRow.state.in_(LIVE) | late)))

    # ---- moves and evidence

    def journal(self, chain_id: int, account: str) -> Journal:
        """The transactions of one account on one chain."""
        return Journal(self._engine, chain_id, account)

    def moves(self) -> list[MoveRow]:
        """Every transaction that was ever signed, oldest first."""
        with Session(self._engine, expire_on_commit=False) as session:
            return list(session.scalars(select(MoveRow).order_by(MoveRow.number)))

    def digest(self, job: str, name: str) -> str | None:
        """The digest, hex, of a file as it was written; None for one that was not."""
        with Session(self._engine) as session:
            row = session.get(EvidenceRow, (job, name))
            return row.sha256 if row else None

    def keep(self, job: str, name: str, size: int, sha256: str) -> None:
        with Session(self._engine) as session, session.begin():
            session.merge(EvidenceRow(job=job, name=name, bytes=size, sha256=sha256))

    def drop(self, job: str) -> None:
        """Forgets the files of a job."""
        with Session(self._engine) as session, session.begin():
            session.execute(delete(EvidenceRow).where(EvidenceRow.job == job))


class Journal:
    """A contracts.transport.Journal in the store's database."""

    def __init__(self, engine: Engine, chain_id: int, account: str) -> None:
        self._engine, self._chain, self._account = engine, chain_id, account
        self._ours = (MoveRow.chain == chain_id, MoveRow.account == account)

    def record(self, signed: Signed) -> None:
        with Session(self._engine) as session, session.begin():
            last = session.scalar(select(func.max(MoveRow.number)).where(*self._ours))
            session.merge(
                MoveRow(
                    hash=signed.hash.hex(),
                    chain=self._chain,
                    account=self._account,
                    nonce=signed.nonce,
                    number=(last or 0) + 1,
                    label=signed.label,
                    raw=signed.raw,
                    state=MoveState.SENT,
                    block=None,
                )
            )

    def unsettled(self) -> list[Signed]:
        with Session(self._engine) as session:
            sent = select(MoveRow).where(*self._ours, MoveRow.state == MoveState.SENT)
            rows = session.scalars(sent.order_by(MoveRow.nonce, MoveRow.number))
            return [Signed(row.label, row.nonce, bytes.fromhex(row.hash), row.raw) for row in rows]

    def settle(self, nonce: int, mined: bytes | None, block: int | None = None) -> None:
        with Session(self._engine) as session, session.begin():
            ours = (*self._ours, MoveRow.nonce == nonce, MoveRow.state == MoveState.SENT)
            if mined is not None:
                hit = update(MoveRow).where(*ours, MoveRow.hash == mined.hex())
                session.execute(hit.values(state=MoveState.MINED, block=block))
            session.execute(update(MoveRow).where(*ours).values(state=MoveState.DEAD))

    def reopen(self, block: int) -> None:
        with Session(self._engine) as session, session.begin():
            mined = update(MoveRow).where(*self._ours, MoveRow.state == MoveState.MINED, MoveRow.block >= block)
            session.execute(mined.values(state=MoveState.SENT, block=None))
