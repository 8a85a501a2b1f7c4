"""The model at one stage: its own layers, run by transformers' own layer classes, one forward over a flat microbatch.

Everything the trace holds is taken during that forward: layer inputs here, q, k, v in the attention function, the
outputs of attention and MLP in hooks. There is no second forward.
"""

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import AttentionInterface, LlamaConfig, MistralConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralRMSNorm, MistralRotaryEmbedding

from verifier.weights import Weights
from worker import paged_attention
from worker.batch import Batch
from worker.cache import Cache, Pages, Places
from worker.config import PRODUCTS
from worker.errors import ConfigError
from worker.products import product, remake
from worker.sampler import Draw, choose_all
from worker.swap import SwappingCache

ATTENTION = "plumb"

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # by the code in docs/canonical.md
BITS = (np.uint16, np.uint16, np.uint32)

FAMILIES: Mapping[str, tuple[type[PreTrainedConfig], type[nn.Module], type[nn.Module], type[nn.Module]]] = {
    "LlamaForCausalLM": (LlamaConfig, LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding),
    "MistralForCausalLM": (MistralConfig, MistralDecoderLayer, MistralRMSNorm, MistralRotaryEmbedding),
}

Captured = dict[str, torch.Tensor]  # "3.q" -> [rows, width]; "out" at the last stage


@dataclass(frozen=True)
class Group:
    """Requests that attend together: how many, with how many new positions each, where all positions are that they see,
    and what each row may see, broadcast over [n, heads, rows, positions]; None: everything.
    """

    n: int
    count: int
    places: Places
    mask: torch.Tensor | None

    @property
    def rows(self) -> int:
        return self.n * self.count


