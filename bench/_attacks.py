"""The ways to serve something else than the model, the prompt or the sampling law that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from bench._served import Cheat, Result, Rows, Server
from verifier.commit import WHOLE_TOP_P, Request
from verifier.vectors import add_bits
from verifier.weights import Weights
from worker.sampler import Draw
from worker.stage import from_bits, to_bits

NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
# Dettmers et al., QLoRA (arXiv 2305.14314), appendix E.
Rounding = Callable[[torch.Tensor], torch.Tensor]  # float32 [groups, size] -> the same, quantised


def integers(bits: int) -> Rounding:
    """Symmetric: one scale a group."""
    top = 2 ** (bits - 1) - 1

    def rounded(groups: torch.Tensor) -> torch.Tensor:
        scale = groups.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / top
        near: torch.Tensor = (groups / scale).round().clamp(-top, top) * scale
        return near

    return rounded


def small_floats(kind: torch.dtype) -> Rounding:
    """8-bit floats; the group's largest becomes the format's."""
    top = torch.finfo(kind).max

    def rounded(groups: torch.Tensor) -> torch.Tensor:
        scale = groups.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / top
        return (groups / scale).to(kind).float() * scale

    return rounded


def nf4(groups: torch.Tensor) -> torch.Tensor:
    scale = groups.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)
    return NF4[(groups[..., None] / scale[..., None] - NF4).abs().argmin(dim=-1)] * scale


class Quantised(Cheat):
    """Coarser weights in every matrix of every layer, in groups of `group` columns (0: whole rows)."""

    def __init__(self, rounding: Rounding, group: int = 0) -> None:
        self.rounding, self.group = rounding, group

    def weight(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        if not name.endswith("_proj.weight"):
            return weight
        size = self.group if self.group and weight.shape[1] % self.group == 0 else weight.shape[1]
        return self.rounding(weight.float().reshape(-1, size)).reshape(weight.shape).to(weight.dtype)


class OtherWeights(Cheat):
    """Another model of the same shape, or a mixture of both."""

    def __init__(self, others: Mapping[str, torch.Tensor], share: float = 1.0) -> None:
        self.others, self.share = others, share

    def weight(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight.float().lerp(self.others[name].float(), self.share).to(weight.dtype)


class HalfMlp(Cheat):
    """A narrower model: every other intermediate column."""

    def weight(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        if not name.endswith("down_proj.weight"):
            return weight
        return weight * (torch.arange(weight.shape[1]) % 2 == 0)


class Order(Cheat):
    """Layers left out (None) or put in place of others."""

    def __init__(self, changes: Mapping[int, int | None]) -> None:
        self.changes = changes

    def order(self, layers: int) -> Sequence[int | None]:
        return [self.changes.get(layer, layer) for layer in range(layers)]


class Shallow(Cheat):
    """A smaller model: every other layer."""

    def order(self, layers: int) -> Sequence[int | None]:
        return [layer if layer % 2 == 0 else None for layer in range(layers)]


class PrunedHead(Cheat):
    def mixed(self, heads: torch.Tensor) -> torch.Tensor:
        kept = torch.ones(heads.shape[1])
        kept[-1] = 0
        return heads * kept[:, None, None].to(heads.dtype)


class Kept(Cheat):
    """A coarser KV cache, one scale a head and position; the trace shows what was computed."""

    def __init__(self, rounding: Rounding) -> None:
        self.rounding = rounding

    def kept(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return self.rounding(rows.float()).to(rows.dtype)


class Window(Cheat):
    """Attention to the last `width` positions and the first `sinks`."""

    def __init__(self, width: int, sinks: int = 0) -> None:
        self.width, self.sinks = width, sinks

    def visible(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        near = (keys[None, :] > queries[:, None] - self.width) | (keys[None, :] < self.sinks)
        return near & super().visible(queries, keys)


class OtherPrompt(Cheat):
    """Every `every`-th token of the prompt is another."""

    def __init__(self, every: int, vocabulary: int) -> None:
        self.every, self.vocabulary = every, vocabulary

    def prompt(self, prompt: Sequence[int]) -> list[int]:
        chosen = range(self.every - 1, len(prompt), self.every)
        return [(token + 1) % self.vocabulary if i in chosen else token for i, token in enumerate(prompt)]


class SystemPrompt(Cheat):
    """Tokens in front of every prompt that no trace shows, at positions before the first."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)

    def prompt(self, prompt: Sequence[int]) -> list[int]:
        return [*self.tokens, *prompt]

    def turned(self, positions: torch.Tensor) -> torch.Tensor:
        return positions - len(self.tokens)


class Turned(Cheat):
    """RoPE of other positions: position * factor + shift."""

    def __init__(self, factor: float = 1.0, shift: float = 0.0) -> None:
        self.factor, self.shift = factor, shift

    def turned(self, positions: torch.Tensor) -> torch.Tensor:
        return positions * self.factor + self.shift


class OtherLaw(Cheat):
    """Draws by another request's parameters than those asked for."""

    def __init__(self, **changes: int) -> None:
        self.changes = changes

    def asked(self, request: Request) -> Request:
        changes: dict[str, Any] = dict(self.changes)
        seed = changes.pop("other_seed", 0)
        return replace(request, seed=request.seed + seed, **changes)


