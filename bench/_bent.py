"""A model served with every tensor bent as far as its tolerance allows, in the direction that a gradient asks for.

The forward is differentiable (float32, rounded to what is served, gradients passed through the rounding). Each head of
q, k, v and each block of attention and MLP output of every position is off by the profile's threshold, or by a multiple
of it; what follows is computed from what was served, as the law has it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import pi, sqrt

import numpy as np
import torch
from torch.nn import functional

from verifier.program import Kind
from verifier.referee.codec import BLOCK
from verifier.referee.fixed import Q30
from verifier.tolerance import Profile
from verifier.weights import Weights
from worker.stage import DTYPES

SLACK = 0.98  # of a threshold: the reference and this arithmetic differ
_SHRINKS = 3  # times that a unit is drawn back, where rounding to the served dtype carried it beyond
Directions = dict[str, torch.Tensor]  # by key of the trace: [requests, positions, width], each unit of length 1 or 0
_KIND = {"q": Kind.Q, "k": Kind.K, "v": Kind.V, "attn_out": Kind.ATTEND, "mlp_out": Kind.MLP}


@dataclass(frozen=True)
class Reach:
    """Which tensors may be bent, and how far: layers, whether earlier positions too, and in thresholds."""

    layers: Collection[int]
    history: bool
    scale: float


class Bent:
    """One model under one profile, for requests of one length."""

    def __init__(self, weights: Weights, profile: Profile) -> None:
        self.shape, self.profile = weights.shape, profile
        self.dtype = DTYPES[self.shape.served_dtype]
        self.tensors = {place.name: weights.float64(place.name).float() for place in weights.layout.tensors}
        self.turns = torch.from_numpy(np.array(weights.program.table, dtype=np.float64) / 2.0**64)

    def run(self, ids: torch.Tensor, reach: Reach, directions: Directions) -> tuple[torch.Tensor, Directions]:
        """ids [requests, positions] -> (logits [requests, vocabulary] of the last position, all served tensors)."""
        served: Directions = {}

        def serve(layer: int, name: str, standard: torch.Tensor) -> torch.Tensor:
            key = f"{layer}.{name}"
            value = standard
            if layer in reach.layers:
                radius = self._radius(layer, name, standard, reach)
                with torch.no_grad():
                    radius = self._within(key, standard, radius, directions[key])
                value = standard + radius * directions[key]
            served[key] = self._rounded(value)
            return served[key]

        h = functional.embedding(ids, self.tensors["model.embed_tokens.weight"])
        for layer in range(self.shape.layers):
            served[f"{layer}.h"], prefix = h, f"model.layers.{layer}"
            x = self._normed(h, f"{prefix}.input_layernorm.weight")
            q, k, v = (x @ self.tensors[f"{prefix}.self_attn.{name}_proj.weight"].T for name in "qkv")
            q, k, v = serve(layer, "q", self._turned(q)), serve(layer, "k", self._turned(k)), serve(layer, "v", v)
            mixed = self._mixed(q, k, v) @ self.tensors[f"{prefix}.self_attn.o_proj.weight"].T
            middle = self._rounded(h + serve(layer, "attn_out", mixed))
            x = self._normed(middle, f"{prefix}.post_attention_layernorm.weight")
            gate, up, down = (self.tensors[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
            h = self._rounded(middle + serve(layer, "mlp_out", (functional.silu(x @ gate.T) * (x @ up.T)) @ down.T))
        served["out"] = h
        head = "model.embed_tokens.weight" if self.shape.tied else "lm_head.weight"
        return self._normed(h[:, -1], "model.norm.weight") @ self.tensors[head].T, served

    def bend(
        self, ids: torch.Tensor, reach: Reach, gain: Callable[[torch.Tensor], torch.Tensor], steps: int
    ) -> tuple[torch.Tensor, Directions]:
        """The logits and served tensors after `steps` steps of ascent; gain: logits -> [requests], to be made large."""
        directions = self._nowhere(ids, reach)
        pulls = {key: torch.zeros_like(value) for key, value in directions.items()}
        best: tuple[float, Directions] = (-float("inf"), directions)
        for _ in range(steps):
            leaves = {key: value.requires_grad_(True) for key, value in directions.items()}
            logits, _ = self.run(ids, reach, leaves)
            total = gain(logits).sum()
            reached = float(total.detach())
            if reached > best[0]:
                best = reached, {key: value.detach() for key, value in leaves.items()}
            slopes = torch.autograd.grad(total, list(leaves.values()))
            directions = {}
            for key, slope in zip(leaves, slopes, strict=True):
                pulls[key] = 0.5 * pulls[key] + self._unit(key, slope)
                directions[key] = self._unit(key, pulls[key])
        with torch.no_grad():
            last = self.run(ids, reach, directions)
            if float(gain(last[0]).sum()) >= best[0]:
                return last
            return self.run(ids, reach, best[1])

    def _nowhere(self, ids: torch.Tensor, reach: Reach) -> Directions:
        with torch.no_grad():
            none = Reach((), reach.history, 0.0)
            _, served = self.run(ids, none, {})
        return {
            f"{layer}.{name}": torch.zeros_like(served[f"{layer}.{name}"]) for layer in reach.layers for name in _KIND
        }

    def _radius(self, layer: int, name: str, standard: torch.Tensor, reach: Reach) -> torch.Tensor:
        """How far each element's unit may be off: [requests, positions, width]."""
        kind = _KIND[name]
        columns = BLOCK if kind in (Kind.ATTEND, Kind.MLP) else self.shape.head_dim
        parts = []
        for unit, part in enumerate(torch.split(standard.detach(), columns, dim=2)):
            cell = self.profile.cell(kind, layer, unit)
            size = part.square().sum(dim=2, keepdim=True) + part.shape[2] * (cell.floor / Q30) ** 2
            parts.append((size.sqrt() * (reach.scale * SLACK * cell.num / cell.den)).expand_as(part))
        radius = torch.cat(parts, dim=2)
        if not reach.history:
            radius = radius.clone()
            radius[:, :-1] = 0
        return radius

    def _within(self, key: str, standard: torch.Tensor, radius: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        """The radius with which what is served, rounded, stays within the one given."""
        used = radius
        for _ in range(_SHRINKS):
            step = used * direction
            off = self._lengths(key, self._rounded(standard + step) - standard)
            noise = off.square() - self._lengths(key, step).square()
            left = (radius.square() - noise).clamp_min(0).sqrt()
            used = torch.where(off > radius, torch.minimum(used, 0.995 * left), used)
        return used

    def _lengths(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """Each element's unit's length: [requests, positions, width]."""
        columns = BLOCK if key.endswith("_out") else self.shape.head_dim
        parts = [part.norm(dim=2, keepdim=True).expand_as(part) for part in torch.split(tensor, columns, dim=2)]
        return torch.cat(parts, dim=2)

    def _unit(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """Each head or block of each position made of length 1."""
        return (tensor / self._lengths(key, tensor).clamp_min(1e-30)).detach()

    def _rounded(self, values: torch.Tensor) -> torch.Tensor:
        return values + (values.to(self.dtype).float() - values).detach()

    def _normed(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        scale = torch.rsqrt(rows.square().mean(-1, keepdim=True) + float(self.shape.rms_eps))
        return rows * scale * self.tensors[name][0]

    def _turned(self, rows: torch.Tensor) -> torch.Tensor:
        heads = rows.reshape(*rows.shape[:2], -1, 2, self.shape.head_dim // 2)
        phase = (torch.arange(rows.shape[1], dtype=torch.float64)[:, None] * self.turns[None, :]) % 1.0 * 2 * pi
        c, s = phase.cos().float()[:, None, :], phase.sin().float()[:, None, :]
        a, b = heads[:, :, :, 0], heads[:, :, :, 1]
        return torch.stack((a * c - b * s, b * c + a * s), dim=3).flatten(2)

    def _mixed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        hd, group = self.shape.head_dim, self.shape.heads // self.shape.kv_heads
        q, k, v = (rows.reshape(*rows.shape[:2], -1, hd).transpose(1, 2) for rows in (q, k, v))
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        weights = torch.softmax((q @ k.transpose(2, 3) / sqrt(hd)).masked_fill(future, float("-inf")), dim=3)
        return (weights @ v).transpose(1, 2).flatten(2)
