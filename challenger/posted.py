"""A committed job as demands bring it to light, beside whatever its workers did serve.

Answers come from the chain, which has checked them; they are checked again all the same, for it costs nothing and what
comes out of here is what money is put on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from challenger.evidence import Evidence, Facts, NodesTree, RecordsTree, Unavailable
from contracts.records import Job, Stage
from verifier.commit import Output, Request, TraceNode
from verifier.demand import MAX_ANSWER_BYTES, Answer, Demand, Wanted, read_answer, tensor_grid
from verifier.linear import Bits
from verifier.posted import KnownTree, PostedTrace
from verifier.referee import codec
from verifier.referee.codec import TOKENS_A_LEAF, Model, Opening
from verifier.referee.tree import leaf
from verifier.shape import ModelShape
from verifier.trace import RequestTrace

T = TypeVar("T")


@dataclass
class Tokens:
    """A prompt or an output: its record, and its token leaves as far as they were posted."""

    record: Opening
    count: int  # of leaves
    tree: KnownTree
    leaves: dict[int, bytes] = field(default_factory=dict)

    def add(self, first: int, answer: Answer) -> None:
        self.tree.add(first, [leaf(data) for data in answer.leaves], answer.siblings)
        self.leaves.update(enumerate(answer.leaves, first))

    def missing(self) -> range | None:
        """The leaves from the first unknown one on."""
        first = next((i for i in range(self.count) if i not in self.leaves), None)
        return None if first is None else range(first, self.count)

    def ids(self) -> tuple[int, ...]:
        data = b"".join(self.leaves[i] for i in range(self.count))
        return tuple(int.from_bytes(data[i : i + 4], "big") for i in range(0, len(data), 4))


class Records:
    """Openings of posted records, as verifier.commit's trees give them."""

    def __init__(self) -> None:
        self.held: dict[int, Tokens] = {}

    def record_opening(self, r: int) -> Opening:
        """Raises Unavailable."""
        return self._of(r).record

    def token_opening(self, r: int, index: int) -> Opening:
        """Raises Unavailable."""
        tokens, at = self._of(r), index // TOKENS_A_LEAF
        if at not in tokens.leaves:
            raise Unavailable(f"request {r}: token {index} was not posted")
        return Opening(tokens.leaves[at], tokens.tree.prove(at))

    def _of(self, r: int) -> Tokens:
        if r not in self.held:
            raise Unavailable(f"the record of request {r} was not posted")
        return self.held[r]


class Sparse(Generic[T]):
    """One item a request, of which not all are known."""

    def __init__(self, count: int, find: Callable[[int], T | None]) -> None:
        self._count, self._find = count, find

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, r: int, /) -> T:
        """Raises Unavailable."""
        found = self._find(r)
        if found is None:
            raise Unavailable(f"request {r} was not posted whole")
        return found

    def get(self, r: int) -> T | None:
        return self._find(r)


@dataclass(frozen=True)
class Nodes:
    """A stage's trace nodes, as far as they were posted; opens them as verifier.commit.StageTree does."""

    held: dict[int, tuple[TraceNode, Opening]] = field(default_factory=dict)

    def opening(self, r: int) -> Opening:
        """Raises Unavailable."""
        if r not in self.held:
            raise Unavailable(f"the trace node of request {r} was not posted")
        return self.held[r][1]


