"""What a stage computes does not depend on how requests are batched beyond rounding, and repeats bit for bit."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.worker.pipeline_in_process import Tiny, serve
from verifier.commit import Request
from worker.batch import Batch, Piece
from worker.cache import PADDING
from worker.config import PRODUCTS
from worker.errors import ConfigError
from worker.products import fastest
from worker.stage import Stage, to_bits


def forwards(stage: Stage, prompts: Sequence[Sequence[int]], chunk: int) -> dict[str, torch.Tensor]:
    """All prompts through the stage, `chunk` positions of each at a time; what was captured of the last microbatch."""
    cache = stage.cache()
    captured: dict[str, torch.Tensor] = {}
    for first in range(0, max(map(len, prompts)), chunk):
        pieces = [
            Piece(r, first, min(chunk, len(prompt) - first)) for r, prompt in enumerate(prompts) if first < len(prompt)
        ]
        ids = [prompts[p.request][t] for p in pieces for t in range(p.first, p.end)]
        _, captured = stage.forward(stage.embed(np.array(ids, np.int64)), Batch(tuple(pieces)), cache)
    assert cache.padding <= PADDING
    return captured


PROMPTS = [[(7 * r + 3 * t) % 211 for t in range(40)] for r in range(6)]


def test_decoding_agrees_with_prefill(tiny: Tiny) -> None:
    folder, _ = tiny
    stage = Stage(folder, 0, 3)
    whole, single = forwards(stage, PROMPTS, 40), forwards(stage, PROMPTS, 1)
    for key, rows in single.items():
        last = whole[key].reshape(6, 40, -1)[:, -1]
        torch.testing.assert_close(rows, last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [40, 7, 1])
def test_the_same_microbatches_repeat_bit_for_bit(tiny_bf16: Tiny, chunk: int) -> None:
    folder, _ = tiny_bf16
    one, two = (forwards(Stage(folder, 0, 3), PROMPTS, chunk) for _ in range(2))
    assert all(np.array_equal(to_bits(one[key]), to_bits(two[key])) for key in one)


def test_requests_of_different_length_do_not_see_one_another(tiny: Tiny) -> None:
    folder, _ = tiny
    stage = Stage(folder, 0, 3)
    prompts = [prompt[: 40 - r] for r, prompt in enumerate(PROMPTS)]  # alike enough to be read together
    cache = stage.cache()
    for r, prompt in enumerate(prompts):
        stage.forward(stage.embed(np.array(prompt, np.int64)), Batch((Piece(r, 0, len(prompt)),)), cache)
    together = Batch(tuple(Piece(r, len(prompt), 1) for r, prompt in enumerate(prompts)))
    hidden, _ = stage.forward(stage.embed(np.full(6, 5)), together, cache)
    for r, prompt in enumerate(prompts):
        alone = stage.cache()
        ids = np.array([*prompt, 5], np.int64)
        expected, _ = stage.forward(stage.embed(ids), Batch((Piece(0, 0, len(ids)),)), alone)
        torch.testing.assert_close(hidden[r], expected[-1], rtol=1e-4, atol=1e-4)


def test_widened_weights_round_once(tiny_bf16: Tiny) -> None:
    """As float64 sums rounded to bfloat16, but for ties; the tokens of a job can be served with them."""
    folder, _ = tiny_bf16
    stage = Stage(folder, 0, 3, products="widened")
    rows = torch.randn(9, 64).bfloat16()
    layer = stage.layers[1].get_submodule("mlp.gate_proj")
    exact = rows.double() @ stage.tensor("model.layers.1.mlp.gate_proj.weight").double().T
    torch.testing.assert_close(layer(rows).double(), exact, rtol=2**-8, atol=1e-4)
    assert layer(rows).dtype is torch.bfloat16


packs = pytest.mark.skipif(fastest(torch.bfloat16) != "packed", reason="no instructions for bfloat16 here")


@packs
@pytest.mark.parametrize("count", [1, 9, 64])
def test_packed_weights_give_the_same_bits(tiny_bf16: Tiny, count: int) -> None:
    rows = torch.randn(count, 64).bfloat16()
    found = []
    for products in ("mapped", "packed"):
        stage = Stage(tiny_bf16[0], 0, 3, products=products)
        layer = stage.layers[1].get_submodule("mlp.gate_proj")
        found.append((layer(rows), stage.logits(rows)))
    assert all(torch.equal(mapped, packed) for mapped, packed in zip(*found, strict=True))


def test_products_that_are_not_for_such_weights_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="expected one of mapped, packed, widened, came 'folded'"):
        Stage(tiny[0], 0, 3, products="folded")
    with pytest.raises(ConfigError, match="packed is for bfloat16 on a CPU, by torch with oneDNN; came float32 on cpu"):
        Stage(tiny[0], 0, 3, products="packed")


def test_what_is_fastest_here_is_a_way_of_products() -> None:
    assert fastest(torch.float32) == "mapped"
    assert {fastest(dtype) for dtype in (torch.bfloat16, torch.float16)} <= set(PRODUCTS)


@pytest.mark.parametrize("products", [pytest.param("packed", marks=packs), "widened"])
def test_a_stage_of_other_products_serves_a_job(
    tiny_bf16: Tiny, requests_batch: list[Request], tmp_path: Path, products: str
) -> None:
    folder, _ = tiny_bf16
    stages = [Stage(folder, 0, 2, products=products), Stage(folder, 2, 3)]
    states = serve(tmp_path, stages, requests_batch)
    assert [len(ids) for ids in states[0].tokens] == [request.limit for request in requests_batch]
