"""The other workers, as the chain names them: their HTTP endpoints, and their pinned certificates."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx

from contracts.client import Chain, Claim, Consent, ContractsError, Stage
from contracts.wire import WireError, parse_requests
from verifier.commit import Request
from worker import tls
from worker.channel import Peer
from worker.config import Bounds, Serving
from worker.errors import PeerFault
from worker.job import Phase
from worker.settle import stage_name

log = logging.getLogger("plumb.worker.peers")

SMALL_ANSWER_BYTES = 64 * 2**10
TIMEOUT = httpx.Timeout(30.0, connect=5.0)
PINNED_SECONDS = 60.0  # for which a certificate that the chain named stays a stage's own


class Peers:
    """Blocking chain reads happen in the caller's thread: call `locate` off the event loop. Every method raises
    PeerFault naming who is at fault.
    """

    def __init__(self, chain: Chain, hosts: tuple[str, ...], max_body_bytes: int) -> None:
        """hosts: if not empty, the only ones that are ever asked; URLs on chain are anybody's."""
        self._chain = chain
        self._hosts = hosts
        self._max_body_bytes = max_body_bytes
        self._pinned: dict[tuple[str, bytes], float] = {}  # account and fingerprint -> until when
        self._client = httpx.AsyncClient(timeout=TIMEOUT, follow_redirects=False, trust_env=False)

    async def close(self) -> None:
        await self._client.aclose()

    def locate(self, index: int, stage: Stage) -> tuple[str, bytes]:
        """(URL, certificate fingerprint) of a stage, from the chain."""
        worker = self._chain.workers.worker(stage.worker)
        try:
            parts = urlsplit(worker.url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            good = False
        if not good:
            raise PeerFault(stage_name(index, stage), f"its URL on chain is none: {worker.url[:100]!r}")
        if self._hosts and parts.hostname not in self._hosts:
            raise PeerFault(stage_name(index, stage), f"its host {parts.hostname} is not among ours")
        return worker.url.rstrip("/"), worker.tls

    async def is_stage(self, peer: Peer, index: int, stage: Stage) -> bool:
        """SAFETY: by its certificate. Who registers another's has no key to it, and takes nothing but the name that the
        other was admitted by.
        """
        if peer.account == stage.worker:
            return True
        # Such a one must not make each message of the other cost a question to the chain.
        known = stage.worker, tls.fingerprint(peer.certificate)
        if self._pinned.get(known, 0) > time.monotonic():
            return True
        try:
            _, pinned = await asyncio.to_thread(self.locate, index, stage)
        except PeerFault:
            return False
        if known[1] == pinned:
            self._pinned[known] = time.monotonic() + PINNED_SECONDS
        return known[1] == pinned

    async def identity(self, name: str, account: str, url: str, fingerprint: bytes) -> tuple[Peer, str]:
        """The peer with its certificate checked against the chain, and its gRPC address. Raises UnpinnedCertificate
        too.
        """
        info = await self._ask(name, "GET", f"{url}/info", SMALL_ANSWER_BYTES)
        certificate, address = info.get("certificate"), info.get("grpc")
        if not isinstance(certificate, str) or not isinstance(address, str):
            raise PeerFault(name, "its /info lacks certificate or grpc")
        try:
            pem = tls.pinned(certificate.encode(), fingerprint, name)
        except ValueError as error:
            raise PeerFault(name, str(error)) from error
        return Peer(name, account, pem), address

    async def requests(self, name: str, url: str, job: bytes) -> tuple[Request, ...]:
        body = await self._fetch(name, "GET", f"{url}/jobs/{job.hex()}/requests", self._max_body_bytes)
        try:
            return parse_requests(body)
        except WireError as error:
            raise PeerFault(name, str(error)) from error

    async def acceptance(self, name: str, url: str, job: bytes) -> bytes:
        """Its signature; PeerFault with its reason if it refuses."""
        return _hex(
            name, await self._ask(name, "POST", f"{url}/jobs/{job.hex()}/accept", SMALL_ANSWER_BYTES), "signature"
        )

    async def consent(self, name: str, url: str, job: bytes, pipeline: bytes, patience_seconds: float) -> Consent:
        """To the job's move to `pipeline`; PeerFault with its reason if it refuses."""
        where = f"{url}/jobs/{job.hex()}/move/{pipeline.hex()}"
        async with _patience(name, patience_seconds):
            body = await self._ask(name, "POST", where, SMALL_ANSWER_BYTES)
        until = body.get("until")
        if type(until) is not int or not 0 <= until < 2**64:
            raise PeerFault(name, f"expected unix seconds, came {str(until)[:80]!r}")
        return Consent(until, _hex(name, body, "signature"))

    async def well(self, name: str, url: str, job: bytes, serving: Serving) -> Bounds:
        """Its room for a job, if it answers at once and gets on with its work. Raises PeerFault."""
        async with _patience(name, serving.silence_seconds):
            body = await self._ask(name, "GET", f"{url}/jobs/{job.hex()}", SMALL_ANSWER_BYTES)
        held, phase = body.get("held_seconds"), body.get("phase")
        if type(held) is not float or held > serving.slow_seconds:
            raise PeerFault(name, f"has had a microbatch for {str(held)[:20]} s")
        if phase == Phase.FAILED:
            raise PeerFault(name, f"has failed: {str(body.get('reason'))[:500]}")
        room = body.get("room")
        try:
            if not isinstance(room, list) or len(room) != 4 or not all(type(n) is int for n in room):
                raise ValueError("expected four whole numbers")
            return Bounds(*room)
        except ValueError as error:
            raise PeerFault(name, f"its room: {error}, came {str(room)[:80]}") from error

    async def is_well(self, index: int, stage: Stage, job: bytes, serving: Serving) -> bool:
        """Whether it answers that it gets on with its work. Raises nothing."""
        name = stage_name(index, stage)
        try:
            async with _patience(name, serving.silence_seconds):  # for the chain's node too
                url, _ = await asyncio.to_thread(self.locate, index, stage)
                await self.well(name, url, job, serving)
        except (PeerFault, ContractsError) as error:
            log.info("job %s: %s", job.hex()[:8], error)
            return False
        return True

    async def tokens(self, name: str, url: str, job: bytes) -> list[list[int]]:
        """What it has of each request's output."""
        tokens = (await self._ask(name, "GET", f"{url}/jobs/{job.hex()}/tokens", self._max_body_bytes)).get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(ids, list) for ids in tokens):
            raise PeerFault(name, "expected lists of tokens")
        if not all(type(token) is int for ids in tokens for token in ids):
            raise PeerFault(name, "expected tokens that are whole numbers")
        return tokens

    async def claim(self, name: str, url: str, job: bytes, index: int, patience_seconds: float) -> Claim:
        async with _patience(name, patience_seconds):
            body = await self._ask(name, "POST", f"{url}/jobs/{job.hex()}/commit", SMALL_ANSWER_BYTES)
        tokens = body.get("tokens")
        if body.get("stage") != index or type(tokens) is not int or not 0 <= tokens < 2**64:
            raise PeerFault(name, f"expected a claim of stage {index}, came {body.get('stage')!r}")
        root, outputs = _hex(name, body, "root"), _hex(name, body, "outputs")
        if len(root) != 32 or len(outputs) != 32:
            raise PeerFault(name, "expected roots of 32 bytes")
        return Claim(index, root, outputs, tokens, _hex(name, body, "signature"))

    async def _ask(self, name: str, method: str, url: str, most: int) -> dict[str, Any]:
        """A JSON object of at most `most` bytes."""
        return _object(name, f"{method} {url}", await self._fetch(name, method, url, most))

    async def _fetch(self, name: str, method: str, url: str, most: int) -> bytes:
        """What it answers, at most `most` bytes; PeerFault with its reason if it refuses."""
        try:
            async with self._client.stream(method, url) as response:
                parts, size = [], 0
                async for part in response.aiter_bytes():
                    size += len(part)
                    if size > most:
                        raise PeerFault(name, f"answers more than {most} bytes")
                    parts.append(part)
                status = response.status_code
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise PeerFault(name, f"{method} {url}: {type(error).__name__} {error}") from error
        body = b"".join(parts)
        if status != 200:
            reason = _object(name, f"{method} {url}: status {status}", body).get("error")
            raise PeerFault(name, f"refuses: {str(reason)[:500]}")
        return body


@asynccontextmanager
async def _patience(name: str, seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise PeerFault(name, f"no answer within {seconds:g} s") from None


def _object(name: str, what: str, body: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise PeerFault(name, f"{what}: expected JSON, came none") from error
    if not isinstance(parsed, dict):
        raise PeerFault(name, f"{what}: expected an object, came {type(parsed).__name__}")
    return parsed


def _hex(name: str, body: dict[str, Any], key: str) -> bytes:
    try:
        return bytes.fromhex(body[key])
    except (KeyError, TypeError, ValueError) as error:
        raise PeerFault(name, f"expected {key} in hex, came {str(body.get(key))[:80]!r}") from error
