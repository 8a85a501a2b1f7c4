"""Random Llamas in a folder, for benchmarks that care about shapes and not about what is said."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from verifier.tolerance import uniform_profile
from verifier.weights import Weights

SEED = 3


def write_llama(
    folder: Path, dtype: torch.dtype, *, hidden: int, layers: int, vocabulary: int = 1024, **changes: Any
) -> LlamaForCausalLM:
    """Heads of 64 columns, half as many for keys, an MLP of three times the width; at least one head. Returns it."""
    heads = max(1, hidden // 64)
    settings: dict[str, Any] = dict(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype=dtype,
    )
    settings.update(changes)
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(dtype).eval()
    model.save_pretrained(folder, safe_serialization=True)
    return model


def write_tolerant(folder: Path, *, hidden: int, layers: int) -> None:
    """A random Llama in float32 and a profile so wide that it convicts nobody honest: for benchmarks of whole jobs."""
    write_llama(folder, torch.float32, hidden=hidden, layers=layers)
    uniform_profile(Weights.open(folder).shape, 1, 8, 1 << 24, 1 << 30).save(folder)
