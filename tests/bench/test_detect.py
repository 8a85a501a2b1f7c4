"""The attack matrix on a tiny model: what each cheat does, that the bench itself serves honestly, how rates count."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import BenchError, detect
from bench._attacks import (
    DRAWN,
    Copied,
    Kept,
    Order,
    OtherLaw,
    OtherPrompt,
    PrunedHead,
    Quantised,
    Spoofed,
    SystemPrompt,
    Turned,
    Window,
    integers,
    nf4,
    small_floats,
)
from bench._cells import Judged, judge, judge_all, peaks, row, sampled, wilson
from bench._served import Cheat, Result, Server, requests_like
from bench.detect import Plan
from tests.end_to_end import random_model
from tests.verifier import tiny
from verifier.audit import Auditor
from verifier.program import Kind
from verifier.referee.floats import Dtype
from verifier.weights import Weights
from worker.stage import from_bits

torch.set_num_threads(1)
PROMPT, OUTPUT = 12, 6


@pytest.fixture(scope="module")
def auditor(tmp_path_factory: pytest.TempPathFactory) -> Auditor:
    weights, profile = random_model.make(tmp_path_factory.mktemp("model"), Dtype.BFLOAT16, num_hidden_layers=2)
    return Auditor(weights, profile)


def serve(auditor: Auditor, cheat: Cheat | None, prefill: int = 0, **asked: Any) -> list[Result]:
    prompts = np.random.default_rng(4).integers(0, auditor.shape.vocabulary, (2, PROMPT))
    return Server(auditor.weights, cheat).run(requests_like(prompts, OUTPUT, **asked), prefill)


@pytest.mark.parametrize("asked", [{}, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("prefill", [0, 5])
def test_the_benchs_server_is_honest_as_it_stands(auditor: Auditor, asked: dict[str, int], prefill: int) -> None:
    for result in serve(auditor, None, prefill, **asked):
        judged = judge(auditor, result)
        assert judged.ratio.shape == (2, PROMPT + OUTPUT - 1) and judged.ratio.max() < 1
        assert not judged.cells.any() and not judged.full and judged.suspicions == []


# Where each cheat shows: a function of (layer, position) for cells that must convict.
everywhere = lambda layer, t: True  # noqa: E731
CHEATS: dict[str, tuple[Callable[[Auditor], Cheat], Callable[[int, int], bool]]] = {
    "int8 a row": (lambda a: Quantised(integers(8)), everywhere),
    "int4": (lambda a: Quantised(integers(4), 32), everywhere),
    "e4m3": (lambda a: Quantised(small_floats(torch.float8_e4m3fn)), everywhere),
    "NF4": (lambda a: Quantised(nf4, 64), everywhere),
    "e5m2 cache": (lambda a: Kept(small_floats(torch.float8_e5m2)), everywhere),
    "window": (lambda a: Window(4), lambda layer, t: t >= 4),
    "sinks": (lambda a: Window(4, 2), lambda layer, t: t >= 6),
    "skipped": (lambda a: Order({1: None}), lambda layer, t: layer == 1),
    "repeated": (lambda a: Order({1: 0}), lambda layer, t: layer == 1),
    "pruned": (lambda a: PrunedHead(), everywhere),
    "prompt": (lambda a: OtherPrompt(4, a.shape.vocabulary), lambda layer, t: t >= 3),
    "system": (lambda a: SystemPrompt([7, 8, 9]), everywhere),
    "shifted": (lambda a: Turned(shift=1.0), everywhere),
    "scaled": (lambda a: Turned(0.5), lambda layer, t: t >= 1),
    "spoofed": (lambda a: Spoofed(a.weights), everywhere),
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_seen_in_every_cell_that_it_touches(auditor: Auditor, name: str) -> None:
    make, touches = CHEATS[name]
    for result in serve(auditor, make(auditor)):
        cells = judge(auditor, result).cells
        missed = [place for place in np.ndindex(cells.shape) if touches(*place) and not cells[place]]
        assert missed == []


def test_a_spoofed_last_layer_ends_in_the_models_own_hidden_state(auditor: Auditor) -> None:
    for result in serve(auditor, Spoofed(auditor.weights)):
        with torch.inference_mode():
            own, _ = Server(auditor.weights).forward(torch.tensor([result.fed]), 0)
        served = from_bits(np.array(result.arrays["out"]), torch.bfloat16)
        assert float((served.float() - own[0].float()).norm() / own[0].float().norm()) < 0.01


def test_tokens_of_another_seed_are_seen_where_they_were_drawn(auditor: Auditor) -> None:
    for result in serve(auditor, OtherLaw(other_seed=1), **DRAWN):
        own = judge(auditor, result).own
        assert own[-1, PROMPT - 1 :].any() and not own[0].any() and not own[:, : PROMPT - 1].any()


def test_an_earlier_jobs_trace_is_seen_by_its_prompt(auditor: Auditor) -> None:
    earlier = serve(auditor, None)
    now = [replace(result, request=replace(result.request, prompt=result.request.prompt[::-1])) for result in earlier]
    for result in Copied(earlier).served(now):
        judged = judge(auditor, result)
        assert judged.prompt.any() and judged.full and judged.cells[:, -1].all()


def test_attention_to_oneself_alone_has_a_peak_of_one(auditor: Auditor) -> None:
    (first, _) = serve(auditor, None)
    found = peaks(auditor, first)
    assert found[:, 0] == pytest.approx(1.0) and found.shape == (2, PROMPT + OUTPUT - 1)
    assert (found > 1 / np.arange(1, PROMPT + OUTPUT)).sum() >= found.size - 2  # no flatter than flat


def test_wilsons_interval_by_hand() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def judged(own: list[list[bool]], prompt: list[bool] | None = None) -> Judged:
    ratio = np.where(np.array(own), 2.0, 0.5)
    return Judged(ratio, np.array(prompt or [False] * ratio.shape[1]), [], False, None)  # type: ignore[arg-type]


def test_eight_cells_are_spread_over_the_layers() -> None:
    random = np.random.default_rng(0)
    one_layer = judged([[False] * 5, [True] * 5, [False] * 5]).cells
    assert sampled([one_layer], 8, 50, random) == 50  # three layers: each is looked at twice at least
    assert 5 < sampled([one_layer], 1, 90, random) < 60  # one cell finds it in one of three
    assert 35 < sampled([one_layer], 2, 90, random, spread=False) < 65  # 1 - (2/3)^2 = 5/9 of them
    only_first = [np.array([[True] * 5, [False] * 5, [False] * 5])]
    assert sampled([one_layer], 8, 50, random, only_first) == 0
    assert sampled([one_layer], 8, 50, random, [np.zeros((3, 5), dtype=np.bool_)]) == 0


def test_a_row_counts_cells_and_requests() -> None:
    found = row("attack", "x", "bfloat16", [judged([[True, False]]), judged([[False, False]])], trials=100)
    assert (found["cells"], found["rate_1"], found["rate_full"]) == (4, 0.25, 0.5)
    assert found["ci95"]["rate_1"] == wilson(1, 4)
    # A wrong embedding is seen by whoever looks at a cell at or after it.
    late = row("attack", "x", "bfloat16", [judged([[False] * 4, [False] * 4], [False, True, False, False])], trials=10)
    assert late["rate_1"] == 0.75


def test_a_finer_dtype_holds_what_the_source_could_not(auditor: Auditor, tmp_path: Path) -> None:
    folder = detect.variant(auditor.weights.folder, Dtype.FLOAT32, tmp_path / "wide")
    wide = Weights.open(folder)
    assert wide.shape.served_dtype == Dtype.FLOAT32
    a, b = (w.float64("model.layers.0.mlp.up_proj.weight") for w in (auditor.weights, wide))
    assert not torch.equal(a, b) and float((a - b).abs().max() / a.abs().max()) < 2**-9
    assert Kind.V in {audit.kind for audit in auditor.layer(serve(auditor, None)[0].stage(auditor.weights), 0, 0)}


def test_what_the_bench_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="expected dtypes of bfloat16, float16, float32, got int8"):
        detect.run(dtypes="int8")
    with pytest.raises(BenchError, match="expected settings of quick, full, got slow"):
        detect.run(settings="slow")
    with pytest.raises(BenchError, match="expected a model's folder"):
        detect.run(model=str(tmp_path), toploc=False)


def test_many_requests_at_once_are_judged_as_each_alone(auditor: Auditor) -> None:
    results = [
        *serve(auditor, Quantised(integers(8)), **DRAWN),
        *serve(auditor, OtherPrompt(4, auditor.shape.vocabulary)),
    ]
    for result, together in zip(results, judge_all(auditor, results), strict=True):
        alone = judge(auditor, result)
        assert np.allclose(together.ratio, alone.ratio, rtol=1e-6) and (together.prompt == alone.prompt).all()
        assert [v.request for v in together.suspicions] == [result.index] * len(alone.suspicions)


def test_each_part_of_the_matrix_reads_what_calibration_wrote(tmp_path: Path) -> None:
    config = random_model.config(Dtype.BFLOAT16, num_hidden_layers=2, max_position_embeddings=32)
    source = tiny.make_weights(tmp_path / "source", config, 7).folder
    plan = Plan(tmp_path, "quick", 1, honest=1, requests=2, prompt=12, output=4, trials=50, only="int4 weights, ")
    told = detect.measure(plan, source, "float32")
    assert told["calibration"]["positions"] == 2 + 31 and told["hidden"] == 256 and told["calibration_cpu_seconds"] > 0
    rows = detect.honest_rows(plan, "float32")
    assert [one["name"] for one in rows] == told["calibration"]["settings"]
    for one in rows:
        assert (one["kind"], one["dtype"], one["cells"]) == ("honest", "float32", 2 * (2 + 31))
        assert one["false_alarms"] == one["false_convictions"] == one["rate_1"] == one["rate_full"] == 0
        assert 0.1 < one["largest_ratio"] < 0.97
    greedy, drawn, int4 = detect.attack_rows(plan, "float32", None)
    assert greedy["false_alarms"] == drawn["false_alarms"] == 0 and greedy["rate_tokens"] == 0
    assert (int4["kind"], int4["cells"], int4["rate_1"], int4["rate_8"], int4["canonical"]) == (
        "attack",
        60,
        1,
        1,
        True,
    )
    assert 0.05 < int4["weight_error"] < 0.2
