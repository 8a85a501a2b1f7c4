"""A served batch on a local chain: a small random model, two stages, one layer each, two requests.

The served tensors are random but for what the exact segments judge, so every tolerance segment is wrong under a tight
profile and right under a loose one: one trace makes both a guilty and an innocent pipeline.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from eth_account.signers.local import LocalAccount
from safetensors.torch import save_file

from bench._court import CLOCK_SECONDS, GRACE_SECONDS, in_window
from contracts.client import Addresses, Chain, Stage, Worker
from deploy.keys import dev_account
from verifier import link, vectors
from verifier.canonical import Case
from verifier.commit import Output, OutputsTree, RecordTree, Request, RequestsTree, StageTree, TraceNode
from verifier.game import Segment
from verifier.program import Kind, ModelShape, WeightLayout, shape_from_config
from verifier.referee.codec import GREEDY, Model, Opening
from verifier.safetensors_file import Bits
from verifier.tolerance import Profile, uniform_profile
from verifier.trace import RequestTrace, tensor_keys, tensor_width
from verifier.weights import Weights, identify

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 320,  # two blocks, the second shorter
    "intermediate_size": 33 * 256,  # a sum of 33 chunks: two lists; 132 leaves: two lists of nodes
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 300,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
STOP = 299
LONG = Request(prompt=tuple(i % 290 for i in range(590)), limit=11, stops=(STOP,))
LONG_TOKENS = tuple(range(100, 111))
SHORT = Request(prompt=(1, 2), limit=5, stops=(STOP, 298))
SHORT_TOKENS = (7, STOP)
REQUESTS = (SHORT, LONG)
LONG_AT = 1  # its index
POSITION = 597  # of it: WSUM has 75 chunks there, two lists; MAX and SUM three; heads are padded to 768
OUTPUT_AT = 7  # a place among its tokens
LONG_OUTPUT = Output(2, len(LONG_TOKENS), 2, LONG_TOKENS)
NO_TOKEN = 0xFFFFFFFF  # STOP: no token is shown
# What the short request's output may be wrong in, and the token that shows it.
BROKEN = {
    "code 3": (Output(0, 2, 3, SHORT_TOKENS), NO_TOKEN),
    "limit not reached": (Output(0, 2, 2, SHORT_TOKENS), NO_TOKEN),
    "over the limit": (Output(0, 6, 1, (1, 2, 3, 4, 5, STOP)), NO_TOKEN),
    "positions": (Output(0, 3, 1, (7, 8, STOP)), NO_TOKEN),
    "no tokens": (Output(0, 0, 1, (7,)), NO_TOKEN),
    "last token no stop id": (Output(0, 2, 1, (7, 8)), 1),
    "stop id too early": (Output(0, 2, 1, (298, STOP)), 0),
    "beyond the vocabulary": (Output(0, 2, 1, (9999, STOP)), 0),
    "more tokens than counted": (Output(0, 2, 1, (7, STOP, 9)), 1),
}
WORKERS = (1, 2)  # development accounts; their signers are these plus 10
REQUESTER, CHALLENGER, STRANGER = 3, 4, 5


def write_model(folder: Path, **changes: Any) -> Path:
    """Random bfloat16 weights. changes: of CONFIG; the vocabulary must hold the batch's tokens."""
    random = torch.Generator().manual_seed(7)
    told = CONFIG | changes
    (folder / "config.json").write_text(json.dumps(told), encoding="utf-8")
    shape = shape_from_config(told)
    tensors = {}
    for place in WeightLayout(shape).tensors:
        size = (place.cols,) if "norm" in place.name else (place.rows, place.cols)
        tensors[place.name] = (torch.randn(size, generator=random) * 0.05).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    return folder


