"""Stage 0: which rows go next, several microbatches in flight, where a request stops. Pure: no clock, no threads."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from verifier.commit import Request
from worker.batch import Batch, Piece, Token
from worker.errors import JobFailed
from worker.homes import Homes
from worker.pace import Pace
from worker.prefix import Prefixes


class UnexpectedToken(JobFailed):
    """A token for which no row was in flight."""


class Diverged(JobFailed):
    """Tokens of an earlier attempt are not what the rows of this one yield: another attempt keeps fewer."""


def stopped(request: Request, tokens: Sequence[int]) -> bool:
    """Whether `tokens`, the output so far, is complete: the limit is reached, or the last one is a stop id."""
    return len(tokens) >= request.limit or (len(tokens) > 0 and tokens[-1] in request.stops)


def unfinished(request: Request, tokens: Sequence[int]) -> list[int]:
    """As many of `tokens` as leave the request something to choose: what another attempt may begin with."""
    end = next((i for i, token in enumerate(tokens) if token in request.stops), len(tokens))
    return list(tokens[: min(end, request.limit - 1)])


@dataclass
class _Progress:
    request: Request
    sent: int = 0  # rows handed out
    waiting: bool = False  # a row that will yield a new token is in flight
    tokens: list[int] = field(default_factory=list)
    confirmed: int = 0  # of the tokens: yielded in this attempt
    diverged: bool = False

    @property
    def known(self) -> int:
        """Positions whose token is known."""
        return len(self.request.prompt) + len(self.tokens)

    def token_at(self, position: int) -> int:
        prompt = self.request.prompt
        return prompt[position] if position < len(prompt) else self.tokens[position - len(prompt)]


class Scheduler:
    """Continuous batching: whoever waited longest goes first, prompts in chunks, new requests as the cache has room.

    `max_rows` bounds one microbatch, `pace` how many are in flight; `homes`, at all stages, the sum of what those who
    are admitted may grow to (one request always is, however long) and, of one microbatch, what its guests take.

    Tokens of a broken attempt are fed as if they were of the prompt. The last stage chooses them again all the same,
    from this attempt's rows: what is committed is what one trace yields. Where it chooses another, `diverged` is
    true, nothing more is generated, and `kept` is what the next attempt may feed.

    What prompts share is computed once, if `prefixes` are given. INVARIANT: a piece's donor is in flight, and had its
    positions in an earlier microbatch.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        *,
        max_rows: int,
        pace: Pace,
        homes: Sequence[Homes],
        kept: Sequence[Sequence[int]] = (),
        prefixes: Prefixes | None = None,
    ) -> None:
        """homes: one for all stages with the same bounds; kept: each request's tokens of earlier attempts; prefixes: of
        the requests' prompts.
        """
        if max_rows < 1:
            raise ValueError(f"expected a positive bound, came {max_rows}")
        self._progress = [_Progress(request) for request in requests]
        for progress, tokens in zip(self._progress, kept or [()] * len(requests), strict=True):
            progress.tokens = unfinished(progress.request, tokens)
        self._max_rows = max_rows
        self._pace = pace
        self._homes = homes
        self._prefixes = prefixes
        self.taken_positions = 0  # that their requests did not compute
        self._unadmitted = deque(range(len(requests)))
        self._active: deque[int] = deque()  # the longest unserved first
        self._ended: list[int] = []
        self._in_flight = 0

    @property
    def done(self) -> bool:
        if self.diverged:
            return self._in_flight == 0 and not any(self._unsure(r) for r in self._active)
        return not self._unadmitted and not self._active and self._in_flight == 0

    @property
    def diverged(self) -> bool:
        return any(progress.diverged for progress in self._progress)

    @property
    def kept(self) -> list[list[int]]:
        """Tokens for another attempt to begin with. The last of a request is left out: its row yields it again."""
        return [unfinished(progress.request, progress.tokens) for progress in self._progress]

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def unanswered(self) -> int:
        """Requests whose next token must have come, since nothing is in flight, and has not."""
        if self._in_flight or self.diverged:
            return 0
        return sum(self._progress[r].waiting for r in self._active)

    @property
    def outputs(self) -> list[list[int]]:
        return [list(progress.tokens) for progress in self._progress]

    @property
    def prompt_counts(self) -> list[int]:
        return [len(progress.request.prompt) for progress in self._progress]

    def ended(self) -> list[int]:
        """Requests that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def next(self) -> Batch | None:
        """The next microbatch; None while enough are in flight or no row is ready."""
        if self._in_flight >= self._pace.microbatches:
            return None
        if self.diverged:
            ready = self._fitting([r for r in self._active if self._unsure(r)])
        else:
            self._admit()
            ready = self._ready()
        pieces: list[Piece] = []
        rows = 0
        for r in ready:
            if self._waits_for_another(r):  # whose rows are in this very microbatch
                continue
            progress = self._progress[r]
            first, donor = self._begins_at(r)
            count = min(progress.known - first, self._max_rows - rows)
            if count <= 0:
                break
            pieces.append(Piece(r, first, count, donor))
            if self._prefixes is not None and not progress.sent:
                self._prefixes.begins(r)
            progress.sent = first + count
            progress.waiting = progress.sent == progress.known
            rows += count
        if not pieces:
            return None
        for piece in pieces:
            if self._prefixes is not None:
                self._prefixes.sent(piece.request, piece.first if piece.donor is None else 0, piece.end)
            self.taken_positions += 0 if piece.donor is None else piece.first
            self._active.remove(piece.request)
            self._active.append(piece.request)
        self._in_flight += 1
        return Batch(tuple(pieces))

    def _ready(self) -> list[int]:
        # Rationale: a request's next row waits for its last token, so whatever one microbatch takes, the others can't:
        # each takes its share of the requests.
        share = -(-len(self._active) // max(self._pace.groups, *(homes.turns for homes in self._homes)))
        waiting = [r for r in self._active if not self._progress[r].waiting and not self._waits_for_another(r)]
        # Single rows first, prompts share what is left.
        return sorted(self._fitting(waiting, share), key=lambda r: self._progress[r].known - self._begins_at(r)[0] > 1)

    def _waits_for_another(self, r: int) -> bool:
        """For somebody in flight who computes what it would have to. Not once nothing new is generated: who computes it
        may not go on.
        """
        if self._prefixes is None or self._progress[r].sent or self.diverged:
            return False
        return self._prefixes.waits(r)

    def _begins_at(self, r: int) -> tuple[int, int | None]:
        """The next row of a request, and whose positions those before it are, if it has none of its own yet."""
        sent = self._progress[r].sent
        return (sent, None) if sent or self._prefixes is None else self._prefixes.taken(r)

    def _fitting(self, waiting: Sequence[int], most: int | None = None) -> list[int]:
        """Those whose guests the buffers hold together; the longest unserved is always among them."""
        guests: list[Piece] = []
        chosen: list[int] = []
        for r in waiting:
            if len(chosen) == most:
                break
            if any(r in homes.guests for homes in self._homes):
                first = self._begins_at(r)[0]
                piece = Piece(r, first, min(self._progress[r].known - first, self._max_rows))
                if not all(homes.fits([*guests, piece]) for homes in self._homes):
                    continue
                guests.append(piece)
            chosen.append(r)
        return chosen

    def _unsure(self, r: int) -> bool:
        """Whether rows are to be sent whose tokens an earlier attempt chose."""
        progress = self._progress[r]
        return not progress.diverged and progress.sent < progress.known and progress.confirmed < len(progress.tokens)

    def token_ids(self, batch: Batch) -> list[int]:
        """The ids that the rows of `batch` embed."""
        return [self._progress[p.request].token_at(t) for p in batch.pieces for t in range(p.first, p.end)]

    def returned(self, tokens: Sequence[Token]) -> None:
        """One microbatch came back with these tokens. Raises UnexpectedToken."""
        if self._in_flight == 0:
            raise UnexpectedToken("tokens came back with no microbatch in flight")
        for token in tokens:
            progress = self._progress[token.request] if 0 <= token.request < len(self._progress) else None
            if progress is None:
                raise UnexpectedToken(f"request {token.request}: there is none")
            if progress.diverged:
                continue
            if token.index != progress.confirmed or len(progress.request.prompt) + token.index > progress.sent:
                raise UnexpectedToken(f"request {token.request}: token {token.index} was not asked for")
            self._chosen(token, progress)
        self._in_flight -= 1

    def _chosen(self, token: Token, progress: _Progress) -> None:
        """The next token of a request, in this attempt."""
        progress.confirmed += 1
        if token.index < len(progress.tokens):
            if token.token != progress.tokens[token.index]:
                progress.tokens = progress.tokens[: token.index]
                progress.diverged = True
            return
        progress.tokens.append(token.token)
        progress.waiting = False
        if stopped(progress.request, progress.tokens):
            self._active.remove(token.request)
            self._ended.append(token.request)
            for homes in self._homes:
                homes.leave(token.request)
            if self._prefixes is not None:
                self._prefixes.leaves(token.request)

    def _admit(self) -> None:
        while self._unadmitted and all(homes.has_room(self._unadmitted[0]) for homes in self._homes):
            for homes in self._homes:
                homes.admit(self._unadmitted[0])
            self._active.append(self._unadmitted.popleft())
