"""Which rows go next, and where a request stops."""

import pytest

from verifier.commit import Request
from worker.batch import Piece, Token
from worker.config import Bounds
from worker.homes import Homes
from worker.pace import Pace
from worker.scheduler import Scheduler, UnexpectedToken, stopped


def made(*requests: Request, rows: int = 8, flights: int = 2, cache: int = 1000) -> Scheduler:
    return Scheduler(requests, max_rows=rows, pace=Pace(2, flights), homes=[Homes(requests, Bounds(cache))])


def ask(prompt: int, limit: int, stops: tuple[int, ...] = ()) -> Request:
    return Request(tuple(range(1, prompt + 1)), limit, stops)


def test_a_request_stops_at_its_limit_or_a_stop_id() -> None:
    request = ask(1, 3, (9,))
    assert [stopped(request, tokens) for tokens in ([], [1], [9], [1, 2, 3])] == [False, False, True, True]


def test_a_long_prompt_goes_in_chunks_without_waiting() -> None:
    scheduler = made(ask(20, 1))
    first, second = scheduler.next(), scheduler.next()
    assert first is not None and second is not None
    assert (first.pieces, second.pieces) == ((Piece(0, 0, 8),), (Piece(0, 8, 8),))
    assert scheduler.token_ids(second) == list(range(9, 17))
    assert scheduler.next() is None  # two are in flight
    scheduler.returned([])
    third = scheduler.next()
    assert third is not None and third.pieces == (Piece(0, 16, 4),)
    assert scheduler.next() is None
    scheduler.returned([])
    scheduler.returned([Token(0, 0, 5)])
    assert scheduler.done and scheduler.outputs == [[5]] and scheduler.ended() == [0]


def test_microbatches_share_the_requests() -> None:
    scheduler = made(*(ask(1, 2) for _ in range(4)))
    one, two = scheduler.next(), scheduler.next()
    assert one is not None and two is not None
    assert {piece.request for piece in one.pieces} | {piece.request for piece in two.pieces} == {0, 1, 2, 3}
    assert len(one.pieces) == len(two.pieces) == 2


def test_the_output_token_is_fed_back() -> None:
    scheduler = made(ask(2, 2))
    assert scheduler.next() is not None
    scheduler.returned([Token(0, 0, 77)])
    batch = scheduler.next()
    assert batch is not None and batch.pieces == (Piece(0, 2, 1),) and scheduler.token_ids(batch) == [77]


def test_a_full_cache_keeps_requests_waiting() -> None:
    scheduler = made(ask(4, 4), ask(4, 4), cache=10)
    batch = scheduler.next()
    assert batch is not None and [piece.request for piece in batch.pieces] == [0]
    assert scheduler.next() is None
    scheduler.returned([Token(0, 0, 1)])
    for index in range(1, 4):
        assert scheduler.next() is not None
        scheduler.returned([Token(0, index, 1)])
    batch = scheduler.next()
    assert batch is not None and [piece.request for piece in batch.pieces] == [1]


@pytest.mark.parametrize("token", [Token(0, 1, 5), Token(1, 0, 5), Token(7, 0, 5)])
def test_a_token_that_was_not_asked_for_is_refused(token: Token) -> None:
    scheduler = made(ask(2, 3))
    assert scheduler.next() is not None
    with pytest.raises(UnexpectedToken):
        scheduler.returned([token])


def test_tokens_without_a_microbatch_in_flight_are_refused() -> None:
    with pytest.raises(UnexpectedToken, match="no microbatch in flight"):
        made(ask(1, 1)).returned([])