@dataclass(frozen=True)
class Served:
    """What a pipeline commits to. outputs as records so that a test may commit to nonsense."""

    traces: tuple[tuple[RequestTrace, RequestTrace], ...]  # by request, then stage
    outputs: tuple[bytes, ...]
    tokens: int
    ids: tuple[tuple[int, ...], ...] = (SHORT_TOKENS, LONG_TOKENS)  # output tokens by request

    @cached_property
    def stage_trees(self) -> tuple[StageTree, ...]:
        nodes = [[TraceNode(pair[s].positions, pair[s].tensors_root) for pair in self.traces] for s in (0, 1)]
        return tuple(StageTree(each) for each in nodes)

    @cached_property
    def outputs_tree(self) -> RecordTree:
        return RecordTree(self.outputs)


def serve(
    weights: Weights,
    changes: Mapping[tuple[int, str], tuple[int, int]] | None = None,
    extra_positions: tuple[int, int] = (0, 0),
    outputs: Sequence[Output] | None = None,
    fed: Mapping[int, int] | None = None,
) -> Served:
    """changes: (request, tensor key) -> (position, column) of a bit that flips after everything else was computed.

    extra_positions: how many more each stage holds of the short request; fed: position of the long request -> the
    token that stage 0 really embeds there.
    """
    made = tuple(outputs) if outputs else (Output(0, 2, 1, SHORT_TOKENS), Output(2, 11, 2, LONG_TOKENS))
    traces = []
    for r, (request, ids) in enumerate(zip(REQUESTS, (SHORT_TOKENS, LONG_TOKENS), strict=True)):
        tokens = [*request.prompt, *ids[:-1]]
        if r == LONG_AT:
            for position, token in (fed or {}).items():
                tokens[position] = token
        arrays = _arrays(weights, tokens, seed=r)
        for (which, key), (position, column) in (changes or {}).items():
            if which == r:
                arrays[key] = arrays[key].copy()
                arrays[key][position, column] ^= 1
        extra = (0, 0) if r == LONG_AT else extra_positions
        traces.append((_trace(weights.shape, arrays, 0, extra[0]), _trace(weights.shape, arrays, 1, extra[1])))
    records = tuple(output.record(r) for r, output in enumerate(made))
    return Served(tuple(traces), records, made[-1].start + made[-1].count, tuple(output.tokens for output in made))


def _arrays(weights: Weights, tokens: Sequence[int], seed: int) -> dict[str, Bits]:
    random = torch.Generator().manual_seed(seed)
    shape, count = weights.shape, len(tokens)

    def noise(key: str) -> Bits:
        values = torch.randn((count, tensor_width(shape, key)), generator=random).to(torch.bfloat16)
        return values.view(torch.uint16).numpy()

    arrays = {key: noise(key) for layer in (0, 1) for key in tensor_keys(shape, layer, layer + 1)}
    embeddings: Bits = weights.raw("model.embed_tokens.weight")
    arrays["0.h"] = embeddings[list(tokens)].astype(np.uint16)
    for layer, after in ((0, "1.h"), (1, "out")):
        middle = vectors.add_bits(shape.served_dtype, arrays[f"{layer}.h"], arrays[f"{layer}.attn_out"])
        arrays[after] = vectors.add_bits(shape.served_dtype, middle, arrays[f"{layer}.mlp_out"])
    return arrays


def _trace(shape: ModelShape, arrays: Mapping[str, Bits], layer: int, extra: int) -> RequestTrace:
    chosen = {key: arrays[key] for key in tensor_keys(shape, layer, layer + 1)}
    longer = {key: np.concatenate([rows, rows[-1:].repeat(extra, axis=0)]) for key, rows in chosen.items()}
    return RequestTrace(shape, layer, layer + 1, longer)


