"""How often an adversary that stays inside every tolerance changes a token, and at which multiple of the thresholds.

`plumb bench adversary --report FILE`. Options: model (a calibrated folder; default the demo's), requests, positions,
steps (of the gradient's ascent), scales (thresholds, comma-separated).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import BenchError
from bench._bent import Bent, Reach
from bench._cells import judge, wilson
from bench._served import Result
from deploy.calibrate import FILE_NAME as CALIBRATION
from deploy.calibrate import sample
from verifier.audit import Auditor
from verifier.commit import Request
from verifier.referee.fixed import Q30
from verifier.tolerance import Profile
from verifier.weights import Weights
from worker.stage import DTYPES, Stage, to_bits

ROOT = Path(__file__).resolve().parent.parent
SEED = 99
Gain = Callable[[torch.Tensor], torch.Tensor]  # logits [requests, vocabulary] -> what is to be made large [requests]
GOALS = ("the second best token", "the tenth best token", "a token drawn at random")


def run(
    model: str = "", requests: int = 16, positions: int = 48, steps: int = 10, scales: str = "0.5,1,2,4"
) -> dict[str, Any]:
    folder = Path(model) if model else ROOT / ".plumb" / "models" / "demo"
    if not (folder / CALIBRATION).exists():
        raise BenchError(f"expected a folder with {CALIBRATION}, as `plumb model calibrate` writes it, got {folder}")
    screen = float(json.loads((folder / CALIBRATION).read_text(encoding="utf-8"))["logits"]["screen"]["threshold"])
    weights = Weights.open(folder)
    profile, shape = Profile.load(folder, weights.shape), weights.shape
    bent, auditor = Bent(weights, profile), Auditor(weights, profile)
    stage = Stage(folder, 0, shape.layers, weights=weights)
    # The model's own text; where it ends, the next token is at stake.
    texts = [text[-positions:] for text in sample(stage, [2 * positions] * requests, SEED)]
    ids = torch.tensor(texts)
    margin = profile.margin / Q30
    with torch.no_grad():
        honest, _ = bent.run(ids, Reach((), False, 0.0), {})
    ranks = honest.argsort(dim=1, descending=True)
    random = np.random.default_rng(SEED)
    any_token = ranks[range(requests), random.integers(10, shape.vocabulary, requests)]
    wanted = dict(zip(GOALS, (ranks[:, 1], ranks[:, 9], any_token), strict=True))
    leads = {goal: honest.amax(dim=1) - honest.gather(1, goals[:, None])[:, 0] for goal, goals in wanted.items()}
    places = {
        "the last layer, at the token's position": ((shape.layers - 1,), False),
        "the middle layer, at all positions": ((shape.layers // 2,), True),
        "all layers, at the token's position": (range(shape.layers), False),
        "all layers, at all positions": (range(shape.layers), True),
    }
    rows = []
    for goal, goals in wanted.items():

        def gain(logits: torch.Tensor, goals: torch.Tensor = goals) -> torch.Tensor:
            others = logits.scatter(1, goals[:, None], -torch.inf).amax(dim=1)
            return logits.gather(1, goals[:, None])[:, 0] - others

        for place, (layers, history) in places.items():
            for scale in (float(text) for text in str(scales).split(",")):
                reach = Reach(layers, history, scale)
                logits, served = bent.bend(ids, reach, gain, steps)
                reached = gain(logits)
                won = int((reached > 0).sum())
                changed = reached > -margin  # the token's own margin is used as well
                within, unseen = int(changed.sum()), int((changed & (leads[goal] <= screen)).sum())
                row = {"goal": goal, "where": place, "thresholds": scale, "requests": requests}
                row |= {"success_rate": within / requests, "ci95": wilson(within, requests)}
                row |= {"unseen_by_tokens": unseen / requests, "without_token_margin": won / requests}
                row |= {"moved": float((reached + leads[goal]).median())}
                if scale == 1:
                    row["largest_ratio"] = max(_judged(auditor, texts, goals, served))
                rows.append(row)
    return {
        "model": {"hidden": shape.hidden, "kv_width": shape.kv_width, "layers": shape.layers},
        "token_margin": margin,
        "screen_margin": screen,
        "honest_within_margin": {goal: float((lead <= margin).double().mean()) for goal, lead in leads.items()},
        "median_lead": {goal: float(lead.median()) for goal, lead in leads.items()},
        "results": rows,
    }


def _judged(
    auditor: Auditor, texts: list[list[int]], goals: torch.Tensor, served: dict[str, torch.Tensor]
) -> list[float]:
    """The worst ratio of each request's pieces, by the watchtower's audit; but for the token itself."""
    dtype, out = DTYPES[auditor.shape.served_dtype], []
    for r, text in enumerate(texts):
        arrays = {key: to_bits(rows[r].to(dtype)) for key, rows in served.items()}
        judged = judge(auditor, Result(r, Request(tuple(text), 1), (int(goals[r]),), arrays))
        out += [float(judged.ratio[:, :-1].max()), float(judged.ratio[:-1].max())]
    return out
