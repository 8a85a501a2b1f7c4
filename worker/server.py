"""The worker's HTTP side (docs/protocol.md, "Between parties"). Nothing here is secret and nobody is trusted: bodies
are bounded, signatures are given only for what the worker has checked, and traces are what it committed to anyway.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import asdict, astuple
from threading import Lock
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from contracts.client import ContractsError
from contracts.client import Stage as PipelineStage
from contracts.wire import WireError, parse_requests
from verifier.commit import make_outputs
from verifier.trace import tensor_keys
from worker.agent import Agent
from worker.errors import Refused, UnknownJob, WorkerError
from worker.job import JobFolder, JobState, Phase
from worker.recorder import load_roots

log = logging.getLogger("plumb.worker.server")

ANSWER_BYTES = 4 * 2**20  # most raw rows in one answer
SMALL_BODY_BYTES = 64 * 2**10  # of everything but prompts
REQUEST_BYTES, TOKEN_BYTES = 2**12, 2**5  # of prompts as JSON: a request without its tokens, a token
SERVED = (Phase.SEALED, Phase.FINISHED, Phase.CLOSED)


class TooLarge(WorkerError):
    pass


def create_app(agent: Agent) -> FastAPI:
    app = FastAPI(title="Plumb worker", docs_url=None, redoc_url=None, openapi_url=None)
    config = agent.config
    # SAFETY: of those who ask for what is computed again, one at a time stands before a game's own question. And what
    # takes long runs in threads: from the event loop come the heartbeats.
    strangers = Lock() if config.serving.retain == "regenerate" else nullcontext()

    def answer(status: int) -> Callable[[Request, Exception], Awaitable[Response]]:
        async def handle(_request: Request, error: Exception) -> Response:
            return JSONResponse({"error": str(error)}, status_code=status)

        return handle

    app.add_exception_handler(UnknownJob, answer(404))
    app.add_exception_handler(Refused, answer(409))
    app.add_exception_handler(WireError, answer(409))
    app.add_exception_handler(TooLarge, answer(413))
    app.add_exception_handler(ContractsError, answer(503))
    app.add_exception_handler(OSError, answer(507))  # the disk's

    @app.get("/info")
    async def info() -> dict[str, Any]:
        return {
            "account": agent.account,
            "signer": agent.signer.address,
            "certificate": agent.certificate.decode(),
            "grpc": config.grpc_public or config.grpc,
            "model": agent.model_id.hex(),
            "first_layer": config.first_layer,
            "end_layer": config.end_layer,
            "max_positions": agent.room.most_positions,
            "min_prompt_price": str(config.policy.min_prompt_price),
            "min_token_price": str(config.policy.min_token_price),
            "min_gas_rate": str(config.policy.min_gas_rate),
        }

    @app.post("/pipelines/join")
    async def join(request: Request) -> dict[str, Any]:
        body = _json(await _body(request, SMALL_BODY_BYTES))
        try:
            model = _bytes32(body["model"])
            stages = tuple(
                PipelineStage(str(s["worker"]), int(s["first_layer"]), int(s["end_layer"]), int(s["share_bps"]))
                for s in body["stages"]
            )
            nonce = int(body["nonce"])
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(
                f"expected model, stages (worker, first_layer, end_layer, share_bps) and nonce: {error!r}"
            ) from error
        return {"signature": (await agent.join(model, stages, nonce)).hex()}

    @app.put("/jobs/{job}")
    async def put_requests(job: str, request: Request) -> dict[str, Any]:
        id = _bytes32(job)
        terms = (await agent.engagement(id)).job  # SAFETY: nobody's body is read for a job that nobody has funded
        told = SMALL_BODY_BYTES + REQUEST_BYTES * terms.requests + TOKEN_BYTES * terms.prompt_tokens
        body = await _body(request, min(told, config.serving.max_body_bytes))
        requests = await asyncio.to_thread(parse_requests, body)
        await agent.take_requests(id, requests)
        return {"job": id.hex(), "requests": len(requests)}

    @app.get("/jobs/{job}/requests")
    def get_requests(job: str) -> Response:
        return Response(agent.folder(_bytes32(job)).requests_json(), media_type="application/json")

    @app.post("/jobs/{job}/accept")
    async def accept(job: str) -> dict[str, Any]:
        stage, signature = await agent.accept(_bytes32(job))
        return {"stage": stage, "signature": signature.hex()}

    @app.post("/jobs/{job}/move/{pipeline}")
    async def move(job: str, pipeline: str) -> dict[str, Any]:
        consent = await agent.consent(_bytes32(job), _bytes32(pipeline))
        return {"until": consent.until, "signature": consent.signature.hex()}

    @app.get("/jobs/{job}/tokens")
    async def tokens(job: str) -> Response:
        """Of each request so far, at stage 0 and the last: nothing is committed to yet."""
        told = (await agent.engagement(_bytes32(job))).tokens
        return await asyncio.to_thread(JSONResponse, {"tokens": told})

    @app.post("/jobs/{job}/commit")
    async def commit(job: str) -> dict[str, Any]:
        claim = await agent.claim(_bytes32(job))
        return {
            "stage": claim.stage,
            "root": claim.root.hex(),
            "outputs": claim.outputs.hex(),
            "tokens": claim.tokens,
            "signature": claim.signature.hex(),
        }

    @app.get("/jobs/{job}")
    async def status(job: str) -> dict[str, Any]:
        id = _bytes32(job)
        state = agent.state(id)
        return {
            "held_seconds": agent.held_seconds(id),
            "room": astuple(config.serving.bounds),
            "phase": str(state.phase),
            "stage": state.stage,
            "stages": state.stages,
            "attempt": state.attempt,
            "reason": state.reason,
            "root": state.root.hex(),
        }

    def served(job: str) -> tuple[JobFolder, JobState]:
        folder = agent.folder(_bytes32(job))
        state = folder.load_state()
        if not state.nodes:
            raise Refused(f"expected a finished job, it is {state.phase}")
        return folder, state

    @app.get("/jobs/{job}/trace")
    def trace(job: str) -> Response:
        folder, state = served(job)
        keys = tensor_keys(agent.stage.shape, config.first_layer, config.end_layer)
        requests = [
            {
                "positions": node.positions,
                "tensors_root": node.tensors_root.hex(),
                "roots": {key: root.hex() for key, root in roots.items()},
            }
            for node, roots in zip(state.nodes, load_roots(folder.path, keys), strict=True)
        ]
        return JSONResponse(
            {
                "stage": state.stage,
                "first_layer": config.first_layer,
                "end_layer": config.end_layer,
                "dtype": int(agent.stage.shape.served_dtype),
                "root": state.root.hex(),
                "requests": requests,
            }
        )

    @app.get("/jobs/{job}/trace/{request}/{tensor}")
    def rows(job: str, request: int, tensor: str, first: int = 0, count: int | None = None) -> Response:
        """Raw rows from `first`; as many of `count` as ANSWER_BYTES hold, their number in X-Plumb-Rows."""
        folder, state = served(job)
        if state.phase is Phase.CLOSED:
            raise Refused("the job is over, and its traces are gone")
        if not 0 <= request < len(state.nodes):
            raise Refused(f"expected a request below {len(state.nodes)}, came {request}")
        if tensor not in tensor_keys(agent.stage.shape, config.first_layer, config.end_layer):
            raise Refused(f"tensor {tensor!r} is not of this stage")
        with strangers:
            array = agent.traces.load(folder, request).arrays[tensor]
        if not 0 <= first < len(array) or (count is not None and count < 1):
            raise Refused(f"expected rows within {len(array)}, came {first} and {count}")
        most = max(1, ANSWER_BYTES // (array.shape[1] * array.itemsize))
        part = array[first : first + min(most, count or most)]
        headers = {"X-Plumb-Rows": str(len(part)), "X-Plumb-Width": str(array.shape[1])}
        return Response(part.tobytes(), media_type="application/octet-stream", headers=headers)

    @app.get("/jobs/{job}/outputs")
    def outputs(job: str) -> Response:
        folder, state = served(job)
        if not state.tokens:
            raise Refused("only stage 0 and the last stage hold the outputs")
        outputs = make_outputs(state.tokens, folder.load_requests())
        return JSONResponse({"outputs": [asdict(output) for output in outputs]})

    return app


def _bytes32(text: Any) -> bytes:
    """Raises Refused."""
    try:
        value = bytes.fromhex(str(text).removeprefix("0x"))
    except ValueError as error:
        raise Refused(f"expected 32 bytes in hex, came {str(text)[:80]!r}") from error
    if len(value) != 32:
        raise Refused(f"expected 32 bytes in hex, came {len(value)}")
    return value


async def _body(request: Request, most: int) -> bytes:
    """Read no further than `most` bytes. Raises TooLarge."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise TooLarge(f"expected a body of at most {most} bytes")
        parts.append(part)
    return b"".join(parts)


def _json(body: bytes) -> Any:
    """Raises Refused."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"expected JSON: {error}") from error
