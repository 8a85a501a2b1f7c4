"""Trains the demo's model: a small Llama, from text that ships with Python, saved in the ordinary Hugging Face layout.

Nothing is downloaded. The text is the documentation of Python itself (pydoc's topics and the docstrings of the
standard library); the
tokenizer is a byte-level BPE trained on it. Training takes one to two minutes on two cores and is seeded.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|end|>"


@dataclass(frozen=True)
class Recipe:
    """Shape and schedule. The defaults give about 5 million parameters, hidden size 256, KV width 128."""

    hidden: int = 256
    intermediate: int = 768
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 1024
    positions: int = 1024
    steps: int = 220
    batch: int = 12
    length: int = 96
    peak_rate: float = 2e-3
    seed: int = 7


def corpus() -> list[str]:
    """Paragraph-sized pieces of the text that ships with every Python."""
    pieces = [text for _, text in sorted(topics.topics.items())]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("*.py")):
        pieces.extend(_docstrings(path))
    return [piece for piece in pieces if len(piece) > 200]


def _docstrings(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def train_tokenizer(pieces: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly `vocabulary` tokens; token 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)


def train(path: Path, recipe: Recipe = Recipe(), report: Callable[[int, float], None] | None = None) -> float:
    """Trains and saves the model under `path` in bfloat16.

    `report(step, loss)` is called now and then. Returns the last mean loss (nats a token).
    """
    torch.manual_seed(recipe.seed)
    pieces = corpus()
    tokenizer = train_tokenizer(pieces, recipe.vocabulary)
    ids = [token for piece in pieces for token in [*tokenizer.encode(piece), tokenizer.eos_token_id]]
    data = torch.tensor(ids, dtype=torch.long)
    config = LlamaConfig(
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        vocab_size=recipe.vocabulary,
        max_position_embeddings=recipe.positions,
        initializer_range=recipe.hidden**-0.5,  # 1/sqrt(fan in): keeps the weights as rich as a real model's
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.peak_rate, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.peak_rate, total_steps=recipe.steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(recipe.seed)
    mean = 0.0
    for step in range(recipe.steps):
        starts = torch.randint(0, len(data) - recipe.length, (recipe.batch,), generator=generator).tolist()
        rows = torch.stack([data[start : start + recipe.length] for start in starts])
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.item() if step == 0 else 0.9 * mean + 0.1 * loss.item()
        if report and (step % 10 == 9 or step == recipe.steps - 1):
            report(step + 1, mean)
    model.to(torch.bfloat16).save_pretrained(path, safe_serialization=True)
    tokenizer.save_pretrained(path)
    return mean
