"""Many requests executed together against each alone, and float32 against float64."""

from pathlib import Path

import pytest
import torch

from tests.verifier import tiny
from verifier.execution import Execution, last_rows
from verifier.referee.floats import Dtype
from verifier.reference import Reference, real

SEQUENCES = ([5, 6, 7, 1], [3], [9, 8, 7, 6, 5, 4, 3, 2, 1])


@pytest.mark.parametrize("dtype", [Dtype.BFLOAT16, Dtype.FLOAT16, Dtype.FLOAT32])
def test_requests_together_are_what_each_is_alone(tmp_path: Path, dtype: Dtype) -> None:
    weights = tiny.make_weights(tmp_path, tiny.config(dtype))
    together = last_rows(Reference(weights), SEQUENCES)
    assert [len(rows) for rows in together] == [4, 1, 9]
    for rows, tokens in zip(together, SEQUENCES, strict=True):
        alone, honest = Execution(weights, tokens).arrays, tiny.honest_arrays(weights, list(tokens))
        assert alone.keys() == honest.keys()
        for key, bits in honest.items():
            assert (real(alone[key], dtype) - real(bits, dtype)).norm() <= 1e-4 * real(bits, dtype).norm()
        assert (real(rows, dtype) - real(honest["out"], dtype)).norm() <= 1e-4 * real(rows, dtype).norm()


@pytest.mark.parametrize("dtype", [Dtype.BFLOAT16, Dtype.FLOAT16])
def test_float32_rounds_to_nearly_the_same(tmp_path: Path, dtype: Dtype) -> None:
    weights = tiny.make_weights(tmp_path, tiny.config(dtype))
    exact, fast = (last_rows(Reference(weights, p), SEQUENCES) for p in (torch.float64, torch.float32))
    for wide, narrow in zip(exact, fast, strict=True):
        distance = (real(wide, dtype) - real(narrow, dtype)).norm() / real(wide, dtype).norm()
        assert distance < 2.0 ** -(dtype.mantissa_bits + 2)  # a few values lay between two floats
