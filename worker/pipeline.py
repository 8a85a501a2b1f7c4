"""Proposing a pipeline: each member is asked to sign over HTTP, one transaction creates it (docs/protocol.md, "Between
parties"). Anybody may propose, a member or not.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

import httpx

from contracts.client import Chain, ChainError, Stage
from worker.errors import Refused

ANSWER_BYTES = 64 * 2**10
TIMEOUT_SECONDS = 30.0
WHOLE_BPS = 10_000


def propose(chain: Chain, accounts: Sequence[str], shares: Sequence[int] = (), nonce: int | None = None) -> bytes:
    """Creates the pipeline of these workers, in this order; what each serves is asked of it. Returns its id.

    shares: of the pay, in 1/10000, one a worker; by layers if empty. Raises Refused naming who is in the way,
    ContractsError.
    """
    urls = [_url(chain, account) for account in accounts]
    served = [_ask(account, "GET", f"{url}/info") for account, url in zip(accounts, urls, strict=True)]
    model, stages = plan(accounts, served, shares)
    layers, end = chain.models.layers(model), stages[-1].end_layer
    if end != layers:
        raise Refused(f"expected workers for all {layers} layers of the model, the last one's end is {end}")
    chosen = time.time_ns() if nonce is None else nonce
    name = chain.workers.pipeline_id(model, stages, chosen)
    body = {"model": model.hex(), "stages": [vars(stage) for stage in stages], "nonce": chosen}
    signatures = []
    for account, url in zip(accounts, urls, strict=True):
        answer = _ask(account, "POST", f"{url}/pipelines/join", body)
        try:
            signature = bytes.fromhex(answer["signature"])
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(f"{account}: expected a signature, came {str(answer)[:200]}") from error
        signer = chain.workers.signer_of(account)
        if chain.recover_join(name, signature) != signer:
            raise Refused(f"{account}: expected a signature of {signer}, its signer on chain")
        signatures.append(signature)
    try:
        return chain.workers.create_pipeline(model, stages, chosen, signatures)
    except ChainError as error:
        if error.name != "PipelineExists":  # somebody sent the same signatures first: it is there, under the same id
            raise
        return name


def plan(
    accounts: Sequence[str], served: Sequence[dict[str, Any]], shares: Sequence[int] = ()
) -> tuple[bytes, tuple[Stage, ...]]:
    """(model, stages) of workers that serve what their `/info` tells: one model, layers that follow one another.

    Whether the layers are all the model has is for the chain to say. Raises Refused. Pure.
    """
    if not accounts:
        raise Refused("expected one worker or more")
    if shares and (len(shares) != len(accounts) or sum(shares) != WHOLE_BPS or min(shares) < 0):
        raise Refused(f"expected {len(accounts)} shares that sum to {WHOLE_BPS}, came {list(shares)}")
    ranges, models, end = [], set(), 0
    for account, info in zip(accounts, served, strict=True):
        try:
            models.add(bytes.fromhex(info["model"]))
            first, last = int(info["first_layer"]), int(info["end_layer"])
            speaker = str(info["account"])
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(f"{account}: expected model, first_layer, end_layer and account: {error!r}") from error
        if speaker.lower() != account.lower():
            raise Refused(f"{account}: expected it at its URL on chain, {speaker} answers there")
        if first != end or last <= first:
            raise Refused(f"{account}: expected layers from {end} on, it serves {first} .. {last}")
        ranges.append((first, last))
        end = last
    if len(models) != 1:
        raise Refused(f"expected one model, they serve {', '.join(sorted('0x' + id.hex() for id in models))}")
    chosen = list(shares) or [WHOLE_BPS * (last - first) // end for first, last in ranges]
    chosen[-1] += WHOLE_BPS - sum(chosen)  # what division leaves
    stages = (Stage(account, *place, share) for account, place, share in zip(accounts, ranges, chosen, strict=True))
    return models.pop(), tuple(stages)


def _url(chain: Chain, account: str) -> str:
    url = chain.workers.worker(account).url.rstrip("/")
    if not url:
        raise Refused(f"{account} is not registered")
    return url


def _ask(account: str, method: str, url: str, body: Any = None) -> dict[str, Any]:
    """A small JSON answer. Raises Refused."""
    data = bytearray()
    try:
        with httpx.stream(method, url, json=body, timeout=TIMEOUT_SECONDS, trust_env=False) as response:
            for part in response.iter_bytes():
                data += part
                if len(data) > ANSWER_BYTES:
                    raise Refused(f"{account} at {url}: expected at most {ANSWER_BYTES} bytes")
        if response.status_code != 200:
            text = bytes(data[:500]).decode(errors="replace")
            raise Refused(f"{account} at {url} answered {response.status_code}: {text}")
        parsed = json.loads(data)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Refused(f"{account} at {url}: {type(error).__name__}: {error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"{account} at {url}: expected JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise Refused(f"{account} at {url}: expected an object, came {type(parsed).__name__}")
    return parsed