class Forward:
    """What one forward carries through the layers: its rows, the cache they extend, and what it has captured."""

    def __init__(self, stage: "Stage", batch: Batch, cache: Cache) -> None:
        self.stage = stage
        self.batch = batch
        self.cache = cache
        self.captured: Captured = {}
        cache.extend(batch)
        self.plan()
        self.slots = cache.rows(batch)

    def plan(self) -> None:
        """Who attends with whom; may move what the cache holds."""
        stage, batch, cache = self.stage, self.batch, self.cache
        spans = {piece.request: span for piece, span in batch.spans()}
        self.whole = [(piece, spans[piece.request]) for piece in batch.pieces if piece.count > 1 and not piece.first]
        self.groups: list[Group] = []
        self.pages: Pages | None = None
        order: list[range] = []
        single = [piece for piece in batch.pieces if piece.count == 1]
        if single and stage.paged:
            self.pages = cache.pages_of(single)
            self.paged = torch.tensor([spans[piece.request].start for piece in single])
        for pieces, places in cache.places(single) if single and not stage.paged else ():
            ends = torch.tensor([piece.end for piece in pieces], device=stage.device)
            mask = None
            if int(ends.min()) < places.longest:
                mask = self._mask(torch.arange(places.longest, device=stage.device) < ends[:, None])
                mask = mask[:, None, None].expand(-1, -1, stage.heads // stage.kv_heads, -1)
            self.groups.append(Group(len(pieces), 1, places, mask))
            order += [range(spans[piece.request].start, spans[piece.request].stop) for piece in pieces]
        for piece in batch.pieces:
            if piece.count > 1 and piece.first:
                # In the middle of a prompt: row i sees the positions up to first + i. SDPA's is_causal would align to
                # the upper left.
                seen = torch.ones(piece.count, piece.end, dtype=torch.bool, device=stage.device).tril(piece.first)
                self.groups.append(Group(1, piece.count, cache.place(piece), self._mask(seen)))
                order.append(range(spans[piece.request].start, spans[piece.request].stop))
        self.grouped = torch.tensor([row for rows in order for row in rows], dtype=torch.int64, device=stage.device)

    def _mask(self, seen: torch.Tensor) -> torch.Tensor:
        """What is added to a score: as attention makes it of booleans, here once for all layers."""
        return torch.zeros(seen.shape, dtype=self.stage.dtype, device=seen.device).masked_fill(~seen, -torch.inf)


class Stage:
    """Layers first_layer .. end_layer-1 of the model in `folder`, weights memory-mapped there and in the model's own
    dtype.

    `observe` sees every tensor of the trace where it arises and returns what the forward goes on with. Threads may
    share a stage, each with caches of its own.
    """

    forward_class: type[Forward] = Forward

    def __init__(
        self,
        folder: Path,
        first_layer: int,
        end_layer: int,
        *,
        device: str = "cpu",
        weights: Weights | None = None,
        products: str = "mapped",
    ) -> None:
        """products: how they are computed, one of worker.config.PRODUCTS (worker.products). Raises ValueError or, where
        these are not for such weights or this machine, ConfigError.
        """
        self.weights = weights if weights is not None else Weights.open(folder)
        self.shape = self.weights.shape
        if not 0 <= first_layer < end_layer <= self.shape.layers:
            raise ValueError(f"layers {first_layer} .. {end_layer} of a model with {self.shape.layers}")
        self.first_layer = first_layer
        self.end_layer = end_layer
        self.device = torch.device(device)
        self.dtype = DTYPES[self.shape.served_dtype]
        if products not in PRODUCTS:
            raise ConfigError(f"products: expected one of {', '.join(PRODUCTS)}, came {products!r}")
        self.products = products if self.dtype is not torch.float32 or products != "widened" else "mapped"
        # Rationale: the MLP's hook has no other way to its forward: transformers calls the MLP without keywords.
        self._running = threading.local()

        config_class, layer_class, norm_class, rotary_class = FAMILIES[self.weights.config["architectures"][0]]
        config = config_class.from_pretrained(folder, local_files_only=True)
        # Rationale: Mistral's sliding window is refused by verifier.program (UnsupportedModel), so the layers need no
        # mask beyond the causal one.
        config._attn_implementation = ATTENTION
        self.heads: int = config.num_attention_heads
        self.head_size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.paged = paged_attention.serves(self.device, self.head_size)
        if self.paged:
            paged_attention.program(self.head_size, self.heads // self.kv_heads, self.dtype)
        self.rotary = rotary_class(config=config).to(self.device)
        self.layers: dict[int, nn.Module] = {
            index: self._layer(layer_class, config, index) for index in range(first_layer, end_layer)
        }
        self.embedding: torch.Tensor | None = None
        self.norm: nn.Module | None = None
        self.head: Callable[[torch.Tensor], torch.Tensor] | None = None
        if self.is_first:
            self.embedding = self.tensor("model.embed_tokens.weight")
        if self.is_last:
            with torch.device("meta"):
                self.norm = norm_class(config.hidden_size, eps=config.rms_norm_eps)
            self.norm.load_state_dict({"weight": self.tensor("model.norm.weight")[0]}, assign=True)
            tied = bool(config.tie_word_embeddings)
            self.head = product(self.products, self.tensor("model.embed_tokens.weight" if tied else "lm_head.weight"))

    @property
    def is_first(self) -> bool:
        return self.first_layer == 0

    @property
    def is_last(self) -> bool:
        return self.end_layer == self.shape.layers

    def cache(self, buffer: int = 0, reserves: Sequence[int] = (), foreseen: int = 0) -> Cache:
        """buffer: positions of each of the two that guests come into; 0: there are no guests. reserves and foreseen: as
        for Cache, without the guests.
        """
        form = (self.kv_heads, self.head_size, self.dtype, self.device)
        if buffer:
            layers = range(self.first_layer, self.end_layer)
            return SwappingCache(*form, layers, buffer, reserves, foreseen)
        return Cache(*form, reserves, foreseen)

    @torch.inference_mode()
    def embed(self, tokens: npt.NDArray[np.int64]) -> torch.Tensor:
        """[rows] token ids -> [rows, hidden]. Stage 0 only."""
        assert self.embedding is not None
        return nn.functional.embedding(torch.from_numpy(tokens).to(self.device), self.embedding)

    @torch.inference_mode()
    def forward(self, hidden: torch.Tensor, batch: Batch, cache: Cache) -> tuple[torch.Tensor, Captured]:
        """[rows, hidden] -> (the same shape after the last own layer, what the trace holds). Extends `cache`. Rows
        beyond those of the batch are padding.
        """
        context = self._running.forward = self.forward_class(self, batch, cache)
        positions = torch.zeros(1, len(hidden), dtype=torch.int64)
        positions[0, : batch.rows] = torch.from_numpy(batch.positions())
        positions = positions.to(self.device)
        hidden = hidden.to(self.device)[None]
        rotary = self.rotary(hidden, position_ids=positions)
        try:
            for index, layer in self.layers.items():
                hidden = self.observe(context, f"{index}.h", hidden[0])[None]
                hidden = layer(hidden, position_ids=positions, position_embeddings=rotary, plumb=context)
        finally:
            del self._running.forward  # or this thread would keep its keys and values
        hidden = hidden[0]
        if self.is_last:
            hidden = self.observe(context, "out", hidden)
        for piece in batch.pieces:
            cache.advance(piece.request, piece.count)
        return hidden, context.captured

    def observe(self, context: Forward, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """Notes `tensor`, [rows, width], as served under `key`. Returns what the forward continues with."""
        context.captured[key] = tensor
        return tensor

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> [rows, vocabulary] in float32. Last stage only."""
        assert self.norm is not None and self.head is not None
        return self.head(self.norm(hidden)).float()

    @torch.inference_mode()
    def tokens(self, hidden: torch.Tensor, draws: Sequence[Draw] = ()) -> list[int]:
        """[rows, hidden] -> the token of each row as its draw asks for; without draws, the greedy ones: ties go to the
        lowest id. Last stage only.
        """
        logits = self.logits(hidden)
        if any(not draw.request.greedy for draw in draws):
            return choose_all(logits.double().cpu().numpy(), draws)
        ids = torch.arange(logits.shape[-1], device=logits.device)
        # Rationale: torch.argmax leaves open which of several maxima it names.
        best = torch.where(logits == logits.amax(-1, keepdim=True), ids, logits.shape[-1]).amin(-1)
        return [int(token) for token in best.tolist()]

    def attend(
        self, context: Forward, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """New rows, [1, heads, rows, head size] after RoPE -> [1, rows, heads, head size]; each request attends to its
        own positions only.
        """
        query = self.observe_heads(context, f"{layer}.q", query)
        key = self.observe_heads(context, f"{layer}.k", key)
        value = self.observe_heads(context, f"{layer}.v", value)
        context.cache.write(layer, context.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        attended = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
        for _, rows in context.whole:
            part = nn.functional.scaled_dot_product_attention(
                query[:, :, rows],
                key[:, :, rows],
                value[:, :, rows],
                is_causal=True,
                scale=scale,
                enable_gqa=self.heads != self.kv_heads,
            )
            attended[rows] = part[0].transpose(0, 1)
        if context.pages is not None:
            each = query[0].transpose(0, 1)
            alone = len(context.paged) == len(each)  # nothing but single rows: each is in its place
            asked = each if alone else each[context.paged]
            part = paged_attention.attend(asked, *context.cache.pools(layer), context.pages, scale)
            if alone:
                return part[None]
            attended.index_copy_(0, context.paged, part)
        if not context.groups:
            return attended[None]
        parts: list[torch.Tensor] = []
        flat = query[0].transpose(0, 1).index_select(0, context.grouped)
        sizes = [group.rows for group in context.groups]
        for group, taken in zip(context.groups, torch.split(flat, sizes), strict=True):
            keys, values = context.cache.read(layer, group.places)
            n, count = group.n, group.count
            if count == 1:  # the heads that share keys are rows over the same keys: nothing is copied for them
                asked = taken.view(n, self.kv_heads, -1, self.head_size)
                part = nn.functional.scaled_dot_product_attention(
                    asked, keys, values, attn_mask=group.mask, scale=scale
                )
                parts.append(part.reshape(n, self.heads, self.head_size))
            else:
                asked = taken.view(n, count, self.heads, self.head_size).transpose(1, 2)
                part = nn.functional.scaled_dot_product_attention(
                    asked, keys, values, attn_mask=group.mask, scale=scale, enable_gqa=self.heads != self.kv_heads
                )
                parts.append(part.transpose(1, 2).reshape(n * count, self.heads, self.head_size))
        attended.index_copy_(0, context.grouped, torch.cat(parts))
        return attended[None]

    def observe_heads(self, context: Forward, key: str, heads: torch.Tensor) -> torch.Tensor:
        """`observe` for a tensor kept by heads, [1, heads, rows, head size]: rows of [head, head size] in the trace."""
        count, size = heads.shape[1], heads.shape[3]
        rows = self.observe(context, key, heads[0].transpose(0, 1).reshape(-1, count * size))
        return rows.reshape(-1, count, size).transpose(0, 1)[None]

    def _layer(self, layer_class: type[nn.Module], config: Any, index: int) -> nn.Module:
        with torch.device("meta"):
            layer = layer_class(config, index)
        state = {}
        for name, parameter in layer.named_parameters():
            tensor = self.tensor(f"model.layers.{index}.{name}")
            state[name] = tensor.reshape(parameter.shape)
        layer.load_state_dict(state, assign=True)
        layer.requires_grad_(False)
        layer.eval()
        remake(layer, self.products)

        def after_attention(_module: nn.Module, _args: Any, kwargs: Any, output: Any) -> Any:
            hidden = self.observe(kwargs["plumb"], f"{index}.attn_out", output[0][0])
            return (hidden[None], *output[1:])

        def after_mlp(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            return self.observe(self._running.forward, f"{index}.mlp_out", output[0])[None]

        attention: Any = layer.self_attn
        attention.register_forward_hook(after_attention, with_kwargs=True)
        mlp: Any = layer.mlp
        mlp.register_forward_hook(after_mlp)
        return layer

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the model, [rows, cols], in its own dtype; on the CPU it stays memory-mapped."""
        raw = self.weights.raw(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the map is read-only, and so is every use of it here
            bits = torch.from_numpy(raw.view(np.int16 if raw.itemsize == 2 else np.int32))
        return bits.view(DTYPES[self.shape.weight_dtype]).to(self.device)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    *,
    scaling: float,
    plumb: Forward,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    return plumb.stage.attend(plumb, module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(ATTENTION, _attention)


def to_bits(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """[rows, width] in a served dtype -> the same bits as uint16 or uint32, on the CPU."""
    # Each call of torch lets other threads have the interpreter: the recorder, which has many tensors, makes few.
    if tensor.requires_grad or not tensor.is_cpu or not tensor.is_contiguous():
        tensor = tensor.detach().cpu().contiguous()
    bits = tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32).numpy()
    return bits.view(BITS[DTYPES.index(tensor.dtype)])


def from_bits(bits: npt.NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `to_bits`; shares memory, so `bits` must be writable and stay as it is."""
    return torch.from_numpy(bits.view(np.int16 if bits.itemsize == 2 else np.int32)).view(dtype)
