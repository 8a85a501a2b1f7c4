"""Opens a job for a batch, hands its prompts to the pipeline, fetches what came of it, collects what is due."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from contracts.client import Chain, ChainError, Job, Status
from contracts.wire import parse_outputs, request_json
from verifier.commit import Output, OutputsTree, Request, make_outputs, requests_root

TIMEOUT_SECONDS = 30.0
ANSWER_SECONDS = 300.0  # one answer in all
HAND_OVER_ATTEMPTS = 5
MAX_ANSWER_BYTES = 256 * 2**20
MAX_INFO_BYTES = 64 * 2**10
REFUSED = (400, 409, 413, 422)  # HTTP answers that will not change


class RequesterError(Exception):
    """A job that cannot be opened, handed over or fetched; says what was expected and what came."""


@dataclass(frozen=True)
class Terms:
    """What a requester offers. Prices in base units of the token, durations in seconds."""

    prompt_price: int = 1_000
    token_price: int = 5_000
    gas_rate: int = 1
    accept_seconds: int = 60
    serve_seconds: int = 600
    window: int = 600
    clock: int = 120
    grace: int = 15


def make_job(
    chain: Chain, model: bytes, pipeline: bytes, requests: Sequence[Request], terms: Terms, nonce: int | None = None
) -> Job:
    """The job for a batch on a pipeline, its times counted from now. The lock is the least that the contract takes."""
    prompt_tokens = sum(len(request.prompt) for request in requests)
    max_tokens = sum(request.limit for request in requests)
    now = max(chain.block_timestamp(), int(time.time()))  # an idle local chain's last block may be old
    job = Job(
        model=model,
        pipeline=pipeline,
        requests_root=requests_root(requests),
        requests=len(requests),
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        prompt_price=terms.prompt_price,
        token_price=terms.token_price,
        lock=0,
        gas_rate=terms.gas_rate,
        accept_by=now + terms.accept_seconds,
        commit_by=now + terms.accept_seconds + terms.serve_seconds,
        window=terms.window,
        clock=terms.clock,
        grace=terms.grace,
        nonce=time.time_ns() if nonce is None else nonce,
    )
    return replace(job, lock=chain.escrow.least_lock(job))


def max_price(job: Job) -> int:
    """What is escrowed, in base units."""
    return job.prompt_price * job.prompt_tokens + job.token_price * job.max_tokens


class Requester:
    """One account that pays for jobs; without a key, one that only looks and fetches."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain

    def check(self, job: Job, requests: Sequence[Request]) -> None:
        """Whether every stage would take the job, asked before any money moves. Raises RequesterError."""
        longest = max(len(request.prompt) + request.limit for request in requests)
        stages = self.chain.workers.pipeline_stages(job.pipeline)
        for index, stage in enumerate(stages):
            who = f"stage {index} ({stage.worker})"
            free = self.chain.workers.free_stake(stage.worker)
            if free < job.lock:
                raise RequesterError(f"{who} has {free} base units of free stake, the job locks {job.lock}")
            url = f"{self.url(job.pipeline, index)}/info"
            try:
                info = json.loads(_ask("GET", url, MAX_INFO_BYTES))
                least = {key: int(info[f"min_{key}"]) for key in ("prompt_price", "token_price", "gas_rate")}
                model, most = info["model"], int(info["max_positions"])
            except (RequesterError, KeyError, TypeError, ValueError) as error:
                raise RequesterError(f"{who} does not say what it serves: {error}") from error
            if model != job.model.hex():
                raise RequesterError(f"{who} serves model 0x{model}, the pipeline is one of 0x{job.model.hex()}")
            if longest > most:
                raise RequesterError(f"{who} keeps {most} positions of a request, the longest may take {longest}")
            for key, value in least.items():
                if getattr(job, key) < value:
                    raise RequesterError(f"{who} takes a {key} of {value} or more, the job offers {getattr(job, key)}")

    def open(self, job: Job) -> bytes:
        """Approves and escrows the job's maximum price, opens the job.

        Raises RequesterError if the balance does not cover it.
        """
        price = max_price(job)
        balance = self.chain.token.balance(self.chain.account)
        if balance < price:
            raise RequesterError(f"the job costs at most {price} base units, {self.chain.account} holds {balance}")
        if self.chain.token.allowance(self.chain.account, self.chain.escrow.address) < price:
            self.chain.token.approve(self.chain.escrow.address, price)
        return self.chain.escrow.open(job)

    def hand_over(self, id: bytes, requests: Sequence[Request]) -> None:
        """Gives the prompts to stage 0; a second time does no harm. Raises RequesterError with its answer if it refuses
        them, or does not answer several times.
        """
        url = f"{self.url(self.chain.escrow.job(id).pipeline, 0)}/jobs/{id.hex()}"
        body = {"requests": [request_json(request) for request in requests]}
        for attempt in range(HAND_OVER_ATTEMPTS):
            try:
                _ask("PUT", url, MAX_INFO_BYTES, body)
                return
            except Answered as error:
                if error.status in REFUSED or attempt + 1 == HAND_OVER_ATTEMPTS:
                    raise RequesterError(f"stage 0 refused the prompts: {error}") from error
            except RequesterError as error:
                if attempt + 1 == HAND_OVER_ATTEMPTS:
                    raise RequesterError(f"stage 0 does not take the prompts: {error}") from error
            time.sleep(2.0**attempt / 4)

    def outputs(self, id: bytes, requests: Sequence[Request]) -> tuple[Output, ...]:
        """The job's outputs, checked against the root on chain and against the law. Raises RequesterError."""
        committed, _ = self.chain.escrow.outputs(id)
        if not any(committed):
            raise RequesterError("the job has no outputs yet: expected all stages to have committed")
        pipeline = self.chain.escrow.job(id).pipeline
        last = len(self.chain.workers.pipeline_stages(pipeline)) - 1
        reasons = []
        for stage in dict.fromkeys((last, 0)):  # both hold them
            url = f"{self.url(pipeline, stage)}/jobs/{id.hex()}/outputs"
            try:
                outputs = parse_outputs(_ask("GET", url, MAX_ANSWER_BYTES))
                root = OutputsTree(outputs).root
                if root != committed:
                    raise RequesterError(f"{url}: expected outputs with root {committed.hex()}, came {root.hex()}")
            except (RequesterError, ValueError, IndexError) as error:
                reasons.append(f"stage {stage}: {error}")
                continue
            lawful(outputs, requests)
            return outputs
        raise RequesterError("; ".join(reasons))

    def collect(self, id: bytes) -> list[str]:
        """Does what the chain waits for in a job whose time has come, and draws what this account is owed. Returns what
        was done. Raises RequesterError for a job that this chain does not have.
        """
        escrow, now, done = self.chain.escrow, self.chain.block_timestamp(), []
        status = escrow.status(id)
        if status is Status.NONE:
            raise RequesterError(f"job 0x{id.hex()} was never opened on this chain")
        job, window_end = escrow.job(id), escrow.window_end(id)
        due: dict[Status, tuple[int, str, Callable[[bytes], Any]]] = {
            Status.OPEN: (job.accept_by, "expired", escrow.expire),
            Status.ACCEPTED: (job.commit_by, "expired", escrow.expire),
            Status.COMMITTED: (window_end, "settled", escrow.settle),
            Status.VOID: (window_end, "released", escrow.release),
        }
        if status in due and now > due[status][0]:
            _, name, send = due[status]
            try:
                send(id)
                done.append(f"{name} the job")
            except ChainError as error:
                if error.name not in ("WrongStatus", "AlreadyDone", "GamesOpen", "TooEarly"):
                    raise
        if status == Status.VOID and not escrow.refunded(id):
            escrow.refund(id)
            done.append("had the price refunded")
        for door in (escrow, self.chain.demands):
            owed = door.credit(self.chain.account)
            if owed:
                door.withdraw()
                done.append(f"drew {owed} base units")
        return done

    def phase(self, id: bytes, stage: int) -> str:
        """What a stage says of its work on a job; nobody vouches for it."""
        try:
            url = f"{self.url(self.chain.escrow.job(id).pipeline, stage)}/jobs/{id.hex()}"
            said = json.loads(_ask("GET", url, MAX_INFO_BYTES, timeout=5.0))
            reason = f" ({said['reason']})" if said.get("reason") else ""
            return f"{said['phase']}{reason}"
        except (RequesterError, AttributeError, KeyError, TypeError, ValueError):
            return "does not answer"

    def url(self, pipeline: bytes, stage: int) -> str:
        account = self.chain.workers.pipeline_stage(pipeline, stage).worker
        return self.chain.workers.worker(account).url.rstrip("/")


