"""Traces that are computed again: the same bits whatever else was in the batch, and stored where they are not."""

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.worker.pipeline_in_process import JOB, Tiny, serve, split
from verifier.commit import Request
from verifier.demand import Demand, Wanted, read_answer
from verifier.referee.codec import TILE_COLUMNS, TILE_ROWS
from verifier.tolerance import uniform_profile
from verifier.trace import RequestTrace, tensor_keys
from verifier.weights import identify
from worker.batch import Batch, Piece
from worker.config import Serving
from worker.demand import Answerer
from worker.errors import ConfigError, NotRepeated
from worker.job import JobFolder
from worker.recorder import load_roots, trace_path
from worker.repeat import RepeatableStage
from worker.retain import Traces
from worker.stage import Forward, Stage, to_bits

PROMPTS = [[(7 * r + 3 * t) % 211 for t in range(5 + 9 * r)] for r in range(6)]


def served(stage: Stage, dice: random.Random) -> list[dict[str, list[Any]]]:
    """All prompts, each in pieces of any size, with any others; by request the rows of every tensor."""
    cache, done = stage.cache(), [0] * len(PROMPTS)
    traces: list[dict[str, list[Any]]] = [{} for _ in PROMPTS]
    while left := [r for r, prompt in enumerate(PROMPTS) if done[r] < len(prompt)]:
        chosen = dice.sample(left, dice.randint(1, len(left)))
        pieces = [Piece(r, done[r], min(dice.choice([1, 1, 7, 40]), len(PROMPTS[r]) - done[r])) for r in chosen]
        ids = np.array([PROMPTS[p.request][t] for p in pieces for t in range(p.first, p.end)], np.int64)
        batch = Batch(tuple(pieces))
        _, captured = stage.forward(stage.embed(ids), batch, cache)
        for piece, span in batch.spans():
            done[piece.request] = piece.end
            for key, rows in captured.items():
                traces[piece.request].setdefault(key, []).extend(to_bits(rows)[span])
    return traces


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("model", ["tiny", "tiny_bf16"])
def test_a_request_has_the_same_trace_whatever_it_is_batched_with(
    model: str, paged: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder, _ = request.getfixturevalue(model)
    stage = RepeatableStage(folder, 0, 3)
    assert stage.paged
    stage.paged = paged
    again = [stage.regenerate(to_bits(stage.embed(np.array(prompt, np.int64)))) for prompt in PROMPTS]
    for seed in range(4):
        for r, trace in enumerate(served(stage, random.Random(seed))):
            for key, rows in trace.items():
                assert np.array_equal(np.stack(rows), again[r][key]), (seed, r, key)
    plain = Stage(folder, 0, 3)
    ids = np.array(PROMPTS[5], np.int64)
    expected, _ = plain.forward(plain.embed(ids), Batch((Piece(0, 0, len(ids)),)), plain.cache())
    came = torch.from_numpy(again[5]["out"].view(np.int16 if model == "tiny_bf16" else np.int32)).view(expected.dtype)
    tolerance = 5e-2 if model == "tiny_bf16" else 1e-4
    torch.testing.assert_close(came, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


REGENERATE = Serving(max_rows=16, retain="regenerate")


def test_demands_are_answered_from_traces_that_were_never_stored(
    tiny: Tiny, requests_batch: list[Request], tmp_path: Path
) -> None:
    stages = split(tiny[0], 3, 2, RepeatableStage)
    states = serve(tmp_path, stages, requests_batch, REGENERATE)
    stored = serve(tmp_path / "stored", stages, requests_batch)
    assert [state.tokens for state in states] == [state.tokens for state in stored]
    assert [state.root for state in states] == [state.root for state in stored]  # other batches would do as well
    for i, state in enumerate(states):
        folder = JobFolder(tmp_path / str(i), JOB)
        names = {path.suffixes[0] for path in folder.path.glob("*.safetensors")}
        assert names == ({".inputs"} if i else set())
        for r, node in enumerate(state.nodes):
            # A stage that was started again without being told to repeat still knows how.
            traces = Traces(Stage(tiny[0], stages[i].first_layer, stages[i].end_layer), most_bytes=1)
            trace = traces.load(folder, r)
            assert traces.load(folder, r) is trace
            assert trace.tensors_root == node.tensors_root and trace.positions == node.positions
            assert {key: trace.tensor_root(key) for key in trace.keys} == load_roots(folder.path, trace.keys)[r]
            kept = RequestTrace.load(trace_path(tmp_path / "stored" / str(i) / "jobs" / JOB.hex(), r), trace.shape)
            assert all(np.array_equal(trace.arrays[key], kept.arrays[key]) for key in trace.keys)
            assert np.array_equal(traces.inputs(folder, r), kept.arrays[f"{kept.first_layer}.h"])

    weights = stages[1].weights
    model = identify(weights, uniform_profile(weights.shape, 1, 4, 1 << 20, 1 << 30))
    chain: Any = None  # nothing is sent
    answerer = Answerer(chain, model, Traces(stages[1]), lambda job: JobFolder(tmp_path / "1", job))
    demand = Demand(JOB, 1, Wanted.LEAVES, 2, 3, 0, 9)  # tiles of v
    layers = (stages[1].first_layer, stages[1].end_layer)
    told = read_answer(demand, model, layers, states[1].root, len(requests_batch), answerer.openings(demand))
    assert told.leaves[0] == kept_v(tmp_path / "stored", stages[1])[:TILE_ROWS, :TILE_COLUMNS].tobytes()


def test_roots_of_a_file_for_each_request_are_read_as_before(
    tiny: Tiny, requests_batch: list[Request], tmp_path: Path
) -> None:
    """A job that an earlier version served has to be answered for by this one."""
    stages = split(tiny[0], 3, 2, RepeatableStage)
    states = serve(tmp_path, stages, requests_batch, REGENERATE)
    for i, (stage, state) in enumerate(zip(stages, states, strict=True)):
        folder, keys = JobFolder(tmp_path / str(i), JOB), tensor_keys(stage.shape, stage.first_layer, stage.end_layer)
        told = load_roots(folder.path, keys)
        (folder.path / "roots").unlink()
        for r, roots in enumerate(told):
            text = json.dumps({key: root.hex() for key, root in roots.items()})
            (folder.path / f"{r}.roots.json").write_text(text)
        assert load_roots(folder.path, keys) == told
        assert [Traces(stage).load(folder, r).tensors_root for r in range(len(told))] == [
            node.tensors_root for node in state.nodes
        ]


def kept_v(data: Path, stage: Stage) -> npt.NDArray[Any]:
    """v of the first layer of request 2, as stage 1 stored it."""
    trace = RequestTrace.load(trace_path(data / "1" / "jobs" / JOB.hex(), 2), stage.shape)
    return trace.arrays[f"{stage.first_layer}.v"]


class Unsteady(RepeatableStage):
    """Its first layer adds to every row that it ever computes a little more than to the one before."""

    rows = 0

    def observe(self, context: Forward, key: str, tensor: torch.Tensor) -> torch.Tensor:
        if key == f"{self.first_layer}.mlp_out":
            tensor = tensor.clone()
            for row in range(context.batch.rows):
                self.rows += 1
                tensor[row, 0] += 2.0**-10 * self.rows
        return super().observe(context, key, tensor)


def test_a_stage_that_does_not_repeat_stores_and_says_why(
    tiny: Tiny, requests_batch: list[Request], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "plumb.worker.retain"):
        states = serve(tmp_path, [Unsteady(tiny[0], 0, 3)], requests_batch, REGENERATE)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "0.mlp_out comes out differently when computed again" in said[0]
    for r, node in enumerate(states[0].nodes):
        trace = RequestTrace.load(trace_path(tmp_path / "0" / "jobs" / JOB.hex(), r), Stage(tiny[0], 0, 3).shape)
        assert trace.tensors_root == node.tensors_root


def test_a_stage_of_another_kind_stores_and_says_why(
    tiny: Tiny, requests_batch: list[Request], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "plumb.worker.retain"):
        serve(tmp_path, [Stage(tiny[0], 0, 3)], requests_batch, REGENERATE)
    assert [record.getMessage() for record in caplog.records] == ["traces are stored: Stage repeats nothing"]
    assert all(trace_path(tmp_path / "0" / "jobs" / JOB.hex(), r).exists() for r in range(len(requests_batch)))


def test_a_trace_that_comes_out_differently_later_is_not_told(
    tiny: Tiny, requests_batch: list[Request], tmp_path: Path
) -> None:
    serve(tmp_path, [RepeatableStage(tiny[0], 0, 3)], requests_batch, REGENERATE)
    with pytest.raises(NotRepeated, match="request 1: expected tensors with root"):
        Traces(Unsteady(tiny[0], 0, 3)).load(JobFolder(tmp_path / "0", JOB), 1)


def test_only_a_share_is_looked_at_if_so_told(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    regenerate = RepeatableStage.regenerate

    def counted(self: RepeatableStage, inputs: Any) -> dict[str, Any]:
        looked.append(len(inputs))
        return regenerate(self, inputs)

    monkeypatch.setattr(RepeatableStage, "regenerate", counted)
    requests = [Request((1 + r, 2), 1) for r in range(8)]
    chosen = Serving(max_rows=16, retain="regenerate", regenerate_checked=0.25)
    serve(tmp_path, [RepeatableStage(tiny[0], 0, 3)], requests, chosen)
    assert len(looked) == 2
    assert not list((tmp_path / "0").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("given", "said"),
    [({"retain": "forget"}, "expected one of store, regenerate"), ({"regenerate_checked": 1.5}, "expected 0 .. 1")],
)
def test_other_ways_to_retain_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Serving(**given)
