"""Calibration: serve a model honestly in many settings, and set the tolerances just above what honest serving does.

What is served comes from the worker's own stage (deploy.serving); what it should have been, from the judge's float64
reference. The two never share arithmetic.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deploy.serving import SETTINGS, Run, Setting, available, serve_all
from verifier.calibration import MARGIN, RARITY, REPORT_NAME, Bound, Calibration, bound
from verifier.commit import Request
from verifier.execution import Execution
from verifier.program import Kind
from verifier.referee.codec import BLOCK
from verifier.reference import Reference, real
from verifier.tolerance import Profile
from verifier.weights import Weights
from worker.batch import Batch, Piece
from worker.sampler import ONE, Draw
from worker.stage import Stage

FILE_NAME = REPORT_NAME
FORMAT = "plumb-calibration-3"
SEQUENCES = {"full": 32, "quick": 16}  # by the settings; more text makes narrower tolerances
LENGTH = 96  # positions of a sequence, where the model allows so many
LONG = 4  # times as long: the last sequence
SHORT = 2  # positions of as many sequences again: the first position is like no other
SEED = 20_260_101
TEMPERATURES = (0, ONE, 3 * ONE // 2)  # of the continuations, in turn: greedy text repeats itself


@dataclass(frozen=True)
class Measured:
    """A profile and what it was measured on.

    absent: settings that this machine can't run; screen: how far apart the errors of two logits lie when both sides
    execute everything themselves, from the tokens on.
    """

    profile: Profile
    calibration: Calibration
    margin: float
    settings: Sequence[Setting]
    absent: Sequence[Setting]
    positions: int
    screen: Bound

    def save(self, folder: Path) -> Path:
        """Writes tolerance.json, which is law, and calibration.json, which tells how it came about."""
        path = self.profile.save(folder)
        (folder / FILE_NAME).write_text(json.dumps(self.told(), indent=2) + "\n", encoding="utf-8")
        return path

    def told(self) -> dict[str, Any]:
        kinds = {}
        for kind, row in self.calibration.report(self.margin).items():
            quantiles = {f"{q:g}": value for q, value in row.quantiles.items()}
            kinds[kind.name.lower()] = {
                "verdicts": row.pieces,
                "quantiles": quantiles,
                "worst_at": dict(zip(("layer", "unit", "observation"), row.worst, strict=True)),
                "usual": {"least": row.usual[0], "largest": row.usual[1]},
                "floor_shares": list(row.shares),
                "tail_scale": row.scale,
                "margin": row.margin,
                "thresholds": list(row.thresholds),
            }
        logits = {"token": self.calibration.logits(self.margin), "screen": self.screen}
        return {
            "format": FORMAT,
            "profile_root": self.profile.root.hex(),
            "least_margin": self.margin,
            "rarity": RARITY,
            "positions": self.positions,
            "settings": [setting.name for setting in self.settings],
            "settings_absent": [setting.name for setting in self.absent],
            "machine": {"torch": torch.__version__, "processor": platform.machine(), "cpu": _capability()},
            "kinds": kinds,
            "logits": {name: vars(found) | {"margin": found.margin} for name, found in logits.items()},
        }


def calibrate(
    folder: Path,
    margin: float = MARGIN,
    sequences: int = 0,
    length: int = LENGTH,
    settings: str = "quick",
    progress: Callable[[str], None] = lambda _: None,
    stage_class: type[Stage] = Stage,
) -> Measured:
    """Measures the profile of the model in `folder`. Deterministic on one machine.

    sequences: 0 for SEQUENCES; settings: a key of SETTINGS.

    Raises ModelFolderError and UnsupportedModel for a folder that can't be served, UnseparableModel where honest runs
    differ too much, ServingFailed where a child process does.
    """
    here, absent = available(SETTINGS[settings])
    weights = Weights.open(folder)
    weights.check()
    stage = stage_class(folder, 0, weights.shape.layers, weights=weights)
    tokens = sample(stage, lengths(sequences or SEQUENCES[settings], length, weights.shape.max_positions - 1))
    calibration, reference = Calibration(len(here)), Reference(weights)
    exact = [_own_logits(weights, reference, sequence) for sequence in tokens]
    spreads = []
    runs = serve_all(folder, weights, tokens, here, stage_class)
    for setting in here:
        progress(setting.name)
        run = next(runs)
        observe(calibration, reference, run)
        for scores, own in zip(run.logits, exact, strict=True):
            error = scores.double().numpy() - own.numpy()
            spreads.append(error.max(axis=1) - error.min(axis=1))
    screen = bound(np.concatenate(spreads), margin, len(here))
    profile = calibration.profile(weights.shape, margin)
    positions = sum(len(sequence) for sequence in tokens)
    return Measured(profile, calibration, margin, here, absent, positions, screen)


def lengths(sequences: int, length: int, most: int) -> list[int]:
    """Of the sequences to serve: some short, the last one long, none longer than `most`."""
    usual = [length] * sequences
    return [min(n, most) for n in ([SHORT] * sequences + usual[:-1] + [LONG * length])]


def sample(stage: Stage, wanted: Sequence[int], seed: int = SEED) -> list[list[int]]:
    """Token sequences of the wanted lengths: random beginnings, continued as real jobs would be, greedily and drawn."""
    generator = np.random.default_rng(seed)
    out, requests = [], []
    for index, length in enumerate(wanted):
        start = max(1, length * (index % 16 + 1) // 17)
        out.append([int(token) for token in generator.integers(0, stage.shape.vocabulary, start)])
        requests.append(Request((), length, temperature=TEMPERATURES[index % len(TEMPERATURES)], seed=seed))
    cache = stage.cache()
    served = [0] * len(out)
    while any(len(tokens) < length for tokens, length in zip(out, wanted, strict=True)):
        going = [r for r, length in enumerate(wanted) if len(out[r]) < length]
        batch = Batch(tuple(Piece(r, served[r], len(out[r]) - served[r]) for r in going))
        fed = [token for r in going for token in out[r][served[r] :]]
        hidden, _ = stage.forward(stage.embed(np.array(fed, dtype=np.int64)), batch, cache)
        last = hidden[[span.stop - 1 for _, span in batch.spans()]]
        draws = [Draw(requests[r], r, len(out[r]) - 1) for r in going]
        for r, token in zip(going, stage.tokens(last, draws), strict=True):
            served[r] = len(out[r])
            out[r].append(token)
    return out


def observe(calibration: Calibration, reference: Reference, run: Run) -> None:
    """Adds every piece of a run to the calibration."""
    shape, dtype = reference.shape, reference.shape.served_dtype
    positions = np.concatenate([np.arange(len(trace["out"])) for trace in run.traces])
    all_rows = {key: np.concatenate([trace[key] for trace in run.traces]) for key in run.traces[0]}

    def add(kind: Kind, layer: int, name: str, columns: int, standard: torch.Tensor) -> None:
        served = real(all_rows[f"{layer}.{name}"], dtype).numpy()
        calibration.add_tensor(kind, layer, columns, served, standard.numpy())

    for layer in range(shape.layers):
        h, attn_out = all_rows[f"{layer}.h"], all_rows[f"{layer}.attn_out"]
        for kind, name in ((Kind.Q, "q"), (Kind.K, "k"), (Kind.V, "v")):
            add(kind, layer, name, shape.head_dim, reference.projected(kind, layer, h, positions))
        attended = [reference.attended(layer, *(trace[f"{layer}.{name}"] for name in "qkv")) for trace in run.traces]
        add(Kind.ATTEND, layer, "attn_out", BLOCK, torch.cat(attended))
        add(Kind.MLP, layer, "mlp_out", BLOCK, reference.transformed(layer, h, attn_out))
    exact = torch.cat([tile for _, tile in reference.logits(all_rows["out"])], dim=1)
    calibration.add_logits(torch.cat(run.logits).double().numpy(), exact.numpy())


def _own_logits(weights: Weights, reference: Reference, tokens: Sequence[int]) -> torch.Tensor:
    """[T, vocabulary] of a sequence that nobody served."""
    own = Execution(weights, tokens).arrays["out"]
    return torch.cat([tile for _, tile in reference.logits(own)], dim=1)


def _capability() -> str:
    return str(torch.backends.cpu.get_cpu_capability())
