"""Whether to take a job or join a pipeline. Pure: every refusal has a reason that goes to whoever asked."""

from collections.abc import Sequence

from contracts.client import Job, Stage
from verifier.commit import InvalidRequest, Request, requests_root, validate_request
from verifier.program import ModelShape
from worker.config import Policy
from worker.errors import Refused


def check_requests(job: Job, requests: Sequence[Request], shape: ModelShape, most_positions: int) -> None:
    """The prompts are the ones that the job names, the law can serve each, and there is room for its keys and values.
    most_positions: of one request. Raises Refused.
    """
    if len(requests) != job.requests or not requests:
        raise Refused(f"expected {job.requests} requests, came {len(requests)}")
    for r, request in enumerate(requests):
        try:
            validate_request(request, shape)
        except InvalidRequest as error:
            raise Refused(f"request {r}: {error}") from error
        if len(request.prompt) + request.limit > most_positions:
            came = f"{len(request.prompt)} + {request.limit}"
            raise Refused(
                f"request {r}: expected prompt and limit within the {most_positions} positions kept here, came {came}"
            )
    prompt_tokens = sum(len(request.prompt) for request in requests)
    if prompt_tokens != job.prompt_tokens:
        raise Refused(f"expected {job.prompt_tokens} prompt tokens, came {prompt_tokens}")
    limits = sum(request.limit for request in requests)
    if limits != job.max_tokens:
        raise Refused(f"expected limits that sum to {job.max_tokens}, came {limits}")
    root = requests_root(requests)
    if root != job.requests_root:
        raise Refused(f"expected requests with root 0x{job.requests_root.hex()}, came 0x{root.hex()}")


def check_terms(job: Job, policy: Policy, model: bytes, free_stake: int, least_lock: int, now: int) -> None:
    """The job's terms are ours. least_lock: of any such job. Stake and prices in base units, `now` in unix seconds.
    Raises Refused.
    """
    if job.model != model:
        raise Refused(
            f"expected model 0x{model.hex()}, as computed from our own folder; the job names 0x{job.model.hex()}"
        )
    floors = (
        ("prompt price", job.prompt_price, policy.min_prompt_price),
        ("token price", job.token_price, policy.min_token_price),
        ("gas rate", job.gas_rate, policy.min_gas_rate),
        ("clock", job.clock, policy.min_clock_seconds),
        ("grace", job.grace, policy.min_grace_seconds),
        ("time to serve", job.commit_by - now, policy.min_serving_seconds),
        ("time to accept", job.accept_by - now, 0),
    )
    for name, value, least in floors:
        if value < least:
            raise Refused(f"{name}: expected at least {least}, came {value}")
    ceilings = (
        ("window", job.window, policy.max_window_seconds),
        ("time to accept", job.accept_by - now, policy.max_accept_seconds),
        ("time to serve", job.commit_by - now, policy.max_serving_seconds),
        ("clock", job.clock, policy.max_clock_seconds),
        ("grace", job.grace, policy.max_clock_seconds),
        ("requests", job.requests, policy.max_requests),
        ("prompt tokens", job.prompt_tokens, policy.max_prompt_tokens),
        ("output tokens", job.max_tokens, policy.max_output_tokens),
        ("lock", job.lock, min(free_stake, policy.max_lock_times * least_lock)),
    )
    for name, value, most in ceilings:
        if value > most:
            raise Refused(f"{name}: expected at most {most}, came {value}")


def check_disk(needed_bytes: int, free_bytes: int) -> None:
    """There is room for a job's traces, with those of the jobs that are being served. Raises Refused."""
    if needed_bytes > free_bytes:
        raise Refused(f"disk: expected {needed_bytes} bytes free for traces, {free_bytes} are")


def own_stage(stages: Sequence[Stage], account: str, first_layer: int, end_layer: int) -> int:
    """Which of `stages` is ours, with the layers we hold. Raises Refused."""
    for index, stage in enumerate(stages):
        if stage.worker.lower() == account.lower():
            if (stage.first_layer, stage.end_layer) == (first_layer, end_layer):
                return index
            raise Refused(
                f"expected layers {first_layer} .. {end_layer} for us, came {stage.first_layer} .. {stage.end_layer}"
            )
    raise Refused(f"expected {account} among the stages, came {', '.join(stage.worker for stage in stages)}")


def check_join(
    model: bytes,
    stages: Sequence[Stage],
    policy: Policy,
    own_model: bytes,
    account: str,
    first_layer: int,
    end_layer: int,
) -> None:
    """Whether we belong in this pipeline. Raises Refused."""
    if model != own_model:
        raise Refused(f"expected model 0x{own_model.hex()}, came 0x{model.hex()}")
    place = own_stage(stages, account, first_layer, end_layer)
    if sum(stage.worker.lower() == account.lower() for stage in stages) != 1:
        raise Refused("expected us once among the stages")
    if stages[place].share_bps < policy.min_share_bps:
        raise Refused(f"share: expected at least {policy.min_share_bps} / 10000, came {stages[place].share_bps}")
