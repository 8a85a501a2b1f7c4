"""Screening by tokens alone: honest tokens pass, those of another law or prompt are suspicious."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.verifier import tiny
from verifier.commit import Request
from verifier.execution import Execution
from verifier.referee.fixed import Q30
from verifier.reference import Reference
from verifier.screen import Screen

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    return tiny.make(tmp_path_factory.mktemp("model"), tiny.config(), positions=6)


def logits(model: tiny.Tiny, tokens: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """[T, vocabulary] of whoever executes the tokens."""
    out = Execution(model.weights, tokens).arrays["out"]
    return np.concatenate([tile.numpy() for _, tile in Reference(model.weights).logits(out)], axis=1)


def greedy(model: tiny.Tiny, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def test_tokens_of_the_model_pass_and_others_are_suspicious_by_their_distance(model: tiny.Tiny) -> None:
    margin = Q30 // 2
    screen, prompt = Screen(model.weights, model.profile, margin), [3, 1, 4, 1, 5]
    output = greedy(model, prompt, 4)
    request = Request(tuple(prompt), 4)
    assert [verdict.ratio for verdict in screen.request(0, request, output)] == [0.0] * 4
    false = list(output)
    row = logits(model, prompt + output[:3])[-1]
    false[3] = int(row.argmin())
    verdicts = screen.request(0, request, false)
    assert [verdict.ratio > 1 for verdict in verdicts] == [False, False, False, True]
    assert verdicts[3].ratio == pytest.approx((row.max() - row.min()) / 0.5, rel=1e-6)
    assert verdicts[3].position == len(prompt) + 2 and verdicts[3].token == false[3]
    # The same tokens, said to answer another prompt.
    assert any(verdict.ratio > 1 for verdict in screen.request(0, replace(request, prompt=(9, 2, 6, 5, 3)), output))


def test_a_margin_below_the_laws_own_is_refused(model: tiny.Tiny) -> None:
    with pytest.raises(ValueError, match=f"at least the law's {model.profile.margin}, got {model.profile.margin - 1}"):
        Screen(model.weights, model.profile, model.profile.margin - 1)
