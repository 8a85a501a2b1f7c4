"""A committed job of two stages whose data a small HTTP server gives out, well or badly: no worker process, no GPU.

The served tensors are the float64 reference's, rounded; `spoil` makes the last layer's MLP wrong at one position, with
all that follows from it, so that exactly one piece is wrong.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from eth_account.signers.local import LocalAccount

from bench import _tiny as tiny
from challenger.evidence import Facts
from contracts.client import Acceptance, Addresses, Chain, Claim, Job, Stage, Worker
from contracts.wire import request_json
from deploy.keys import dev_account
from verifier.commit import (
    Output,
    OutputsTree,
    Request,
    StageTree,
    TraceNode,
    make_outputs,
    requests_root,
    total_tokens,
)
from verifier.linear import Bits
from verifier.reference import Reference
from verifier.tolerance import Profile, uniform_profile
from verifier.trace import RequestTrace, tensor_keys
from verifier.vectors import add_bits
from verifier.weights import Weights, identify

REQUESTS = (Request((5, 6, 7), 3), Request((1, 2), 2, stops=(299,)))
SPOILT_REQUEST, SPOILT_POSITION = 0, 1
WORKERS, REQUESTER = (1, 2), 3  # development accounts
FUNDS, CLOCK_SECONDS = 10**24, 100


def model(folder: Path) -> tuple[Weights, Profile]:
    weights = tiny.make_weights(folder, tiny.config())
    profile = uniform_profile(weights.shape, 10, 1000, 1 << 14, 1 << 20)
    profile.save(folder)
    return weights, profile


@dataclass
class Served:
    """What the two stages committed to. traces[stage][request]."""

    requests: tuple[Request, ...]
    outputs: tuple[Output, ...]
    traces: tuple[tuple[RequestTrace, ...], ...]
    tokens: int

    @property
    def trees(self) -> list[StageTree]:
        return [StageTree([TraceNode(t.positions, t.tensors_root) for t in traces]) for traces in self.traces]


Maker = Callable[[Weights, list[int]], dict[str, Bits]]  # tokens fed in -> all layers' tensors


def serve(
    weights: Weights, spoil: bool = False, requests: Sequence[Request] = REQUESTS, make: Maker | None = None
) -> Served:
    """Greedy decoding, one request at a time. make: what the workers compute instead of the truth."""
    told, traces = [], []
    for r, request in enumerate(requests):
        tokens: list[int] = []
        while True:
            fed_in = [*request.prompt, *tokens]
            arrays = make(weights, fed_in) if make else _arrays(weights, fed_in, spoil and r == SPOILT_REQUEST)
            if len(tokens) == request.limit or (tokens and tokens[-1] in request.stops):
                break
            (tile,) = (tile for _, tile in Reference(weights).logits(arrays["out"][-1:]))
            tokens.append(int(tile[0].argmax()))
        told.append(tokens)
        fed = len(request.prompt) + len(tokens) - 1
        half = weights.shape.layers // 2
        traces.append([_slice(weights, arrays, first, first + half, fed) for first in (0, half)])
    outputs = tuple(make_outputs(told, requests))
    by_stage = tuple(tuple(pair[stage] for pair in traces) for stage in (0, 1))
    return Served(tuple(requests), outputs, by_stage, total_tokens(outputs))


def _arrays(weights: Weights, tokens: list[int], spoil: bool) -> dict[str, Bits]:
    arrays = tiny.honest_arrays(weights, tokens)
    if spoil:
        wrong = np.array(arrays["1.mlp_out"])
        wrong[SPOILT_POSITION, :256] ^= 0x80  # doubles or halves
        dtype = weights.shape.served_dtype
        arrays["1.mlp_out"] = wrong
        arrays["out"] = add_bits(dtype, add_bits(dtype, arrays["1.h"], arrays["1.attn_out"]), wrong)
    return arrays


def _slice(weights: Weights, arrays: dict[str, Bits], first: int, end: int, positions: int) -> RequestTrace:
    keys = tensor_keys(weights.shape, first, end)
    return RequestTrace(weights.shape, first, end, {key: arrays[key][:positions] for key in keys})


Misbehaviour = Callable[[BaseHTTPRequestHandler, str], bool]


@dataclass
class Hall:
    """The workers' HTTP side: stage s at `url(s)`. misbehave: called first; True if it has dealt with the request."""

    served: dict[str, Served] = field(default_factory=dict)  # by job, hex
    misbehave: Misbehaviour = lambda handler, path: False
    info: dict[str, Any] = field(default_factory=dict)
    handed_over: list[Any] = field(default_factory=list)

    def __enter__(self) -> "Hall":
        hall = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if not hall.misbehave(self, self.path):
                    hall.answer(self)

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if not hall.misbehave(self, self.path):
                    hall.handed_over.append(json.loads(body))
                    say(self, b"{}")

            def log_message(self, format: str, *args: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def url(self, stage: int) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/s{stage}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path, _, query = handler.path.partition("?")
        parts = path.strip("/").split("/")
        if parts[1] == "info":
            say(handler, json.dumps(self.info).encode())
            return
        stage, job = int(parts[0][1:]), self.served[parts[2]]
        match parts[3:]:
            case []:
                say(handler, json.dumps({"phase": "finished", "reason": ""}).encode())
            case ["requests"]:
                say(handler, json.dumps({"requests": [request_json(r) for r in job.requests]}).encode())
            case ["outputs"]:
                told = [{**vars(o), "tokens": list(o.tokens)} for o in job.outputs]
                say(handler, json.dumps({"outputs": told}).encode())
            case ["trace"]:
                told = [
                    {
                        "positions": trace.positions,
                        "tensors_root": trace.tensors_root.hex(),
                        "roots": {name: trace.tensor_root(name).hex() for name in trace.keys},
                    }
                    for trace in job.traces[stage]
                ]
                say(handler, json.dumps({"stage": stage, "requests": told}).encode())
            case ["trace", request, key]:
                given = dict(item.split("=") for item in query.split("&"))
                first = int(given["first"])
                say(handler, job.traces[stage][int(request)].arrays[key][first : first + 4].tobytes())  # four at most
            case _:
                say(handler, b"{}", 404)


def say(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200) -> bool:
    """Answers; True, as a misbehaviour that dealt with the request."""
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)
    return True


