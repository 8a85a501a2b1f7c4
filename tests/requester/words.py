"""A tokenizer of a few words in a folder, for batches that hold text."""

import json
from pathlib import Path
from typing import Any

WORDS = ["<end>", "the", "cat", "sat", "on", "a", "mat", "user", "assistant", ":", "?"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """Words to their index in WORDS, unknown ones to the last; `<end>` ends a text."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    told: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "?"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(told), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<end>",
        "unk_token": "?",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
