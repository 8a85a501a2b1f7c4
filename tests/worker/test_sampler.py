"""What the worker draws: the law's own noise, its filters, and a softmax in the long run."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from verifier import sampling as fast
from verifier.commit import Request
from verifier.referee import sampling
from verifier.referee.fixed import Q30
from worker.sampler import Draw, allowed, choose, choose_all

REQUEST = Request(prompt=(1,), limit=1, temperature=1 << 16, seed=7)


def test_noise_is_that_of_the_referee() -> None:
    whole = fast.noise(9, 3, 44, 1000)
    for token in (0, 1, 999):
        assert whole[token] == sampling.gumbel(sampling.bits(sampling.stream(9, 3, 44), token))
    assert len(set(whole.tolist())) == 1000


def test_noise_has_the_gumbel_distribution() -> None:
    """Mean: Euler's constant; variance pi^2 / 6; quantiles -ln(-ln p). Within 5 standard errors of 200,000 draws."""
    g = fast.noise(1, 0, 0, 200_000) / Q30
    assert g.mean() == pytest.approx(0.5772156649, abs=5 * 1.2825 / 200_000**0.5)
    assert g.var() == pytest.approx(np.pi**2 / 6, abs=5 * 3.4 / 200_000**0.5)
    for p in (0.01, 0.5, 0.99, 0.9999):
        assert (g < -np.log(-np.log(p))).mean() == pytest.approx(p, abs=5 * (p * (1 - p) / 200_000) ** 0.5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = np.array([2.0, 1.0, 0.0, 1.0, -3.0])
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    request = replace(REQUEST, temperature=int(temperature * 65536))
    draws = [Draw(request, r, t) for r, t in itertools.product(range(20), range(250))]
    seen = np.bincount(choose_all(np.tile(logits, (len(draws), 1)), draws), minlength=5) / len(draws)
    assert np.abs(seen - expected).max() < 5 * 0.5 / len(draws) ** 0.5


def test_a_seed_a_request_and_a_position_each_make_another_draw() -> None:
    flat = np.zeros(50_000)
    tokens = [
        choose(flat, Draw(replace(REQUEST, seed=seed), r, t))
        for seed, r, t in ((7, 0, 0), (8, 0, 0), (7, 1, 0), (7, 0, 1))
    ]
    assert len(set(tokens)) == 4
    assert choose(flat, Draw(REQUEST, 0, 0)) == tokens[0]


def test_a_greedy_draw_takes_the_largest_and_the_lowest_id_among_equals() -> None:
    assert choose(np.array([1.0, 3.0, 3.0]), Draw(replace(REQUEST, temperature=0), 0, 0)) == 1


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (0, 65536, [1, 1, 1, 1]),
        (1, 65536, [0, 1, 0, 0]),
        (2, 65536, [0, 1, 1, 0]),  # ids break ties
        (3, 65536, [0, 1, 1, 1]),
        (99, 65536, [1, 1, 1, 1]),
        (0, 1, [0, 1, 0, 0]),  # the first is always allowed
        (0, 0x7FFF, [0, 1, 0, 0]),
        (0, 0x8001, [0, 1, 1, 0]),
        (0, 0xC001, [0, 1, 1, 1]),
        (1, 0xC001, [0, 1, 0, 0]),
    ],
)
def test_filters_count_what_comes_before(top_k: int, top_p: int, expected: list[int]) -> None:
    # A hair less than 0x8000 of 65536 lies before token 2, than 0xC000 before token 3.
    logits = np.log(np.array([1e-9, 0.5, 0.25, 0.25]))
    assert allowed(logits, replace(REQUEST, top_k=top_k, top_p=top_p)).astype(int).tolist() == expected