class Posted:
    """What is known of one job. base: what its workers served, None if that were not even requests and outputs."""

    def __init__(self, facts: Facts, shape: ModelShape, model: Model, base: Evidence | None) -> None:
        self.facts, self.shape, self.model, self.base = facts, shape, model, base
        self.id: bytes = facts.id
        self.job: Job = facts.job
        self.stages: tuple[Stage, ...] = facts.stages
        self._prompts, self._outputs = Records(), Records()
        self._nodes = [Nodes() for _ in facts.stages]
        self._traces: dict[tuple[int, int], PostedTrace] = {}
        self.requests = Sparse(self.job.requests, self._request)
        self.outputs = Sparse(self.job.requests, self._output)
        self.requests_tree: RecordsTree = base.requests_tree if base else self._prompts
        self.outputs_tree: RecordsTree = base.outputs_tree if base else self._outputs

    def feed(self, demand: Demand, openings: Sequence[Opening]) -> None:
        """Takes in an answer. Raises ValueError for one that the contract would not have taken."""
        stage = self.stages[demand.stage]
        committed = {Wanted.PROMPT: self.job.requests_root, Wanted.OUTPUT: self.facts.outputs_root}
        root = committed.get(Wanted(demand.kind), self.facts.roots[demand.stage])
        layers = (stage.first_layer, stage.end_layer)
        answer = read_answer(demand, self.model, layers, root, self.job.requests, openings)
        r, record = demand.request, Opening(answer.record, answer.record_siblings)
        if demand.kind in (Wanted.PROMPT, Wanted.OUTPUT):
            held = (self._prompts if demand.kind == Wanted.PROMPT else self._outputs).held
            held.setdefault(r, Tokens(record, answer.grid.leaves, KnownTree(answer.grid.leaves)))
            if answer.leaves:
                held[r].add(demand.first, answer)
            return
        node = codec.TraceNode.decode(answer.record)
        self._nodes[demand.stage].held[r] = (TraceNode(node.positions, node.tensors_root), record)
        if demand.kind == Wanted.LEAVES and answer.leaves:
            self._trace(demand.stage, r, node.positions, node.tensors_root).add(demand.tensor, demand.first, answer)

    # ---- what is known

    def tree(self, stage: int) -> NodesTree:
        """The trace nodes of a stage, to open."""
        tree = self.base.stage_trees[stage] if self.base else None
        return tree if tree is not None else self._nodes[stage]

    def withheld(self, stage: int) -> bool:
        """Whether a stage's tensors have to be demanded."""
        return self.base is None or not self.base.held[stage]

    def node(self, stage: int, r: int) -> TraceNode | None:
        tree = self.base.stage_trees[stage] if self.base else None
        if tree is not None:
            return tree.nodes[r]
        held = self._nodes[stage].held.get(r)
        return held[0] if held else None

    def trace(self, stage: int, request: int) -> RequestTrace | None:
        """One request's tensors at one stage, as far as they are known; None where not even the node is."""
        if self.base is not None and self.base.held[stage]:
            return self.base.trace(stage, request)
        node = self.node(stage, request)
        return None if node is None else self._trace(stage, request, node.positions, node.tensors_root)

    def row(self, layer: int, name: str, r: int, position: int) -> Bits | None:
        """One row of a tensor of a layer, or of `out` (layer = all layers), if it is known."""
        stage, key = self.place(layer, name)
        trace = self.trace(stage, r)
        if trace is None or position >= trace.positions:
            return None
        if isinstance(trace, PostedTrace) and not trace.knows_row(key, position):
            return None
        row: Bits = trace.arrays[key][position]
        return row

    def place(self, layer: int, name: str) -> tuple[int, str]:
        """The stage that holds a tensor, and its key there."""
        if layer == self.shape.layers:
            return len(self.stages) - 1, "out"
        stage = next(i for i, s in enumerate(self.stages) if s.first_layer <= layer < s.end_layer)
        return stage, f"{layer}.{name}"

    # ---- what to ask for

    def ask_tokens(self, r: int, outputs: bool) -> Demand | None:
        """What is still missing of a prompt or an output. Its first leaf comes with the record, which says how many."""
        if self.base is not None:
            return None
        held = (self._outputs if outputs else self._prompts).held.get(r)
        rest = held.missing() if held else range(1)
        if rest is None:
            return None
        kind, stage = (Wanted.OUTPUT, len(self.stages) - 1) if outputs else (Wanted.PROMPT, 0)
        most = MAX_ANSWER_BYTES // (4 * TOKENS_A_LEAF)
        return Demand(self.id, stage, kind, r, 0, rest.start, min(len(rest), most))

    def ask_node(self, stage: int, r: int) -> Demand | None:
        """A stage's trace node; the root of its first tensor comes with it."""
        if self.node(stage, r) is not None:
            return None
        return Demand(self.id, stage, Wanted.TENSORS, r, 0, 0, 1)

    def ask_rows(self, layer: int, name: str, r: int, first: int, end: int) -> list[Demand]:
        """Demands that bring the unknown ones of rows first .. end - 1 to light. The node must be known."""
        stage, key = self.place(layer, name)
        trace = self.trace(stage, r)
        if not isinstance(trace, PostedTrace):
            return []
        place = trace.keys.index(key)
        grid = tensor_grid(self.model, place, trace.positions)
        unknown = [t for t in range(first, end) if not trace.knows_row(key, t)]
        if not unknown:
            return []
        span = range(trace.leaves_of(key, unknown[0]).start, trace.leaves_of(key, unknown[-1]).stop)
        most = grid.most_leaves
        starts = range(span.start, span.stop, most)
        return [Demand(self.id, stage, Wanted.LEAVES, r, place, i, min(most, span.stop - i)) for i in starts]

    # ---- inside

    def _request(self, r: int) -> Request | None:
        if self.base is not None:
            return self.base.requests[r]
        tokens = self._prompts.held.get(r)
        if tokens is None or tokens.missing() is not None:
            return None
        told = codec.Request.decode(tokens.record.data)
        return Request(tokens.ids(), told.limit, told.stops, told.temperature, told.top_k, told.top_p, told.seed)

    def _output(self, r: int) -> Output | None:
        if self.base is not None:
            return self.base.outputs[r]
        tokens = self._outputs.held.get(r)
        if tokens is None or tokens.missing() is not None:
            return None
        told = codec.Output.decode(tokens.record.data)
        return Output(told.start, told.count, told.code, tokens.ids())

    def _trace(self, stage: int, r: int, positions: int, root: bytes) -> PostedTrace:
        if (stage, r) not in self._traces:
            layers = self.stages[stage].first_layer, self.stages[stage].end_layer
            self._traces[stage, r] = PostedTrace(self.shape, *layers, positions, root)
        return self._traces[stage, r]
