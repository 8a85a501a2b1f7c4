"""What requester and workers commit to: requests, outputs, trace nodes, hand-offs (docs/protocol.md, "Records").

The records' bytes are those of verifier.referee.codec; here are the batch, its checks, and the trees with their
openings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from verifier.referee import codec
from verifier.referee.codec import STOPS, TOKENS_A_LEAF, Opening
from verifier.referee.errors import IndexOutOfRange
from verifier.sha256 import HashTree

STOPPED = 1  # output code: ended at a stop id
LIMITED = 2  # output code: reached its limit
GREEDY_TOP_P = 65536
U64 = 1 << 64


class InvalidRequest(ValueError):
    """A request that the law cannot serve. The message names the reason."""


class Limits(Protocol):
    """The part of a model's shape that requests are checked against."""

    @property
    def vocabulary(self) -> int: ...
    @property
    def max_positions(self) -> int: ...


@dataclass(frozen=True)
class Request:
    """What a requester wants generated. limit: most output tokens.

    temperature and top_p in 1/65536; greedy is temperature 0, top_k 0, top_p 65536.
    """

    prompt: tuple[int, ...]
    limit: int
    stops: tuple[int, ...] = ()
    temperature: int = 0
    top_k: int = 0
    top_p: int = GREEDY_TOP_P
    seed: int = 0

    def record(self, r: int) -> bytes:
        """Its 100 bytes as request r of a batch. Raises ValueError for what the record cannot hold."""
        head = (r, len(self.prompt), self.limit, self.seed, self.stops)
        return codec.Request(*head, _tokens_tree(self.prompt).root, self.temperature, self.top_k, self.top_p).encode()


@dataclass(frozen=True)
class Output:
    """What a request produced. start: output tokens of all earlier requests of the batch; code: STOPPED or LIMITED."""

    start: int
    count: int
    code: int
    tokens: tuple[int, ...]

    def record(self, r: int) -> bytes:
        """Its 52 bytes as the output of request r."""
        return codec.Output(r, self.start, self.count, self.code, _tokens_tree(self.tokens).root).encode()


@dataclass(frozen=True)
class TraceNode:
    """One request's served tensors at one stage. positions: T; tensors_root: 32 bytes."""

    positions: int
    tensors_root: bytes

    def record(self, r: int) -> bytes:
        """Its 40 bytes as the node of request r."""
        return codec.TraceNode(r, self.positions, self.tensors_root).encode()


def validate_request(request: Request, shape: Limits) -> None:
    """Raises InvalidRequest with the reason unless the law can serve the request on a model of this shape."""
    room, prompt = shape.max_positions, len(request.prompt)
    if prompt < 1:
        raise InvalidRequest("expected a prompt of 1 token or more, got none")
    if request.limit < 1:
        raise InvalidRequest(f"expected a limit of 1 token or more, got {request.limit}")
    if prompt + request.limit > room:
        raise InvalidRequest(f"expected prompt and limit within {room} positions, got {prompt} + {request.limit}")
    for name, ids in (("prompt", request.prompt), ("stop", request.stops)):
        for i, token in enumerate(ids):
            if not 0 <= token < shape.vocabulary:
                raise InvalidRequest(f"expected {name} ids below {shape.vocabulary}, got {token} at {i}")
    if len(request.stops) > STOPS:
        raise InvalidRequest(f"expected at most {STOPS} stop ids, got {len(request.stops)}")
    if (request.temperature, request.top_k, request.top_p) != (0, 0, GREEDY_TOP_P):
        sampling = f"temperature {request.temperature}, top_k {request.top_k}, top_p {request.top_p}"
        raise InvalidRequest(f"expected greedy sampling (0, 0, {GREEDY_TOP_P}), got {sampling}")
    if not 0 <= request.seed < U64:
        raise InvalidRequest(f"expected a seed below 2^64, got {request.seed}")


def positions(request: Request, output: Output) -> int:
    """T, the positions that a request's tensors hold: the last token is sampled, not fed back."""
    return len(request.prompt) + output.count - 1


