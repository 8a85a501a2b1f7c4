"""Attention of single rows over the cache's pages: against float64, and the same bits in any company."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.batch import Batch, Piece
from worker.cache import PAGE, Cache, Pages
from worker.paged_attention import WORTH, attend, serves
from worker.stage import DTYPES, Stage
from worker.vectors import LANES

CPU = torch.device("cpu")
ERROR = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # half a step of the result, and a little


def paged(counts: list[int], slots: int, seed: int) -> Pages:
    """Rows that see `counts` positions, in pages that lie anywhere among the slots."""
    dice = np.random.default_rng(seed)
    pages = iter(dice.permutation(slots // PAGE).tolist())
    tables = [
        np.concatenate([next(pages) * PAGE + np.arange(PAGE) for _ in range(-(-count // PAGE))])[:count]
        for count in counts
    ]
    return Pages.of(tables)


def expected(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pages: Pages, scale: float) -> torch.Tensor:
    """By the formula, in float64, a row and a head at a time."""
    rows, heads, _ = query.shape
    out = torch.empty(query.shape, dtype=torch.float64)
    for row in range(rows):
        first, count = int(pages.starts[row]), int(pages.counts[row])
        firsts = pages.slots[first : first + -(-count // PAGE)]
        places = torch.from_numpy((firsts[:, None] + np.arange(PAGE)).reshape(-1)[:count])
        for head in range(heads):
            own = head // (heads // keys.shape[1])
            shares = torch.softmax(keys[places, own].double() @ query[row, head].double() * scale, 0)
            out[row, head] = shares @ values[places, own].double()
    return out


def drawn(dtype: torch.dtype, shape: tuple[int, ...], seed: int, spread: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from([(1, 1, 16), (1, 8, 64), (2, 3, 80), (2, 4, 128)]),
    st.lists(st.integers(1, 90), min_size=1, max_size=5),
    st.sampled_from([1e-3, 1.0, 30.0]),
    st.integers(0, 2**32 - 1),
)
def test_it_is_what_float64_says(
    dtype: torch.dtype, shape: tuple[int, int, int], counts: list[int], spread: float, seed: int
) -> None:
    key_heads, shared, size = shape
    slots = PAGE * sum(-(-count // PAGE) for count in counts) + 3 * PAGE
    query = drawn(dtype, (len(counts), key_heads * shared, size), seed, spread)
    keys, values = (drawn(dtype, (slots, key_heads, size), seed + i) for i in (1, 2))
    pages = paged(counts, slots, seed)
    out = attend(query, keys, values, pages, size**-0.5)
    truth = expected(query, keys, values, pages, size**-0.5)
    assert out.dtype is dtype and out.shape == query.shape
    # Scores of hundreds carry a float32's error of their size into the weights.
    allowed = ERROR[dtype] * truth.abs().amax() + 2e-7 * max(1.0, spread * 30)
    assert (out.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_and_tiny_numbers(dtype: torch.dtype) -> None:
    """The largest that are served and subnormal ones: exact where one position weighs all, or sixteen the same."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    keys = torch.zeros(2 * PAGE, 1, 16, dtype=dtype)
    keys[5] = 2**7
    values = torch.full((2 * PAGE, 1, 16), 2**7, dtype=dtype)
    values[5, 0, :4] = torch.tensor([tiny, -tiny, 65_000.0, -0.0]).to(dtype)
    query = torch.full((1, 1, 16), 2**7, dtype=dtype)
    pages = Pages.of([np.arange(17)])
    assert torch.equal(attend(query, keys, values, pages, 1.0)[0, 0], values[5, 0])
    assert torch.equal(attend(-query, keys, values, pages, 1.0)[0, 0], torch.full((16,), 2**7, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_company_and_on_any_threads(dtype: torch.dtype) -> None:
    """So many positions that a second thread is worth it."""
    counts, heads, size = [300, 1, 17, 3000, 40, 900], 4, 64
    assert sum(counts) * heads * size > 2 * WORTH
    slots = PAGE * 300
    query = drawn(dtype, (len(counts), 2 * heads, size), 1)
    keys, values = (drawn(dtype, (slots, heads, size), i) for i in (2, 3))
    pages, threads = paged(counts, slots, 4), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = attend(query, keys, values, pages, 0.125)
    finally:
        torch.set_num_threads(threads)
    for row in range(len(counts)):
        alone = Pages(pages.slots, pages.starts[row : row + 1], pages.counts[row : row + 1])
        assert torch.equal(attend(query[row : row + 1], keys, values, alone, 0.125)[0], together[row])


def test_which_heads_are_served() -> None:
    assert serves(CPU, 64) and serves(CPU, LANES)
    assert not serves(CPU, 24) and not serves(torch.device("cuda"), 64)


@pytest.mark.parametrize("tiny_name", ["tiny", "tiny_bf16"])
def test_a_stage_decodes_alike_with_and_without_pages(tiny_name: str, request: pytest.FixtureRequest) -> None:
    """Decoding requests beside one that is in the middle of its prompt, over steps that outgrow their pages."""
    folder, _ = request.getfixturevalue(tiny_name)
    found = []
    for pages in (True, False):
        stage = Stage(folder, 0, 3)
        assert stage.paged
        stage.paged = pages
        cache = stage.cache()
        dice, out = np.random.default_rng(1), []
        lengths = [5, 16, 33]
        first = Batch(tuple(Piece(r, 0, n) for r, n in enumerate(lengths)))
        stage.forward(stage.embed(dice.integers(0, 100, first.rows)), first, cache)
        for turn in range(20):
            single = [Piece(r, n + turn, 1) for r, n in enumerate(lengths)]
            batch = Batch((single[0], Piece(9, 3 * turn, 3), *single[1:]))
            hidden, captured = stage.forward(stage.embed(dice.integers(0, 100, batch.rows)), batch, cache)
            out += [hidden.float(), *(captured[key].float() for key in sorted(captured))]
        assert cache.padding == 0 or not pages
        found.append(out)
    step = 2**-5 if tiny_name == "tiny_bf16" else 1e-4
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=step, atol=step)


def test_a_cache_tells_where_single_rows_attend() -> None:
    cache = Cache(1, 16, torch.float32, CPU)
    cache.extend(Batch((Piece(0, 0, PAGE + 3), Piece(1, 0, 2))))
    pages = cache.pages_of([Piece(1, 1, 1), Piece(0, PAGE + 2, 1)])
    assert pages.counts.tolist() == [2, PAGE + 3] and pages.starts.tolist() == [0, 1]
    assert all(slot % PAGE == 0 for slot in pages.slots) and len(pages.slots) == 3
