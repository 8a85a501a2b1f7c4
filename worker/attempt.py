"""What an attempt at a job is made of: whom a stage sends to, who signs for it, a microbatch on its way."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from verifier.commit import Request
from worker import ring_pb2 as pb
from worker.batch import Batch, Piece, Token
from worker.channel import pack_tensor
from worker.errors import BadHandoff, BadMessage, JobFailed, Silent
from worker.handoff import Handoff
from worker.homes import Homes
from worker.pulse import Pulse
from worker.scheduler import stopped


class Notary(Protocol):
    """Signs our hand-offs and judges the predecessor's; the chain's EIP-712 domain is in it."""

    def sign_handoff(self, job: bytes, stage: int, root: bytes, leaves: int) -> bytes: ...

    def verify_handoff(self, job: bytes, stage: int, handoff: Handoff) -> bool: ...


@dataclass(frozen=True)
class Step:
    """One microbatch after this stage. Tokens only at the last; seconds by the monotonic clock, `busy` and `slowest`
    with the stages before.
    """

    batch: Batch
    ended: Sequence[int]
    hidden: torch.Tensor
    tokens: list[Token]
    began_seconds: float
    busy_seconds: float
    slowest_seconds: float

    def times(self) -> pb.Times:
        """Whatever those before told, it fits the wire."""
        busy, slowest = (min(int(1e6 * seconds), 2**63) for seconds in (self.busy_seconds, self.slowest_seconds))
        return pb.Times(busy=busy, slowest=slowest)

    def rows(self, dtype: int) -> pb.Rows:
        """For the next stage. dtype: by the code in docs/canonical.md."""
        pieces = (pb.Piece(request=p.request, first=p.first, count=p.count, donor=p.donor) for p in self.batch.pieces)
        return pb.Rows(pieces=pieces, hidden=pack_tensor(self.hidden, dtype), ended=self.ended, times=self.times())


def take_in(
    sender: str,
    batch: Batch,
    leaving: Sequence[int],
    requests: Sequence[Request],
    positions: Sequence[int],
    ended: set[int],
    homes: Homes,
) -> None:
    """Checks a microbatch and who leaves before it, and notes who is in. Raises BadMessage naming the sender."""
    for r in leaving:
        if r >= len(requests) or r in ended:
            raise BadMessage(sender, f"ended: expected a request below {len(requests)}, each once, came {r}")
        ended.add(r)
        homes.leave(r)
    check_pieces(sender, batch, requests, positions, ended)
    check_room(sender, batch, positions, homes)


def check_pieces(
    sender: str, batch: Batch, requests: Sequence[Request], positions: Sequence[int], ended: Set[int]
) -> None:
    """Rows follow one another, from `positions` or from where a donor's end, and end where their request may. Raises
    BadMessage naming the sender.

    Whether the last stage had chosen the tokens that are fed is not known before they are computed: see the Finish.
    """
    for piece in batch.pieces:
        if piece.request >= len(requests):
            raise BadMessage(sender, f"expected a request below {len(requests)}, came {piece.request}")
        first, end = positions[piece.request], len(requests[piece.request].prompt) + requests[piece.request].limit - 1
        if piece.request in ended:
            raise BadMessage(sender, f"request {piece.request}: rows came though it had ended")
        if piece.donor is not None:
            _check_donor(sender, piece, piece.donor, requests, positions, ended)
        elif piece.first != first:
            raise BadMessage(sender, f"request {piece.request}: expected position {first}, came {piece.first}")
        if piece.end > end:
            raise BadMessage(sender, f"request {piece.request}: expected at most {end} positions, came {piece.end}")


def check_room(sender: str, batch: Batch, positions: Sequence[int], homes: Homes) -> None:
    """Admits requests whose first rows come. Raises BadMessage naming the sender if they, a microbatch or its guests
    are more than stage 0 lets in and together, which knows our bounds: nobody makes us hold more.
    """
    if batch.rows > homes.rows:
        raise BadMessage(sender, f"rows: expected at most {homes.rows} in a microbatch, came {batch.rows}")
    for piece in batch.pieces:
        if positions[piece.request]:
            continue
        if not homes.has_room(piece.request):
            what = f"expected it once there is room for its {homes.reserves[piece.request]} positions"
            raise BadMessage(sender, f"request {piece.request}: {what}")
        homes.admit(piece.request)
    if (least := homes.least(batch.pieces)) > homes.buffer:
        raise BadMessage(sender, f"rows: expected guests of at most {homes.buffer} positions, came {least}")


def _check_donor(
    sender: str, piece: Piece, donor: int, requests: Sequence[Request], positions: Sequence[int], ended: Set[int]
) -> None:
    """SAFETY: positions are taken only if they are here, if none is there that they would replace, and if they are what
    the request's own rows would be: of the same tokens. Each is copied once, so nobody is made to do more than prompts
    are long.
    """
    r, prompt = piece.request, requests[piece.request].prompt
    if donor >= len(requests):
        raise BadMessage(sender, f"request {r}: expected a donor below {len(requests)}, came {donor}")
    if positions[r] or not 0 < piece.first < len(prompt):
        what = f"expected a donor of 1 .. {len(prompt) - 1} positions for one that has none"
        raise BadMessage(sender, f"request {r}: {what}, came {piece.first} for one that has {positions[r]}")
    if donor in ended or positions[donor] < piece.first:
        has = "has ended" if donor in ended else f"has {positions[donor]}"
        raise BadMessage(sender, f"request {r}: expected a donor with {piece.first} positions, request {donor} {has}")
    if requests[donor].prompt[: piece.first] != prompt[: piece.first]:
        what = f"expected a donor whose prompt begins with the same {piece.first} tokens"
        raise BadMessage(sender, f"request {r}: {what}, request {donor} does not")


def check_all(
    sender: str, requests: Sequence[Request], positions: Sequence[int], tokens: Sequence[Sequence[int]] | None
) -> None:
    """At a Finish: every request has its prompt's positions; at the last stage, which knows the tokens, exactly theirs.
    Raises BadMessage naming the sender.
    """
    for r, (request, count) in enumerate(zip(requests, positions, strict=True)):
        least = len(request.prompt)
        if tokens is not None and not (stopped(request, tokens[r]) and count == least + len(tokens[r]) - 1):
            raise BadMessage(sender, f"finished, but request {r} has {count} positions and {len(tokens[r])} tokens")
        if count < least:
            raise BadMessage(sender, f"finished, but request {r} has only {count} positions")


def judge_handoff(
    notary: Notary, job: bytes, sender: int, name: str, finish: pb.Finish, root: bytes, leaves: int
) -> Handoff:
    """Raises BadHandoff unless stage `sender`, called `name`, signed exactly what came from it: (root, leaves)."""
    if (finish.root, finish.leaves) != (root, leaves):
        raise BadHandoff(
            name,
            f"signed hand-off 0x{finish.root[:32].hex()} of {finish.leaves} records; "
            f"what it sent has 0x{root.hex()} of {leaves}",
        )
    handoff = Handoff(finish.root, finish.leaves, finish.signature)
    if not notary.verify_handoff(job, sender, handoff):
        raise BadHandoff(name, "its hand-off is not signed with its key")
    return handoff


async def nobody() -> bool:
    return False


async def judge(pulse: Pulse, is_well: Callable[[], Awaitable[bool]]) -> None:
    """is_well: asks the predecessor another way. Beats come behind rows, and over a slow link those take their time.
    Raises Stalled.
    """
    began = time.monotonic()
    try:
        pulse.judge(began)
    except Silent:
        if await is_well():
            pulse.answered(time.monotonic())
        elif not pulse.heard_since(began):  # the answer may be behind rows as well
            raise


def cancelled() -> bool:
    """Whether this task is to end: from a TaskGroup that is cancelled as one of its tasks fails, the failure comes."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def failure_of(error: Exception) -> JobFailed:
    """What went wrong first, if several tasks failed."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, JobFailed) else JobFailed(f"{type(error).__name__}: {error}")


def seen(future: asyncio.Future[Any]) -> None:
    """Marks a failure as seen: it is in the job's state, whoever awaits it or not."""
    if not future.cancelled():
        future.exception()