@dataclass
class Market:
    """The parties' doors to one deployment, and the model under its profiles."""

    url: str
    addresses: Addresses
    weights: Weights
    _chains: dict[int, Chain] = field(default_factory=dict)
    _nonce: int = 0

    def chain(self, index: int) -> Chain:
        if index not in self._chains:
            self._chains[index] = Chain(self.url, self.addresses, dev_account(index), patience_seconds=5)
        return self._chains[index]

    def signer(self, stage: int) -> LocalAccount:
        return dev_account(WORKERS[stage] + 10)

    def settle_in(self) -> None:
        """Workers stake, requester and challenger fund themselves."""
        funds = 10**30
        for stage, index in enumerate(WORKERS):
            chain = self.chain(index)
            chain.token.mint(chain.account, funds)
            chain.token.approve(self.addresses.workers, funds)
            chain.workers.register(Worker(self.signer(stage).address, bytes([index]) * 32, f"http://127.0.0.1:{index}"))
            chain.workers.stake(funds)
        for index, spender in ((REQUESTER, self.addresses.escrow), (CHALLENGER, self.addresses.disputes)):
            chain = self.chain(index)
            chain.token.mint(chain.account, funds)
            chain.token.approve(spender, funds)

    def profile(self, tight: bool) -> Profile:
        if tight:
            return uniform_profile(self.weights.shape, 1, 1000, 1 << 10, 1 << 10)
        return uniform_profile(self.weights.shape, (1 << 32) - 1, 1, 1 << 49, 1 << 49)

    def batch(self, tight: bool, served: Served, requests: tuple[Request, ...] = REQUESTS) -> "Batch":
        """A job in its window. tight: under the profile nothing random passes; requests: with REQUESTS' prompts."""
        unplaced = self.unplaced(tight, served, requests)
        model = unplaced.model
        requester = self.chain(REQUESTER)
        model_id = requester.models.register(model)
        self._nonce += 1
        stages = tuple(Stage(self.chain(w).account, s, s + 1, 5000) for s, w in enumerate(WORKERS))
        name = requester.workers.pipeline_id(model_id, stages, self._nonce)
        joins = [requester.sign_join(name, self.signer(s)) for s in (0, 1)]
        pipeline = requester.workers.create_pipeline(model_id, stages, self._nonce, joins)
        at = in_window(
            requester,
            [self.signer(s) for s in (0, 1)],
            [tree.root for tree in served.stage_trees],
            served.outputs_tree.root,
            served.tokens,
            model=model_id,
            pipeline=pipeline,
            requests_root=RequestsTree(requests).root,
            requests=len(REQUESTS),
            prompt_tokens=sum(len(request.prompt) for request in REQUESTS),
            max_tokens=sum(request.limit for request in REQUESTS),
            clock=CLOCK_SECONDS,
            grace=GRACE_SECONDS,
            nonce=self._nonce,
        )
        return replace(unplaced, job=at)

    def unplaced(self, tight: bool, served: Served, requests: tuple[Request, ...] = REQUESTS) -> "Batch":
        """The same without a job, to compute with."""
        profile = self.profile(tight)
        return Batch(bytes(32), served, identify(self.weights, profile), profile, self.weights, requests)


