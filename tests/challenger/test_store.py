"""What a watchtower remembers."""

from pathlib import Path

import pytest

from challenger.plan import plan, verdict_of
from challenger.store import LIVE, GameRow, GameState, JobState, Store
from deploy.keys import dev_account
from verifier.audit import Verdict
from verifier.program import Kind


def test_a_live_game_is_read_from_its_beginning_again(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'x.db'}")
    assert store.next_block(7) == 7
    store.advance(100, [("aa", 5, 1)])
    store.advance(100, [("aa", 5, 1)])
    assert store.next_block(7) == 100
    game = GameRow(id="g", job="aa", segment={}, salt=bytes(32), block=40)
    store.judged("aa", JobState.SUSPECT, {}, [game])
    assert store.next_block(7) == 40 and [row.id for row in store.games(*LIVE)] == ["g"]
    store.mark("g", GameState.LOST)
    assert store.next_block(7) == 100
    store.close()


def test_what_others_made_needless_is_due_again_where_their_blocks_are_gone(tmp_path: Path) -> None:
    """Another's conviction that a reorganisation took away: whoever sent it may not send it again."""
    store = Store(f"sqlite:///{tmp_path / 'x.db'}")
    store.advance(100, [("aa", 5, 1)])
    games = [GameRow(id=id, job="aa", segment={}, salt=bytes(32), block=40) for id in ("before", "behind", "doubted")]
    store.judged("aa", JobState.SUSPECT, {}, games)
    store.mark("before", GameState.DROPPED, "convicted by somebody else", ended=89)
    store.mark("behind", GameState.DROPPED, "convicted by somebody else", ended=90)
    store.mark("doubted", GameState.DROPPED, "corrupt evidence")
    assert store.rewind(90) == []
    assert [row.id for row in store.games(*LIVE)] == ["behind"] and store.next_block(7) == 40
    store.close()


@pytest.mark.parametrize("state", [JobState.WATCHED, JobState.CLEAN, JobState.UNJUDGED])
def test_a_job_whose_commitment_is_gone_is_watched_once_it_is_committed_again(tmp_path: Path, state: JobState) -> None:
    """Not before: it would be found to have no window, and to need no audit."""
    store = Store(f"sqlite:///{tmp_path / 'x.db'}")
    before, gone = "11" * 32, "22" * 32
    store.advance(9, [(before, 99, 4), (gone, 99, 5)])
    store.attempted(gone)
    store.judged(gone, state, {})
    assert store.rewind(5) == [gone] and [row.id for row in store.due()] == [before]
    store.advance(9, [(gone, 98, 5)])
    assert [(row.id, row.attempts) for row in store.due()] == [(gone, 0), (before, 0)]
    store.close()


def test_a_plan_comes_back_as_it_was(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'x.db'}")
    store.advance(5, [("11" * 32, 9, 1)])
    for ratio, kind in ((1.25, Kind.MLP), (float("inf"), Kind.STOP)):
        verdict = Verdict(ratio, 2, kind, 3, 4, 5, 0xFFFFFFFF, 7, reason="because")
        row = plan(dev_account(0).address, b"\x11" * 32, verdict, 5)
        store.judged("11" * 32, JobState.SUSPECT, {}, [row])
    again = store.games(GameState.PLANNED)
    assert {verdict_of(game).ratio for game in again} == {1.25, float("inf")}
    assert all(verdict_of(game).unit == 0xFFFFFFFF and len(game.salt) == 32 for game in again)
    assert len({game.id for game in again}) == 2
    store.close()
