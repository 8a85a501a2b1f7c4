"""A tiny random Llama in a folder, and stages of it wired in one process."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from verifier.commit import Request

torch.set_num_threads(1)

SEED = 11


def build(folder: Path, dtype: torch.dtype, **changes: Any) -> LlamaForCausalLM:
    """Writes a random Llama (hidden 64, 4 heads, 2 key heads, 3 layers) as a safetensors folder; returns it."""
    settings: dict[str, Any] = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=211,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="sdpa",
        dtype=dtype,
    )
    settings.update(changes)
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(dtype).eval()
    with torch.no_grad():  # spread, so that greedy choices are clear and long prompts matter
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.dim() == 2 else parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder, safe_serialization=True)
    return model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """float32."""
    folder = tmp_path_factory.mktemp("tiny32")
    return folder, build(folder, torch.float32)


@pytest.fixture(scope="session")
def tiny_bf16(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    folder = tmp_path_factory.mktemp("tiny16")
    return folder, build(folder, torch.bfloat16, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def requests_batch() -> list[Request]:
    """Prompts of several lengths, one of a single token, one longer than a microbatch."""
    generator = torch.Generator().manual_seed(5)
    lengths = (5, 1, 23, 12, 3)
    limits = (6, 9, 4, 1, 7)
    return [
        Request(prompt=tuple(torch.randint(0, 211, (n,), generator=generator).tolist()), limit=limit)
        for n, limit in zip(lengths, limits, strict=True)
    ]


@pytest.fixture
def greedy() -> Iterator[Callable[[LlamaForCausalLM, Request], list[int]]]:
    """transformers' own greedy answer to a request."""

    def answer(model: LlamaForCausalLM, request: Request) -> list[int]:
        with torch.inference_mode():
            ids = model.generate(
                torch.tensor([request.prompt]),
                attention_mask=torch.ones(1, len(request.prompt), dtype=torch.long),
                max_new_tokens=request.limit,
                do_sample=False,
                eos_token_id=list(request.stops) or None,
                pad_token_id=0,
            )
        return [int(token) for token in ids[0, len(request.prompt) :]]

    yield answer