@dataclass(frozen=True)
class Batch:
    """A committed job with all its data."""

    job: bytes
    served: Served
    model: Model
    profile: Profile
    weights: Weights
    requests: tuple[Request, ...] = REQUESTS

    def segment(self, kind: Kind, stage: int, layer: int, position: int, unit: int, request: int = LONG_AT) -> Segment:
        return Segment(self.job, stage, kind, request, layer, position, unit)

    def case(self, segment: Segment, token: int = 0) -> Case:
        """The truth of a challenged segment."""
        trace = self.served.traces[segment.request][segment.stage]
        sampling = self.requests[segment.request].sampling(segment.request) if segment.kind == Kind.SAMPLE else GREEDY
        return Case(self.model, self.weights, self.profile, segment, trace, token, sampling)

    def piece(self, kind: Kind, guilty: bool, position: int = POSITION, unit: int = 1) -> tuple[Segment, Case]:
        """A challenged segment that is wrong or right, and the truth about it. TOKEN and SAMPLE are at an output's
        position and search for a competitor. Raises ValueError if there is none.
        """
        by_token = kind in (Kind.TOKEN, Kind.SAMPLE)
        at = len(LONG.prompt) - 1 + OUTPUT_AT if by_token else position
        layer = int(by_token)
        for competitor in range(self.weights.shape.vocabulary) if by_token else (unit,):
            segment = self.segment(kind, layer, layer, at, competitor)
            case = self.case(segment, LONG_TOKENS[OUTPUT_AT] if by_token else 0)
            if case.verdict() == guilty:
                return segment, case
        raise ValueError(f"expected a {kind.name} that is {'wrong' if guilty else 'right'}, found none at {at}")

    def node(self, stage: int, request: int = LONG_AT) -> Opening:
        return self.served.stage_trees[stage].opening(request)

    def header(self, kind: Kind) -> Opening:
        return Opening(self.weights.program.headers[kind].encode(), tuple(self.weights.program.tree.prove(kind)))

    def instruction(self, kind: Kind) -> Opening:
        first = self.weights.program.headers[kind].first
        return Opening(self.weights.program.segments[kind][0].encode(), tuple(self.weights.program.tree.prove(first)))

    def request(self, request: int = LONG_AT) -> Opening:
        return RequestsTree(self.requests).record_opening(request)

    def output(self, request: int = LONG_AT) -> Opening:
        return self.served.outputs_tree.opening(request)

    def output_token(self, place: int, request: int = LONG_AT) -> Opening:
        tokens = self.served.ids[request]
        outputs = OutputsTree([Output(0, len(tokens), 1, tokens)])
        return outputs.token_opening(0, place)

    def evidence(self, segment: Segment) -> list[Opening]:
        """What `challenge` wants."""
        kind = Kind(segment.kind)
        first = [self.node(segment.stage, segment.request), self.header(kind)]
        if kind not in (Kind.TOKEN, Kind.SAMPLE):
            return first
        place = segment.position + 1 - len(REQUESTS[segment.request].prompt)
        token = self.output_token(place, segment.request)
        return [*first, self.request(segment.request), self.output(segment.request), token]

    def shown(self, segment: Segment) -> list[Opening]:
        """What `show` wants. LINK of layer 0 is judged at the boundary of the two stages."""
        request, stage = segment.request, segment.stage
        match Kind(segment.kind):
            case Kind.EMBED:
                prompt = self.requests[request].prompt
                first = [self.node(stage, request), self.request(request)]
                if segment.position < len(prompt):
                    fed = [RequestsTree(self.requests).token_opening(request, segment.position)]
                    token = prompt[segment.position]
                else:
                    place = segment.position - len(prompt)
                    fed = [self.output(request), self.output_token(place, request)]
                    token = self.served.ids[request][place]
                return [*first, *fed, *self.judged(segment, token=token)]
            case Kind.LINK if segment.layer == 0:
                return [self.node(0, request), self.node(1, request), *self.linked(segment, 0)]
            case Kind.LINK:
                return [self.node(stage, request), *self.linked(segment, stage)]
            case Kind.STOP:
                records = [self.request(request), self.output(request), self.node(stage, request)]
                return records if segment.unit == NO_TOKEN else [*records, self.output_token(segment.unit, request)]
            case Kind.BILL:
                return [self.output(r) for r in range(request, min(request + 2, len(self.requests)))]
            case Kind.LENGTH:
                return [self.node(stage, request), self.node(stage - 1, request)]
        raise ValueError(f"expected an exact segment, got {segment}")

    def premises(self, segment: Segment) -> list[Opening]:
        """What `prepare` wants before a LINK is shown; of other segments nothing."""
        if segment.kind != Kind.LINK:
            return []
        request, sender = segment.request, 0 if segment.layer == 0 else segment.stage
        return [self.node(sender, request), *link.premises(segment, self.served.traces[request][sender])]

    def linked(self, segment: Segment, sender: int) -> list[Opening]:
        """The numbers that `show` wants of a LINK. sender: the stage that holds the layer."""
        traces = self.served.traces[segment.request]
        return link.conclusion(segment, traces[sender], traces[segment.stage])

    def judged(self, segment: Segment, token: int = 0) -> list[Opening]:
        """Header, instruction and openings of EMBED."""
        kind, case = Kind(segment.kind), self.case(segment, token)
        return [self.header(kind), self.instruction(kind), *case.openings(0, 0)]
