"""Proposals of pipelines: workers that fit together do, the others are named."""

from typing import Any

import pytest

from contracts.client import Stage
from worker.errors import Refused
from worker.pipeline import plan

A, B, C = ("0x" + digit * 40 for digit in "abc")


def info(account: str, first: int, end: int, model: str = "11" * 32) -> dict[str, Any]:
    return {"account": account, "model": model, "first_layer": first, "end_layer": end}


def test_pay_goes_by_layers_and_loses_nothing() -> None:
    model, stages = plan([A, B, C], [info(A, 0, 1), info(B, 1, 2), info(C, 2, 3)])
    assert model == b"\x11" * 32
    assert stages == (Stage(A, 0, 1, 3333), Stage(B, 1, 2, 3333), Stage(C, 2, 3, 3334))


def test_pay_as_told() -> None:
    _, stages = plan([A, B], [info(A, 0, 4), info(B.upper().replace("X", "x"), 4, 5)], [2500, 7500])
    assert [stage.share_bps for stage in stages] == [2500, 7500]


@pytest.mark.parametrize(
    ("served", "shares", "reason"),
    [
        ([info(A, 0, 1), info(B, 2, 3)], [], "0x" + "b" * 40 + ": expected layers from 1 on, it serves 2 .. 3"),
        ([info(A, 1, 2), info(B, 2, 3)], [], "expected layers from 0 on"),
        ([info(A, 0, 1), info(B, 1, 1)], [], "it serves 1 .. 1"),
        ([info(A, 0, 1), info(B, 1, 2, "22" * 32)], [], "expected one model"),
        ([info(A, 0, 1), info(C, 1, 2)], [], "answers there"),
        ([info(A, 0, 1), {"model": "11"}], [], "expected model, first_layer"),
        ([info(A, 0, 1), info(B, 1, 2)], [10_000], "expected 2 shares"),
        ([info(A, 0, 1), info(B, 1, 2)], [5000, 5001], "sum to 10000"),
        ([info(A, 0, 1), info(B, 1, 2)], [-1, 10_001], "shares"),
    ],
)
def test_what_does_not_fit_is_named(served: list[dict[str, Any]], shares: list[int], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        plan([A, B], served, shares)


def test_nobody_is_no_pipeline() -> None:
    with pytest.raises(Refused, match="one worker or more"):
        plan([], [])
