"""llama.cpp as a peer, where the packages `llama_cpp` (llama-cpp-python) and `gguf` are installed (the extra `peers`).

The model is written as a GGUF in its own dtype and run through the library's own calls, batched continuously as its
example `parallel` does: a sequence for each request, passes of at most MICROBATCH rows, the most likely token, who is
done leaves. Else its defaults hold: float16 for keys and values, also of float32 models, and flash attention.
"""

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from transformers import LlamaForCausalLM

MICROBATCH = 512  # rows of one pass, llama.cpp's own default
BLOCK = "blk.{layer}.{name}.weight"
NAMES = {  # of a layer's tensors: in transformers, in a GGUF
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("llama_cpp", "gguf"))


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """The format: ggml's docs/gguf.md. Matrices in the model's dtype, norms in float32, no tokenizer."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, tensor: torch.Tensor) -> None:
        tensor = tensor.detach()
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor.float().numpy())
        elif tensor.dtype == torch.bfloat16:
            writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.contiguous().numpy())

    tensors = model.state_dict()
    add("token_embd.weight", tensors["model.embed_tokens.weight"])
    for layer in range(config.num_hidden_layers):
        for theirs, ours in NAMES.items():
            tensor = tensors[f"model.layers.{layer}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):
                tensor = _interleaved(tensor, config.head_dim)
            add(BLOCK.format(layer=layer, name=ours), tensor)
    add("output_norm.weight", tensors["model.norm.weight"])
    add("output.weight", tensors["lm_head.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: torch.Tensor, columns: int) -> torch.Tensor:
    """llama.cpp rotates a head's columns 2i and 2i + 1 together, transformers i and i + half."""
    halves = weight.view(-1, 2, columns // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


class LlamaCpp:
    """A model in a GGUF, for one batch of `sequences` requests of `positions` tokens at most, prompt and output."""

    def __init__(self, path: Path, sequences: int, positions: int, threads: int) -> None:
        import llama_cpp

        self._library: Any = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = sequences
        params.n_ctx = sequences * (-(-positions // 256) * 256)  # its caches grow by 256 positions
        params.n_batch = params.n_ubatch = MICROBATCH
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(MICROBATCH, 0, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._library.llama_batch_free(self._batch)
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def generate(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[list[int]]:
        """Greedy; request i gets limits[i] tokens."""
        library = self._library
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        outputs: list[list[int]] = [[] for _ in prompts]
        rows = [
            (request, position, token, position == len(prompt) - 1)
            for request, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        while rows:
            now, rows = rows[:MICROBATCH], rows[MICROBATCH:]
            tokens = iter(self._decode(now))
            for request, position, _, last in now:
                if not last:
                    continue
                outputs[request].append(next(tokens))
                if len(outputs[request]) < limits[request]:
                    rows.append((request, position + 1, outputs[request][-1], True))
        return outputs

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """(request, position, token, wants a token behind it) -> the likeliest tokens where they are wanted."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (request, position, token, wanted) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = request
            batch.logits[i] = wanted
        if (code := self._library.llama_decode(self._context, batch)) != 0:
            raise RuntimeError(f"llama_decode: {code}")
        wanted_rows = sum(row[3] for row in rows)
        if not wanted_rows:
            return []
        logits = self._library.llama_get_logits(self._context)
        table = np.ctypeslib.as_array(logits, (wanted_rows, self._vocabulary))
        return [int(token) for token in table.argmax(axis=1)]
