"""What a worker puts its stake behind: its own model, its own layers, terms that it can keep."""

from dataclasses import replace

import pytest

from contracts.client import Job, Stage
from worker.admission import check_join, check_terms
from worker.config import Policy
from worker.errors import Refused

OURS, THEIRS = b"\x01" * 32, b"\x02" * 32
ACCOUNT, OTHER = "0x" + "aa" * 20, "0x" + "bb" * 20
NOW = 1_800_000_000
POLICY = Policy(min_prompt_price=2, min_token_price=3, min_gas_rate=4, min_share_bps=100)
JOB = Job(
    model=OURS,
    pipeline=bytes(32),
    requests_root=bytes(32),
    requests=1,
    prompt_tokens=10,
    max_tokens=10,
    prompt_price=2,
    token_price=3,
    lock=1000,
    gas_rate=4,
    accept_by=NOW + 60,
    commit_by=NOW + 120,
    window=60,
    clock=30,
    grace=5,
    nonce=0,
)


def test_terms_that_can_be_kept_are_taken() -> None:
    check_terms(JOB, POLICY, OURS, free_stake=1000, least_lock=300, now=NOW)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": THEIRS}, "as computed from our own folder"),
        ({"prompt_price": 1}, "prompt price: expected at least 2, came 1"),
        ({"token_price": 2}, "token price"),
        ({"gas_rate": 3}, "gas rate"),
        ({"clock": 4}, "clock: expected at least 5, came 4"),
        ({"grace": 0}, "grace"),
        ({"commit_by": NOW + 4}, "time to serve"),
        ({"accept_by": NOW - 1}, "time to accept: expected at least 0, came -1"),
        ({"window": 8 * 86_400}, "window: expected at most"),
        ({"requests": 5000}, "requests"),
        ({"prompt_tokens": 4_000_001}, "prompt tokens"),
        ({"max_tokens": 1_000_001}, "output tokens"),
        ({"lock": 1001}, "lock: expected at most 1000, came 1001"),
        ({"accept_by": NOW + 3601}, "time to accept: expected at most 3600, came 3601"),
        ({"commit_by": NOW + 7 * 86_400 + 1}, "time to serve: expected at most"),
        ({"clock": 86_401}, "clock: expected at most"),
        ({"grace": 86_401}, "grace: expected at most"),
    ],
)
def test_a_job_on_other_terms_or_of_another_model_is_refused(change: dict[str, object], reason: str) -> None:
    """The chain can't check weights: whoever stakes on a model id has computed it."""
    with pytest.raises(Refused, match=reason):
        check_terms(replace(JOB, **change), POLICY, OURS, free_stake=1000, least_lock=300, now=NOW)  # type: ignore[arg-type]


def test_a_lock_far_above_the_contracts_least_is_refused() -> None:
    """Else a job of one token freezes a worker's whole stake."""
    with pytest.raises(Refused, match="lock: expected at most 996, came 1000"):
        check_terms(JOB, POLICY, OURS, free_stake=1000, least_lock=249, now=NOW)


STAGES = (Stage(OTHER, 0, 2, 9000), Stage(ACCOUNT, 2, 4, 1000))


def join(model: bytes = OURS, stages: tuple[Stage, ...] = STAGES) -> None:
    check_join(model, stages, POLICY, OURS, ACCOUNT, first_layer=2, end_layer=4)


def test_a_pipeline_with_our_model_and_layers_is_joined() -> None:
    join()


@pytest.mark.parametrize(
    ("model", "stages", "reason"),
    [
        (THEIRS, STAGES, "expected model 0x0101"),
        (OURS, STAGES[:1], "expected 0xaaaa"),
        (OURS, (STAGES[0], replace(STAGES[1], first_layer=1)), "expected layers 2 .. 4 for us, came 1 .. 4"),
        (OURS, (*STAGES, STAGES[1]), "expected us once"),
        (OURS, (STAGES[0], replace(STAGES[1], share_bps=99)), "share: expected at least 100 / 10000, came 99"),
    ],
)
def test_a_pipeline_of_another_model_or_place_is_refused(model: bytes, stages: tuple[Stage, ...], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        join(model, stages)
