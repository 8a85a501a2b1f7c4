"""Downloads what a committed job is made of, and believes nothing: every byte is checked against a root on chain.

Answers come from strangers. Each has a time limit that covers all of it, connection and headers included, and a size
limit derived from what it must be; a server that is slow, endless or wrong gives `Unavailable` with the reason, never
an exception of another kind. Stages are asked side by side, so that none can hold up the others, and what was
downloaded stays on disk: the next attempt goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Any, TypeVar

import aiohttp
import certifi
import numpy as np

from challenger.evidence import (
    Archive,
    CorruptEvidence,
    Evidence,
    Facts,
    TensorRoots,
    Unavailable,
    part_name,
    trace_name,
)
from challenger.strategy import TOKENS, Cell, Strategy, draw, positions_of, settled
from contracts.wire import parse_nodes, parse_outputs, parse_requests
from verifier.commit import Output, OutputsTree, Request, RequestsTree, StageTree, TraceNode, validate_request
from verifier.referee.floats import Dtype
from verifier.sha256 import HashTree
from verifier.shape import ModelShape
from verifier.trace import RequestTrace, TensorHasher, is_tiled, tensor_keys, tensor_width

log = logging.getLogger("plumb.challenger.fetch")

SILENCE_SECONDS = 10.0
ANSWER_SECONDS = 60.0  # one answer in all; the largest have 4 MiB
STAGE_SECONDS = 60.0
STAGE_BYTES_PER_SECOND = 2**20  # slower than that, a stage holds up too much
JSON_BYTES = 64 * 2**20
READ_BYTES = 2**20  # of an answer at a time
EMBEDDING = -1  # in place of a layer: what it hands over is h of the first one

FULL = Strategy()

T = TypeVar("T")


@dataclass(frozen=True)
class Ask:
    """What is to be downloaded. seconds: the budget of `auto`; seed: cells are drawn by it; closer: these requests
    whole, whatever the strategy: the first, and of the others as many as this watchtower takes at a time.
    """

    strategy: Strategy = FULL
    seconds: float = 0.0
    seed: bytes = b""
    closer: tuple[int, ...] = ()


class Fetcher:
    """Reads jobs from their workers into an archive."""

    def __init__(self, archive: Archive, max_stage_bytes: int) -> None:
        self.archive = archive
        self.max_stage_bytes = max_stage_bytes

    def fetch(self, facts: Facts, shape: ModelShape, seconds: float, ask: Ask | None = None) -> Evidence:
        """What the workers give within `seconds` of what is asked for (default: everything). Blocking; any thread.

        Raises Unavailable without requests or outputs; a stage that withholds its trace is named in the evidence.
        """
        self.archive.doubt(facts.id)
        return asyncio.run(self._fetch(facts, shape, seconds, ask or Ask()))

    def load(self, facts: Facts, shape: ModelShape) -> Evidence:
        """What lies on disk. Raises Unavailable."""
        return asyncio.run(_Collector(facts, shape, self.archive, self.max_stage_bytes, None, 0.0, Ask()).collect())

    async def _fetch(self, facts: Facts, shape: ModelShape, seconds: float, ask: Ask) -> Evidence:
        end = asyncio.get_running_loop().time() + seconds
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=_certificates()),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept-Encoding": "identity"},
            auto_decompress=False,  # nothing is inflated: what is counted is what comes
            read_bufsize=READ_BYTES,
        ) as http:
            return await _Collector(facts, shape, self.archive, self.max_stage_bytes, http, end, ask).collect()


@dataclass
class _Collector:
    """One attempt at one job. http None: from disk only. end: of the attempt, in the loop's seconds."""

    facts: Facts
    shape: ModelShape
    archive: Archive
    max_stage_bytes: int
    http: aiohttp.ClientSession | None
    end: float
    ask: Ask
    roots: dict[int, TensorRoots] = field(default_factory=dict)

    async def collect(self) -> Evidence:
        facts = self.facts
        last = len(facts.stages) - 1
        # Every stage holds the prompts, the first and the last the outputs; who answers for them is asked first.
        requests = await self._document("requests", "requests", range(last + 1), self._requests)
        outputs = await self._document("outputs", "outputs", (last, 0), self._outputs)
        positions = positions_of(requests, outputs)
        plan = settled(self.ask.strategy, self.shape, positions, self.ask.seconds) if self.http else Strategy()
        drawn: tuple[Cell, ...] | None = None
        wanted: set[tuple[int, int]] | None = None
        closer = self._fitting(positions)
        if closer:
            self._forget_all_but(closer)
            wanted = {(r, layer) for r in closer for layer in range(self.shape.layers)}
        elif plan.name == "cells":
            drawn = draw(positions, self.shape.layers, plan.count, self.ask.seed)
            wanted = {(cell.request, layer) for cell in drawn for layer in (EMBEDDING, cell.layer)}
        elif plan.name == TOKENS:
            drawn, wanted = (), set()
        found = await asyncio.gather(*(self._stage(index, requests, wanted) for index in range(last + 1)))
        whole = [tree is not None and self._has_all(i, tree) for i, (tree, _) in enumerate(found)]
        return Evidence(
            id=facts.id,
            job=facts.job,
            stages=facts.stages,
            requests=requests,
            outputs=outputs,
            tokens=facts.tokens,
            requests_tree=RequestsTree(requests),
            outputs_tree=OutputsTree(outputs),
            stage_trees=tuple(tree for tree, _ in found),
            held=tuple(whole),
            missing=tuple(reason for _, reason in found if reason),
            shape=self.shape,
            archive=self.archive,
            parts=self._parts(),
            plan=str(plan),
            drawn=drawn,
            seed=self.ask.seed,
            one_in=plan.count if plan.name == "sweep" else 1,
            closer=closer,
            roots=self.roots,
        )

    def _fitting(self, positions: Sequence[int]) -> tuple[int, ...]:
        """Of the requests asked for whole the first, and those behind it that no stage has too many bytes for."""
        widest = max(
            sum(tensor_width(self.shape, key) for key in tensor_keys(self.shape, stage.first_layer, stage.end_layer))
            for stage in self.facts.stages
        )
        ends = accumulate(positions[r] * widest * _dtype(self.shape).itemsize for r in self.ask.closer)
        return self.ask.closer[: max(1, sum(end <= self.max_stage_bytes for end in ends))]

    def _forget_all_but(self, requests: Sequence[int]) -> None:
        """Makes room: what was seen of others was right."""
        for (stage, r), keys in self._parts().items():
            if r not in requests:
                for key in keys:
                    self.archive.delete(self.facts.id, part_name(stage, r, key))

    def _has_all(self, index: int, tree: StageTree) -> bool:
        """Whether all of a stage's tensors are on disk."""
        return all(self.archive.holds(self.facts.id, trace_name(index, r)) for r in range(len(tree.nodes)))

    def _parts(self) -> dict[tuple[int, int], frozenset[str]]:
        """Tensors that lie on disk alone, by stage and request."""
        found: dict[tuple[int, int], set[str]] = {}
        for name in self.archive.names(self.facts.id):
            if name.endswith(".bits"):
                stage, request, key = name.removesuffix(".bits").split("-")
                found.setdefault((int(stage), int(request)), set()).add(key)
        return {place: frozenset(keys) for place, keys in found.items()}

    async def _document(self, name: str, path: str, stages: Sequence[int], parse: Callable[[bytes], T]) -> T:
        """A file of records: from disk, else from the first of `stages` that gives a right one."""
        try:
            kept = self.archive.read(self.facts.id, f"{name}.json")
            if kept is not None:
                return parse(kept)
        except (CorruptEvidence, ValueError) as error:  # or of a commitment in a block that is gone
            if self.http is None:
                raise
            log.error("downloading again: %s", error)
        reasons = []
        for index in dict.fromkeys(stages):
            try:
                body = bytes(await self._get(index, path, JSON_BYTES, self.end))
                parsed = parse(body)
            except (Unavailable, ValueError) as error:
                reasons.append(f"stage {index} at {self.facts.urls[index]}: {path}: {error}")
                continue
            self.archive.write(self.facts.id, f"{name}.json", body)
            return parsed
        raise Unavailable("; ".join(reasons))

    def _requests(self, body: bytes) -> tuple[Request, ...]:
        requests, job = parse_requests(body), self.facts.job
        for request in requests:
            validate_request(request, self.shape)
        _check(job.requests, job.requests_root, len(requests), RequestsTree(requests).root)
        return requests

    def _outputs(self, body: bytes) -> tuple[Output, ...]:
        outputs = parse_outputs(body)  # as told, lawful or not: what they break is for the audit to say
        if not all(output.tokens for output in outputs):
            raise ValueError("expected a token or more in each output")
        _check(self.facts.job.requests, self.facts.outputs_root, len(outputs), OutputsTree(outputs).root)
        return outputs

    def _tree(self, index: int, body: bytes) -> StageTree:
        tree = StageTree(parse_nodes(body))
        _check(self.facts.job.requests, self.facts.roots[index], len(tree.nodes), tree.root)
        return tree

    async def _stage(
        self, index: int, requests: Sequence[Request], wanted: set[tuple[int, int]] | None
    ) -> tuple[StageTree | None, str]:
        """The stage's records, and why its tensors are missing (empty if they are not).

        wanted: the requests and layers whose tensors are asked for; None: all.
        """
        tree = None
        try:
            tree = await self._document(f"nodes-{index}", "trace", (index,), lambda body: self._tree(index, body))
            if wanted is None:
                await self._tensors(index, tree.nodes, requests)
            else:
                await self._columns(index, tree.nodes, requests, wanted)
        except Unavailable as error:
            return tree, str(error)
        return tree, ""

    async def _columns(
        self, index: int, nodes: Sequence[TraceNode], requests: Sequence[Request], wanted: set[tuple[int, int]]
    ) -> None:
        """Brings the tensors of some requests at some layers to disk, with what those layers hand over."""
        who, stage = f"stage {index} at {self.facts.urls[index]}", self.facts.stages[index]
        keys: dict[int, set[str]] = {}
        for r, layer in wanted:
            if stage.first_layer <= layer < stage.end_layer:
                names = ("h", "q", "k", "v", "attn_out", "mlp_out")
                keys.setdefault(r, set()).update(f"{layer}.{name}" for name in names)
            after = "out" if layer + 1 == self.shape.layers else f"{layer + 1}.h"
            if stage.first_layer <= min(layer + 1, self.shape.layers - 1) < stage.end_layer:
                keys.setdefault(r, set()).add(after)
        if not keys:
            return
        self._measure(who, [(nodes[r].positions, requests[r], tuple(each)) for r, each in keys.items()])
        body = self.archive.read(self.facts.id, f"nodes-{index}.json")
        assert body is not None
        every = tensor_keys(self.shape, stage.first_layer, stage.end_layer)
        self.roots[index] = await asyncio.to_thread(TensorRoots, body, every)
        for r, each in sorted(keys.items()):
            roots = self.roots[index].of(r)
            if HashTree.of(list(roots.values())).root != nodes[r].tensors_root:
                raise Unavailable(f"{who}: request {r}: the roots served are not those committed to")
            for key in sorted(each):
                await self._column(index, r, key, nodes[r].positions, roots[key], who)

    async def _column(self, index: int, r: int, key: str, positions: int, root: bytes, who: str) -> None:
        name = part_name(index, r, key)
        if await asyncio.to_thread(self._kept, name):
            return
        rows = await self._tensor(index, r, key, positions, self.end)
        hasher = TensorHasher(rows.shape[1], rows.dtype.itemsize, is_tiled(key))
        hasher.append(rows)
        if hasher.finish() != root:
            raise Unavailable(f"{who}: request {r}: {key} as served is not what was committed to")
        await asyncio.to_thread(self.archive.write, self.facts.id, name, rows.tobytes())

    def _measure(self, who: str, tensors: Sequence[tuple[int, Request, Sequence[str]]]) -> int:
        """The bytes of tensors (positions, request, keys). Raises Unavailable for what no honest stage has, or is more
        than this watchtower takes.
        """
        total = 0
        for positions, request, keys in tensors:
            most = len(request.prompt) + request.limit - 1
            if not 1 <= positions <= most:
                raise Unavailable(f"{who}: expected 1 .. {most} positions of a request, came {positions}")
            total += positions * sum(tensor_width(self.shape, key) for key in keys) * _dtype(self.shape).itemsize
        if total > self.max_stage_bytes:
            raise Unavailable(f"{who}: its trace has {total} bytes, this watchtower takes {self.max_stage_bytes}")
        return total

    async def _tensors(self, index: int, nodes: Sequence[TraceNode], requests: Sequence[Request]) -> None:
        """Brings all requests' tensors of a stage to disk. Raises Unavailable."""
        who, stage, shape = f"stage {index} at {self.facts.urls[index]}", self.facts.stages[index], self.shape
        keys = tensor_keys(shape, stage.first_layer, stage.end_layer)
        every = [(node.positions, request, keys) for node, request in zip(nodes, requests, strict=True)]
        total = self._measure(who, every)
        now = asyncio.get_running_loop().time()
        end = min(self.end, now + STAGE_SECONDS + total / STAGE_BYTES_PER_SECOND)
        for r, node in enumerate(nodes):
            if await asyncio.to_thread(self._kept, trace_name(index, r)):
                continue
            arrays = {key: await self._tensor(index, r, key, node.positions, end) for key in keys}
            trace = RequestTrace(shape, stage.first_layer, stage.end_layer, arrays)
            if not await asyncio.to_thread(self._keep, index, r, trace, node):
                raise Unavailable(f"{who}: request {r}: the tensors served are not those committed to")

    def _keep(self, index: int, request: int, trace: RequestTrace, node: TraceNode) -> bool:
        """Saves tensors if they are those committed to."""
        right = trace.tensors_root == node.tensors_root
        if right:
            self.archive.save(self.facts.id, trace_name(index, request), trace)
        return right

    def _kept(self, name: str) -> bool:
        """Whether tensors are on disk. What is not downloaded anyway is read when it is needed."""
        if self.http is None:
            return self.archive.holds(self.facts.id, name)
        try:
            return bool(self.archive.trace_path(self.facts.id, name))
        except CorruptEvidence as error:
            log.error("downloading again: %s", error)
            return False
        except Unavailable:
            return False

    async def _tensor(self, index: int, request: int, key: str, positions: int, end: float) -> Any:
        """Raw bits [positions, width]."""
        width, dtype = tensor_width(self.shape, key), _dtype(self.shape)
        row = width * dtype.itemsize
        data = bytearray()
        while len(data) < positions * row:
            first = len(data) // row
            path = f"trace/{request}/{key}?first={first}&count={positions - first}"
            part = await self._get(index, path, positions * row - len(data), end)
            if not part or len(part) % row:
                raise Unavailable(f"{path}: expected whole rows of {row} bytes, came {len(part)} bytes")
            if data:
                data += part
            else:
                data = part
        return np.frombuffer(data, dtype).reshape(positions, width)

    async def _get(self, index: int, path: str, most: int, end: float) -> bytearray:
        """The body of an answer of at most `most` bytes. Raises Unavailable."""
        if self.http is None:
            raise Unavailable(f"{path}: not on disk")
        url = f"{self.facts.urls[index]}/jobs/{self.facts.id.hex()}/{path}"
        seconds = min(ANSWER_SECONDS, end - asyncio.get_running_loop().time())
        data = bytearray()
        try:
            async with asyncio.timeout(seconds), self.http.get(url, allow_redirects=False) as response:
                if response.status != 200:
                    raise Unavailable(f"{url}: expected 200, came {response.status}")
                async for part in response.content.iter_any():
                    data += part
                    if len(data) > most:
                        raise Unavailable(f"{url}: expected at most {most} bytes")
        except aiohttp.ServerTimeoutError as error:
            raise Unavailable(f"{url}: expected an answer, came {SILENCE_SECONDS:.0f} s of silence") from error
        except TimeoutError as error:
            raise Unavailable(f"{url}: expected an answer within {max(seconds, 0):.0f} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: a URL that no parser takes
            raise Unavailable(f"{url}: {type(error).__name__}: {error}") from error
        return data


@cache
def _certificates() -> ssl.SSLContext:
    """The usual roots, read once: it takes longer than a small download."""
    return ssl.create_default_context(cafile=certifi.where())


def _check(count: int, root: bytes, actual_count: int, actual_root: bytes) -> None:
    if (actual_count, actual_root) != (count, root):
        raise ValueError(f"expected {count} with root {root.hex()}, came {actual_count} with {actual_root.hex()}")


def _dtype(shape: ModelShape) -> np.dtype[Any]:
    return np.dtype("<u4") if shape.served_dtype == Dtype.FLOAT32 else np.dtype("<u2")