class Speculative(Cheat):
    """A draft of every other layer proposes each token, and the model accepts whatever is among its `best`."""

    def __init__(self, weights: Weights, best: int) -> None:
        self.draft, self.best, self.fed = Server(weights, Shallow()), best, 0
        self.told: list[int] = []

    def choose(self, server: Server, rows: Rows, logits: torch.Tensor, draws: list[Draw]) -> list[int]:
        own = super().choose(server, rows, logits, draws)
        if draws[0].position + 1 == len(draws[0].request.prompt):  # the draft reads the prompts
            ids = torch.tensor([draw.request.prompt for draw in draws])
            self.draft.begin()
            self.fed = 0
        else:
            ids = torch.tensor([[token] for token in self.told])
        guess, _ = self.draft.forward(ids, self.fed)
        self.fed += ids.shape[1]
        proposed = self.draft.logits(guess[:, -1]).argmax(dim=-1)
        among = (logits.topk(self.best).indices == proposed[:, None]).any(dim=1)
        self.told = [int(p) if a else o for p, a, o in zip(proposed, among, own, strict=True)]
        return self.told


class Copied(Cheat):
    """Hands over an earlier job's trace and tokens."""

    def __init__(self, earlier: Sequence[Result]) -> None:
        self.earlier = earlier

    def served(self, results: list[Result]) -> list[Result]:
        pairs = zip(results, self.earlier, strict=True)
        return [replace(now, tokens=old.tokens, arrays=old.arrays) for now, old in pairs]


class Spoofed(Quantised):
    """4-bit weights, and a last layer whose output is made up so that the final hidden state is the model's own."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(integers(4), 32)
        self.honest, self.last, self.dtype = Server(weights), weights.shape.layers - 1, weights.shape.served_dtype

    def served(self, results: list[Result]) -> list[Result]:
        out = []
        for result in results:
            self.honest.begin()
            with torch.inference_mode():
                true, _ = self.honest.forward(torch.tensor([result.fed]), 0)
            arrays = dict(result.arrays)
            before = add_bits(self.dtype, arrays[f"{self.last}.h"], arrays[f"{self.last}.attn_out"])
            missing = true[0].float() - from_bits(np.array(before), true.dtype).float()
            arrays[f"{self.last}.mlp_out"] = to_bits(missing.to(true.dtype))
            arrays["out"] = add_bits(self.dtype, before, arrays[f"{self.last}.mlp_out"])
            out.append(replace(result, arrays=arrays))
        return out


@dataclass(frozen=True)
class Attack:
    """A named way to cheat, and what the requests ask for: greedy unless `drawn`."""

    name: str
    cheat: Callable[[], Cheat]
    drawn: bool = False
    by_peak: bool = False  # reported by position and by how peaked the attention is


DRAWN: dict[str, Any] = {"temperature": 65536, "top_p": 62259, "seed": 77}  # temperature 1, top_p 0.95


def attacks(weights: Weights, others: Mapping[str, torch.Tensor], earlier: Sequence[Result]) -> list[Attack]:
    """others: a fine-tuned model's tensors; earlier: another job's results, of as many requests and positions."""
    shape = weights.shape
    middle = shape.layers // 2
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    system = [int(token) for token in np.random.default_rng(3).integers(0, shape.vocabulary, 16)]
    return [
        Attack("int8 weights, a scale a row", lambda: Quantised(integers(8))),
        Attack("int8 weights, groups of 128", lambda: Quantised(integers(8), 128)),
        Attack("int8 weights, groups of 16", lambda: Quantised(integers(8), 16)),
        Attack("int4 weights, groups of 32", lambda: Quantised(integers(4), 32)),
        Attack("fp8 e4m3 weights", lambda: Quantised(small_floats(e4m3))),
        Attack("fp8 e5m2 weights", lambda: Quantised(small_floats(e5m2))),
        Attack("NF4 weights, groups of 64", lambda: Quantised(nf4, 64)),
        *(Attack(f"int{bits} weights, a scale a row", partial(Quantised, integers(bits))) for bits in FINER),
        Attack("int8 KV cache", lambda: Kept(integers(8)), by_peak=True),
        Attack("fp8 e4m3 KV cache", lambda: Kept(small_floats(e4m3)), by_peak=True),
        Attack("fp8 e5m2 KV cache", lambda: Kept(small_floats(e5m2)), by_peak=True),
        Attack("KV eviction: 4 sinks and the last 32", lambda: Window(32, 4)),
        Attack("a sliding window of 48", lambda: Window(48)),
        Attack("a fine-tuned model", lambda: OtherWeights(others)),
        Attack("merged with a fine-tuned model, 50 %", lambda: OtherWeights(others, 0.5)),
        Attack("merged with a fine-tuned model, 10 %", lambda: OtherWeights(others, 0.1)),
        Attack("a smaller model: every other layer", Shallow),
        Attack("a smaller model: half of each MLP", HalfMlp),
        Attack("a skipped layer", lambda: Order({middle: None})),
        Attack("a repeated layer", lambda: Order({middle: middle - 1})),
        Attack("a pruned head in every layer", PrunedHead),
        Attack("another prompt", lambda: OtherPrompt(1, shape.vocabulary)),
        Attack("every eighth token of the prompt changed", lambda: OtherPrompt(8, shape.vocabulary)),
        Attack("a system prompt put in front", lambda: SystemPrompt(system)),
        Attack("positions off by one", lambda: Turned(shift=1.0)),
        Attack("RoPE scaled by 2", lambda: Turned(0.5)),
        Attack("RoPE scaled by 1.02", lambda: Turned(1 / 1.02)),
        Attack("another seed", lambda: OtherLaw(other_seed=1), drawn=True),
        Attack("temperature 0.9 instead of 1", lambda: OtherLaw(temperature=58982), drawn=True),
        Attack("no top_p instead of 0.95", lambda: OtherLaw(top_p=WHOLE_TOP_P), drawn=True),
        Attack("speculation that accepts the 3 best", lambda: Speculative(weights, 3)),
        Attack("the trace of an earlier job", lambda: Copied(earlier)),
        Attack("last-layer spoofing over int4 weights", lambda: Spoofed(weights)),
    ]


FINER = (9, 10, 11, 12)