class Answered(RequesterError):
    """A worker answered, but not with 200."""

    def __init__(self, url: str, status: int, text: str) -> None:
        super().__init__(f"{url} answered {status}: {text}")
        self.status = status


def _ask(method: str, url: str, most: int, body: Any = None, timeout: float = TIMEOUT_SECONDS) -> bytes:
    """The answer, read no further than `most` bytes. timeout: of silence, seconds. Raises RequesterError."""
    end, data = time.monotonic() + ANSWER_SECONDS, bytearray()
    headers = {"Accept-Encoding": "identity"}
    try:
        with httpx.stream(method, url, json=body, timeout=timeout, trust_env=False, headers=headers) as response:
            for part in response.iter_raw():
                data += part
                if len(data) > most:
                    raise RequesterError(f"{url}: expected at most {most} bytes")
                if time.monotonic() > end:
                    raise RequesterError(f"{url}: expected an answer within {ANSWER_SECONDS:.0f} s")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:  # ValueError: a URL that no parser takes
        raise RequesterError(f"{url}: {type(error).__name__}: {error}") from error
    if response.status_code != 200:
        raise Answered(url, response.status_code, bytes(data[:500]).decode(errors="replace"))
    return bytes(data)


def lawful(outputs: Sequence[Output], requests: Sequence[Request]) -> None:
    """Raises RequesterError for outputs that break STOP or BILL: committed to all the same, they can be convicted."""
    try:
        expected = make_outputs([output.tokens for output in outputs], requests)
    except ValueError as error:
        raise RequesterError(f"the pipeline committed to outputs that break the law: {error}") from error
    if list(outputs) != expected:
        raise RequesterError("the pipeline committed to outputs whose counts, starts or codes break the law")