def make_outputs(tokens: Sequence[Sequence[int]], requests: Sequence[Request]) -> list[Output]:
    """The outputs of a finished batch. Raises ValueError where a request's tokens do not end as the law demands."""
    outputs, start = [], 0
    for r, (ids, request) in enumerate(zip(tokens, requests, strict=True)):
        if not 1 <= len(ids) <= request.limit:
            raise ValueError(f"request {r}: expected 1 .. {request.limit} tokens, got {len(ids)}")
        if any(token in request.stops for token in ids[:-1]):
            raise ValueError(f"request {r}: expected no token behind the first stop id")
        code = STOPPED if ids[-1] in request.stops else LIMITED
        if code == LIMITED and len(ids) < request.limit:
            raise ValueError(f"request {r}: expected a stop id or {request.limit} tokens, got {len(ids)} without one")
        outputs.append(Output(start, len(ids), code, tuple(ids)))
        start += len(ids)
    return outputs


def total_tokens(outputs: Sequence[Output]) -> int:
    """What the last stage bills: the output tokens of the whole batch."""
    return sum(output.count for output in outputs)


class RecordTree:
    """A tree whose leaves are records, of any lengths."""

    def __init__(self, records: Sequence[bytes]) -> None:
        """records: one or more. Raises IndexOutOfRange for none."""
        self._records = list(records)
        self._tree = HashTree.of(self._records)

    @property
    def root(self) -> bytes:
        return self._tree.root

    @property
    def leaves(self) -> int:
        return len(self._records)

    def opening(self, index: int) -> Opening:
        """One record and its siblings. Raises IndexOutOfRange."""
        siblings = self._tree.prove(index)
        return Opening(self._records[index], siblings)


class TextTree:
    """The root over records that each commit to tokens, and its openings."""

    def __init__(self, records: Sequence[bytes], tokens: Sequence[Sequence[int]]) -> None:
        """tokens: those of each record. Raises IndexOutOfRange for no records."""
        self._records = RecordTree(records)
        self._tokens = tuple(tokens)

    @property
    def root(self) -> bytes:
        return self._records.root

    def record_opening(self, r: int) -> Opening:
        """Record r under the root. Raises IndexOutOfRange."""
        return self._records.opening(r)

    def token_opening(self, r: int, index: int) -> Opening:
        """The leaf that holds token `index`, under the root of tokens in record r. Raises IndexOutOfRange."""
        self._records.opening(r)
        return _token_opening(self._tokens[r], index)


class RequestsTree(TextTree):
    """The requests root; tokens are those of the prompts."""

    def __init__(self, requests: Sequence[Request]) -> None:
        """requests: one or more. Raises IndexOutOfRange for none, or for an empty prompt."""
        records = [request.record(r) for r, request in enumerate(requests)]
        super().__init__(records, [request.prompt for request in requests])


class OutputsTree(TextTree):
    """The outputs root; tokens are the produced ones."""

    def __init__(self, outputs: Sequence[Output]) -> None:
        """outputs: one or more. Raises IndexOutOfRange for none, or for an output without tokens."""
        records = [output.record(r) for r, output in enumerate(outputs)]
        super().__init__(records, [output.tokens for output in outputs])


class StageTree(RecordTree):
    """A stage's root over its requests' trace nodes."""

    def __init__(self, nodes: Sequence[TraceNode]) -> None:
        """nodes: one a request, in the batch's order. Raises IndexOutOfRange for none."""
        self.nodes = tuple(nodes)
        super().__init__([node.record(r) for r, node in enumerate(self.nodes)])


class HandoffTree(RecordTree):
    """What a sender signs: the tree over codec.handoff_row and handoff_token records, in the order they were sent."""


def requests_root(requests: Sequence[Request]) -> bytes:
    """The root that a job names. Raises IndexOutOfRange for an empty batch."""
    return RequestsTree(requests).root


def outputs_root(outputs: Sequence[Output]) -> bytes:
    """The root that every stage commits to. Raises IndexOutOfRange for an empty batch."""
    return OutputsTree(outputs).root


def _tokens_tree(tokens: Sequence[int]) -> HashTree:
    return HashTree.of(codec.token_leaves(tokens))


def _token_opening(tokens: Sequence[int], index: int) -> Opening:
    if not 0 <= index < len(tokens):
        raise IndexOutOfRange(f"expected a token below {len(tokens)}, got {index}")
    leaves, at = codec.token_leaves(tokens), index // TOKENS_A_LEAF
    return Opening(leaves[at], HashTree.of(leaves).prove(at))
