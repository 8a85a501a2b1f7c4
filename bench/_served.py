"""A whole model served by somebody who may cheat: all requests in step, with the tensors that their traces commit to.

The forward is written out here, as transformers has it, so that a cheat can lay hands on every part of it; without a
cheat it serves as a worker does, and its tensors pass as a worker's (a row of the report says so).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from verifier.audit import Stage
from verifier.commit import Request
from verifier.linear import Bits, float_tensor
from verifier.trace import RequestTrace
from verifier.weights import Weights
from worker.sampler import Draw, choose_all
from worker.stage import DTYPES, to_bits

Rows = torch.Tensor  # [requests, positions, width]


class Cheat:
    """How a server differs from an honest one; this one does not."""

    def weight(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A tensor as served, [rows, columns] in its own dtype."""
        return weight

    def order(self, layers: int) -> Sequence[int | None]:
        """Whose arithmetic each layer of the trace holds; None: none at all, what comes in goes out."""
        return range(layers)

    def prompt(self, prompt: Sequence[int]) -> list[int]:
        """What is fed in place of the prompt: as long, or longer by a hidden beginning that no trace shows."""
        return list(prompt)

    def turned(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions as RoPE is told them, float32."""
        return positions

    def kept(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """New keys or values ("k", "v") as the cache keeps them: [requests, heads, positions, head size]."""
        return rows

    def visible(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """[queries, keys]: which position sees which."""
        return keys[None, :] <= queries[:, None]

    def mixed(self, heads: torch.Tensor) -> torch.Tensor:
        """What attention yields, [requests, heads, positions, head size]."""
        return heads

    def asked(self, request: Request) -> Request:
        """By which request's law a token is drawn."""
        return request

    def choose(self, server: Server, rows: Rows, logits: torch.Tensor, draws: list[Draw]) -> list[int]:
        """The next token of each request; logits: [requests, vocabulary] of its last row."""
        return choose_all(logits.double().numpy(), draws)

    def served(self, results: list[Result]) -> list[Result]:
        """What is handed over and committed to in the end."""
        return results


@dataclass(frozen=True)
class Result:
    """One request as it was served: its index, the output tokens, and the trace's raw bits [T, width] by key."""

    index: int
    request: Request
    tokens: tuple[int, ...]
    arrays: dict[str, Bits]
    teacher: tuple[int, ...] = ()  # what was fed, where the tokens were only chosen and not gone on from

    def stage(self, weights: Weights) -> Stage:
        """One stage that holds every layer."""
        return Stage(0, RequestTrace(weights.shape, 0, weights.shape.layers, self.arrays))

    @property
    def fed(self) -> list[int]:
        """By the protocol: the prompt, then the output but for its last token."""
        return list(self.teacher or (*self.request.prompt, *self.tokens[:-1]))


@dataclass
class _Layer:
    """Keys and values so far, [requests, heads, positions, head size]."""

    k: list[torch.Tensor] = field(default_factory=list)
    v: list[torch.Tensor] = field(default_factory=list)


class Server:
    """One model, all layers. Requests of one batch have prompts of one length and one limit; nobody stops early."""

    def __init__(self, weights: Weights, cheat: Cheat | None = None) -> None:
        self.shape, self.cheat = weights.shape, cheat or Cheat()
        self.dtype = DTYPES[self.shape.served_dtype]
        stored = self.shape.weight_dtype
        self.tensors = {
            place.name: self.cheat.weight(place.name, float_tensor(weights.raw(place.name), stored))
            for place in weights.layout.tensors
        }
        self.order = self.cheat.order(self.shape.layers)
        turns = np.array(weights.program.table, dtype=np.float64) / 2.0**64
        self.frequencies = torch.from_numpy(turns * 2 * np.pi).float()  # radians a position
        self.layers: list[_Layer]
        self.begin()

    def begin(self) -> None:
        """Forgets all keys and values."""
        self.layers = [_Layer() for _ in range(self.shape.layers)]

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], prefill: int = 0) -> list[Result]:
        """Serves the requests; the prompt `prefill` positions at a time (0: all)."""
        prompts = [self.cheat.prompt(request.prompt) for request in requests]
        hidden = len(prompts[0]) - len(requests[0].prompt)
        captured: dict[str, list[torch.Tensor]] = {}
        tokens: list[list[int]] = [[] for _ in requests]
        self.begin()
        ids, first = torch.tensor(prompts), 0
        step = prefill or ids.shape[1]
        while True:
            parts = [self.forward(part, first + step * n) for n, part in enumerate(torch.split(ids, step, dim=1))]
            for _, tensors in parts:
                for key, tensor in tensors.items():
                    captured.setdefault(key, []).append(tensor)
            first += ids.shape[1]
            draws = [
                Draw(self.cheat.asked(request), index, first - 1 - hidden) for index, request in enumerate(requests)
            ]
            last = parts[-1][0][:, -1:]
            for told, token in zip(tokens, self.cheat.choose(self, last, self.logits(last[:, 0]), draws), strict=True):
                told.append(token)
            if len(tokens[0]) == requests[0].limit:
                break
            ids = torch.tensor([told[-1:] for told in tokens])
        joined = {key: torch.cat(parts, dim=1)[:, hidden:] for key, parts in captured.items()}
        return self.cheat.served(
            [
                Result(r, request, tuple(tokens[r]), {key: to_bits(rows[r]) for key, rows in joined.items()})
                for r, request in enumerate(requests)
            ]
        )

    @torch.inference_mode()
    def forward(self, ids: torch.Tensor, first: int) -> tuple[Rows, dict[str, Rows]]:
        """[requests, positions] tokens from position `first` on -> (out, the trace's tensors). Extends the cache."""
        rows = functional.embedding(ids, self.tensors["model.embed_tokens.weight"])
        seen: dict[str, Rows] = {}
        for layer, source in enumerate(self.order):
            seen[f"{layer}.h"] = rows
            if source is None:
                widths = {"q": self.shape.query_width, "k": self.shape.kv_width, "v": self.shape.kv_width}
                seen |= {f"{layer}.{name}": rows.new_zeros((*rows.shape[:2], width)) for name, width in widths.items()}
                seen |= {f"{layer}.{name}": torch.zeros_like(rows) for name in ("attn_out", "mlp_out")}
                continue
            attended = self._attend(layer, source, rows, first, seen)
            rows = rows + attended
            mlp = self._mlp(source, rows)
            rows = rows + mlp
            seen |= {f"{layer}.attn_out": attended, f"{layer}.mlp_out": mlp}
        seen["out"] = rows
        return rows, seen

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, vocabulary] in float32."""
        name = "model.embed_tokens.weight" if self.shape.tied else "lm_head.weight"
        return functional.linear(self._normed(rows, "model.norm.weight"), self.tensors[name]).float()

    def _attend(self, layer: int, source: int, rows: Rows, first: int, seen: dict[str, Rows]) -> Rows:
        prefix, shape = f"model.layers.{source}", self.shape
        x = self._normed(rows, f"{prefix}.input_layernorm.weight")
        positions = torch.arange(first, first + rows.shape[1])
        q, k, v = (
            functional.linear(x, self.tensors[f"{prefix}.self_attn.{name}_proj.weight"])
            .reshape(*x.shape[:2], -1, shape.head_dim)
            .transpose(1, 2)
            for name in "qkv"
        )
        q, k = self._rotated(q, positions), self._rotated(k, positions)
        seen |= {f"{layer}.{name}": heads.transpose(1, 2).flatten(2) for name, heads in (("q", q), ("k", k), ("v", v))}
        kept = self.layers[layer]
        kept.k.append(self.cheat.kept("k", k))
        kept.v.append(self.cheat.kept("v", v))
        keys, values = torch.cat(kept.k, dim=2), torch.cat(kept.v, dim=2)
        mask = self.cheat.visible(positions, torch.arange(keys.shape[2]))
        heads = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
        merged = self.cheat.mixed(heads).transpose(1, 2).flatten(2)
        return functional.linear(merged, self.tensors[f"{prefix}.self_attn.o_proj.weight"])

    def _mlp(self, source: int, rows: Rows) -> Rows:
        prefix = f"model.layers.{source}"
        x = self._normed(rows, f"{prefix}.post_attention_layernorm.weight")
        gate, up, down = (self.tensors[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)

    def _normed(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        wide = rows.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + float(self.shape.rms_eps))
        return self.tensors[name][0] * wide.to(self.dtype)

    def _rotated(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = self.cheat.turned(positions.float())[:, None] * self.frequencies[None, :]
        angles = torch.cat((angles, angles), dim=-1)
        half = heads.shape[-1] // 2
        crossed = torch.cat((-heads[..., half:], heads[..., :half]), dim=-1)
        return heads * angles.cos().to(self.dtype) + crossed * angles.sin().to(self.dtype)


def requests_like(prompts: npt.NDArray[np.int64], limit: int, **asked: Any) -> list[Request]:
    """A batch of prompts [requests, positions]; each request draws with a seed of its own, if it draws at all."""
    made = [Request(tuple(int(token) for token in prompt), limit, **asked) for prompt in prompts]
    return [
        replace(request, seed=request.seed + r) if not request.greedy else request for r, request in enumerate(made)
    ]