def facts(weights: Weights, served: Served, hall: Hall, id: bytes = b"\x07" * 32) -> Facts:
    """What a chain would say, without one."""
    hall.served[id.hex()] = served
    half = weights.shape.layers // 2
    stages = tuple(Stage(dev_account(w).address, s * half, (s + 1) * half, 5000) for s, w in enumerate(WORKERS))
    root = OutputsTree(served.outputs).root
    roots = tuple(tree.root for tree in served.trees)
    job = make_job(bytes(32), bytes(32), served, 0, 1)
    return Facts(id, job, stages, (hall.url(0), hall.url(1)), root, served.tokens, roots)


def make_job(model: bytes, pipeline: bytes, served: Served, now: int, nonce: int) -> Job:
    return Job(
        model=model,
        pipeline=pipeline,
        requests_root=requests_root(served.requests),
        requests=len(served.requests),
        prompt_tokens=sum(len(request.prompt) for request in served.requests),
        max_tokens=sum(request.limit for request in served.requests),
        prompt_price=1000,
        token_price=2000,
        lock=10**9,
        gas_rate=10,
        accept_by=now + 1000,
        commit_by=now + 2000,
        window=600,
        clock=CLOCK_SECONDS,
        grace=5,
        nonce=nonce,
    )


@dataclass
class Town:
    """A deployment with two registered workers behind one hall."""

    url: str
    addresses: Addresses
    hall: Hall
    weights: Weights
    profile: Profile
    nonce: int = 0
    model: bytes = b""
    pipeline: bytes = b""

    def chain(self, index: int) -> Chain:
        return Chain(self.url, self.addresses, dev_account(index), patience_seconds=2)

    def signer(self, stage: int) -> LocalAccount:
        return dev_account(WORKERS[stage])

    def settle_in(self) -> None:
        for stage, index in enumerate(WORKERS):
            chain = self.chain(index)
            chain.token.mint(chain.account, FUNDS)
            chain.token.approve(self.addresses.workers, FUNDS)
            chain.workers.register(Worker(chain.account, bytes([index]) * 32, self.hall.url(stage)))
            chain.workers.stake(FUNDS)
        requester = self.requester = self.chain(REQUESTER)
        requester.token.mint(requester.account, FUNDS)
        requester.token.approve(self.addresses.escrow, FUNDS)
        self.model = requester.models.register(identify(self.weights, self.profile))
        stages = tuple(Stage(self.signer(s).address, s, s + 1, 5000) for s in (0, 1))
        name = requester.workers.pipeline_id(self.model, stages, 1)
        joins = [requester.sign_join(name, self.signer(s)) for s in (0, 1)]
        self.pipeline = requester.workers.create_pipeline(self.model, stages, 1, joins)
        self.hall.info = {
            "model": self.model.hex(),
            "max_positions": self.weights.shape.max_positions,
            "min_prompt_price": "0",
            "min_token_price": "0",
            "min_gas_rate": "0",
        }

    def commit(self, served: Served, **changes: Any) -> bytes:
        """A job in its window, with its data in the hall."""
        chain = self.requester
        self.nonce += 1
        job = make_job(self.model, self.pipeline, served, chain.block_timestamp(), self.nonce)
        id = chain.escrow.open(replace(job, **changes))
        self.finish(id, served)
        return id

    def finish(self, id: bytes, served: Served) -> None:
        """Both stages accept and commit."""
        chain = self.requester
        self.hall.served[id.hex()] = served
        signed = [chain.sign_accept(id, s, self.model, self.signer(s)) for s in (0, 1)]
        chain.escrow.accept(id, [Acceptance(s, signature) for s, signature in enumerate(signed)])
        claims = []
        for s, tree in enumerate(served.trees):
            told = (OutputsTree(served.outputs).root, served.tokens) if s == 1 else (bytes(32), 0)
            signature = chain.sign_commit(id, self.pipeline, s, self.model, tree.root, *told, key=self.signer(s))
            claims.append(Claim(s, tree.root, *told, signature))
        chain.escrow.commit(id, claims)


def until(true: Callable[[], bool], seconds: float = 300.0) -> None:
    """Waits for something that other threads do."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "expected it to happen by now"
        time.sleep(0.1)
