"""What each strategy looks at, what it downloads, and what it finds."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench._town import REQUESTS, SPOILT_POSITION, SPOILT_REQUEST, Hall, Served, facts, model, say, serve
from challenger.evidence import Archive, Dossier, Evidence, Unavailable
from challenger.fetch import Ask, Fetcher
from challenger.judge import MISSES, SCREEN_MARGINS, Findings, Judge
from challenger.strategy import THIN, Cell, Strategy, draw, parse_strategy, settled, thinned
from challenger.units import Seen
from verifier.audit import JUDGED, Verdict
from verifier.canonical import Case
from verifier.commit import WHOLE_TOP_P, Request
from verifier.program import Kind
from verifier.referee.fixed import Q30
from verifier.sampling import noise
from verifier.tolerance import InvalidProfile

LAYERS = 2


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    folder = tmp_path_factory.mktemp("model")
    model(folder)
    return Judge(folder)


@pytest.fixture(scope="module")
def hall() -> Iterator[Hall]:
    with Hall() as hall:
        yield hall


def look(judge: Judge, hall: Hall, served: Served, folder: Path, ask: Ask) -> tuple[Evidence, Findings, list[str]]:
    asked: list[str] = []

    def listen(_handler: object, path: str) -> bool:
        asked.append(path.partition("?")[0])
        return False

    hall.misbehave = listen
    known = facts(judge.weights, served, hall)
    evidence = Fetcher(Archive(folder), 1 << 30).fetch(known, judge.weights.shape, 60.0, ask)
    assert evidence.missing == ()
    return evidence, judge.audit(evidence), asked


def every(served: Served) -> list[Cell]:
    spans = [(r, trace.positions) for r, trace in enumerate(served.traces[0])]
    return [Cell(r, layer, t) for r, positions in spans for layer in range(LAYERS) for t in range(positions)]


def test_strategies_are_parsed() -> None:
    assert [str(parse_strategy(text)) for text in ("full", "tokens", "auto", "cells:16", "sweep:8")] == [
        *("full", "tokens", "auto", "cells:16", "sweep:8")
    ]
    for wrong in ("", "cells", "cells:", "cells:0", "cells:-1", "cells:1e3", "Full", "cells:9999999999"):
        with pytest.raises(ValueError, match="expected full, tokens, auto, sweep:N or cells:N"):
            parse_strategy(wrong)


def test_cells_are_drawn_uniformly_over_request_layer_and_position() -> None:
    positions, layers, rounds = [3, 1, 6], 2, 4000
    counts: Counter[Cell] = Counter()
    for seed in range(rounds):
        drawn = draw(positions, layers, 4, seed.to_bytes(4, "big"))
        assert len(set(drawn)) == 4
        counts.update(drawn)
        assert Counter(cell.layer for cell in drawn) == {0: 2, 1: 2}
    assert len(counts) == 20 and all(0 <= c.position < positions[c.request] for c in counts)
    expected = rounds * 4 / 20
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 43.8  # 0.1 % of chi-square with 19 degrees
    assert draw(positions, layers, 99, b"x") == tuple(sorted(counts))
    assert draw(positions, layers, 4, b"x") == draw(positions, layers, 4, b"x")


def test_eight_cells_look_at_each_of_six_layers_and_eight_layers_of_eighty() -> None:
    for seed in range(100):
        few = Counter(cell.layer for cell in draw([79] * 4, 6, 8, bytes([seed])))
        many = Counter(cell.layer for cell in draw([79] * 4, 80, 8, bytes([seed])))
        assert sorted(few.values()) == [1, 1, 1, 1, 2, 2] and list(many.values()) == [1] * 8


def test_a_prompt_that_was_changed_is_seen_by_any_cell_behind_it(judge: Judge, hall: Hall, tmp_path: Path) -> None:
    """A worker that embedded another first token and is consistent from there on."""
    swapped = serve(judge.weights, requests=(Request((9, 6, 7), 3), REQUESTS[1]))
    served = Served(REQUESTS, swapped.outputs, swapped.traces, swapped.tokens)
    for number in range(8):
        ask = Ask(Strategy("cells", 1), seed=bytes([number]))
        _, findings, _ = look(judge, hall, served, tmp_path / str(number), ask)
        (cell,) = findings.cells
        assert [(v.kind, v.request, v.position, v.token) for v in findings.wrong] == (
            [(Kind.EMBED, 0, 0, 5)] if cell.request == 0 else []
        )


def test_cells_download_their_columns_alone_and_judge_the_spoilt_one(judge: Judge, hall: Hall, tmp_path: Path) -> None:
    spoilt = serve(judge.weights, spoil=True)
    hits = []
    for number in range(12):
        ask = Ask(Strategy("cells", 1), seed=bytes([number]))
        evidence, findings, asked = look(judge, hall, spoilt, tmp_path / str(number), ask)
        (cell,) = findings.cells
        tensors = {path.split("/", 4)[-1] for path in asked if "/trace/" in path}
        after = "out" if cell.layer + 1 == LAYERS else f"{cell.layer + 1}.h"
        names = ("h", "q", "k", "v", "attn_out", "mlp_out")
        expected = {f"{cell.layer}.{name}" for name in names} | {after, "0.h"}
        assert tensors == {f"trace/{cell.request}/{key}" for key in expected}
        assert evidence.held == (False, False) and evidence.plan == "cells:1"
        hit = cell == Cell(SPOILT_REQUEST, 1, SPOILT_POSITION)
        hits.append(hit)
        assert [(v.kind, v.request, v.layer, v.position) for v in findings.wrong] == (
            [(Kind.MLP, SPOILT_REQUEST, 1, SPOILT_POSITION)] if hit else []
        )
    whole = Ask(Strategy("cells", 1000), seed=b"")
    _, findings, _ = look(judge, hall, spoilt, tmp_path / "whole", whole)
    assert list(findings.cells) == sorted(every(spoilt)) and [v.kind for v in findings.wrong] == [Kind.MLP]


@pytest.mark.parametrize("refused", ["0.h", "0.k", "1.h", "1.q", "1.mlp_out", "out"])
def test_a_stage_that_breaks_off_is_judged_by_what_it_gave_alone(
    judge: Judge, hall: Hall, tmp_path: Path, refused: str
) -> None:
    """Its other columns are on disk already: what is missing between them is no zero."""
    spoilt = serve(judge.weights, spoil=True)
    for served, wrong in ((serve(judge.weights), []), (spoilt, [Kind.MLP])):
        hall.misbehave = lambda handler, path: f"/1/{refused}?" in path and say(handler, b"", 503)
        known, folder = facts(judge.weights, served, hall), tmp_path / str(len(wrong))
        ask = Ask(Strategy("cells", 1000), seed=b"")
        evidence = Fetcher(Archive(folder), 1 << 30).fetch(known, judge.weights.shape, 20.0, ask)
        assert len(evidence.missing) == 1
        assert [(v.kind, v.request) for v in judge.audit(evidence).wrong] == [(kind, SPOILT_REQUEST) for kind in wrong]
        stage = 0 if refused.startswith("0") else 1
        trace = evidence.trace(stage, 1)
        if trace is not None:
            with pytest.raises(Unavailable, match="is not on disk"):
                trace.open_row(refused, 0, 0, 1)


def test_who_comes_near_its_tolerance_everywhere_keeps_no_judge_busy(
    judge: Judge, hall: Hall, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence, _, _ = look(judge, hall, serve(judge.weights), tmp_path, Ask())
    near = Seen()
    places = [(r, t) for r, trace in enumerate((evidence.trace(0, 0), evidence.trace(0, 1))) if trace for t in range(3)]
    near.exact([Verdict(0.98 + t / 1000, 0, kind, r, 0, t, 0) for kind in JUDGED for r, t in places * 10])
    cases: list[Verdict] = []

    def case(dossier: Dossier, verdict: Verdict) -> Case:
        cases.append(verdict)
        return Judge.case(judge, dossier, verdict)

    monkeypatch.setattr(judge, "case", case)
    assert judge.audit(evidence, lambda units: [near]).wrong == ()
    assert Counter(verdict.kind for verdict in cases) == dict.fromkeys(JUDGED, MISSES)


def test_all_cells_see_what_a_full_audit_sees(judge: Judge, hall: Hall, tmp_path: Path) -> None:
    honest = serve(judge.weights)
    _, full, _ = look(judge, hall, honest, tmp_path / "full", Ask())
    _, cells, _ = look(judge, hall, honest, tmp_path / "cells", Ask(Strategy("cells", 1000)))
    assert full.wrong == cells.wrong == () and full.pieces == cells.pieces
    assert cells.worst == pytest.approx(full.worst, rel=1e-3, abs=1e-6)
    assert full.receipt()["strategy"] == "full" and len(cells.receipt()["cells"]) == len(every(honest))


def test_a_sweep_sees_what_a_full_audit_sees_but_for_the_mlp_at_positions_not_drawn(
    judge: Judge, hall: Hall, tmp_path: Path
) -> None:
    spoilt, hits = serve(judge.weights, spoil=True), []
    _, full, _ = look(judge, hall, spoilt, tmp_path / "full", Ask(seed=b"full"))
    positions = [trace.positions for trace in spoilt.traces[0]]
    for number in range(12):
        ask = Ask(Strategy("sweep", 2), seed=bytes([number]))
        _, findings, _ = look(judge, hall, spoilt, tmp_path / str(number), ask)
        blocks = judge.weights.shape.blocks
        unseen = sum(count - -(-count // 2) for count in positions) * LAYERS * blocks
        assert findings.receipt()["strategy"] == "sweep:2" and findings.pieces == full.pieces - unseen
        place = ask.seed + SPOILT_REQUEST.to_bytes(4, "big") + (1).to_bytes(4, "big")
        hit = SPOILT_POSITION in thinned(positions[SPOILT_REQUEST], 2, place)
        hits.append(hit)
        assert findings.wrong == (full.wrong if hit else ())
    assert 0 < sum(hits) < 12


def test_a_game_can_be_played_from_columns(judge: Judge, hall: Hall, tmp_path: Path) -> None:
    spoilt = serve(judge.weights, spoil=True)
    seen, findings, _ = look(judge, hall, spoilt, tmp_path, Ask(Strategy("cells", 1000)))
    again = Fetcher(seen.archive, 1 << 30).load(facts(judge.weights, spoilt, hall), judge.weights.shape)
    case = judge.case(again, findings.wrong[0])
    assert case.verdict()
    trace = again.trace(1, SPOILT_REQUEST)
    assert trace is not None and trace.tensors_root == spoilt.traces[1][SPOILT_REQUEST].tensors_root
    opening = trace.open_row("1.mlp_out", SPOILT_POSITION, 0, 256)
    assert opening == spoilt.traces[1][SPOILT_REQUEST].open_row("1.mlp_out", SPOILT_POSITION, 0, 256)


def test_roots_that_are_not_those_committed_to_are_refused(judge: Judge, hall: Hall, tmp_path: Path) -> None:
    served = serve(judge.weights)
    known = facts(judge.weights, served, hall)
    hall.served[known.id.hex()] = Served(served.requests, served.outputs, served.traces[::-1], served.tokens)
    hall.misbehave = lambda handler, path: False
    evidence = Fetcher(Archive(tmp_path), 1 << 30).fetch(known, judge.weights.shape, 20.0, Ask(Strategy("cells", 1000)))
    assert len(evidence.missing) == 2


def test_tokens_download_no_tensor(judge: Judge, hall: Hall, tmp_path: Path) -> None:
    _, findings, asked = look(judge, hall, serve(judge.weights), tmp_path, Ask(Strategy("tokens")))
    assert findings.closer == () and findings.wrong == () and not any("/trace/" in path for path in asked)


def test_a_token_far_off_has_its_request_looked_at_whole(judge: Judge, hall: Hall, tmp_path: Path) -> None:
    """A worker that says another token than its own last row chooses."""
    honest = serve(judge.weights)
    first = honest.outputs[0]
    lied = (first.tokens[0], first.tokens[1], (first.tokens[2] + 1) % 200)
    outputs = (type(first)(first.start, first.count, first.code, lied), *honest.outputs[1:])
    served = Served(honest.requests, outputs, honest.traces, honest.tokens)
    evidence, findings, _ = look(judge, hall, served, tmp_path, Ask(Strategy("tokens")))
    assert findings.closer == (0,)
    evidence, findings, asked = look(judge, hall, served, tmp_path, Ask(Strategy("tokens"), closer=findings.closer))
    assert {path.split("/")[5] for path in asked if "/trace/" in path} == {"0"}
    assert [(v.kind, v.request, v.token) for v in findings.wrong] == [(Kind.TOKEN, 0, lied[-1])]
    assert evidence.plan == "tokens" and len(REQUESTS) == 2


def runner_up(judge: Judge, served: Served) -> tuple[Served, float]:
    """A worker that says the second best token at the end of request 0; by how many token margins it was second."""
    first = served.outputs[0]
    rows = served.traces[1][0].arrays["out"][-1:]
    logits = torch.cat([tile for _, tile in judge.auditor.reference.logits(rows)], dim=1)[0]
    best, second = logits.topk(2).indices.tolist()
    assert best == first.tokens[-1]
    output = replace(first, tokens=(*first.tokens[:-1], second))
    behind = float(logits[best] - logits[second]) / (judge.profile.margin / Q30)
    return Served(served.requests, (output, *served.outputs[1:]), served.traces, served.tokens), behind


def wider(judge: Judge, folder: Path, times: float) -> Judge:
    """The same model with a wider token margin."""
    shutil.copytree(judge.folder, folder)
    *others, margin = judge.profile.cells
    replace(judge.profile, cells=(*others, replace(margin, floor=round(times * margin.floor)))).save(folder)
    return Judge(folder)


def test_the_margin_that_was_measured_decides_what_is_looked_at(judge: Judge, hall: Hall, tmp_path: Path) -> None:
    served, behind = runner_up(judge, serve(judge.weights))
    judge = wider(judge, tmp_path / "wider", behind / 4)
    assert judge.margins == SCREEN_MARGINS
    behind = 4.0
    for margins, closer in ((behind * 1.01, ()), (behind * 0.99, (0,))):
        folder = tmp_path / str(margins)
        shutil.copytree(judge.folder, folder)
        logits = {"screen": {"threshold": 2 * margins}, "token": {"threshold": 2.0}}
        report = {"profile_root": judge.profile.root.hex(), "logits": logits}
        (folder / "calibration.json").write_text(json.dumps(report))
        told = Judge(folder)
        assert told.margins == pytest.approx(margins)
        _, findings, _ = look(told, hall, served, folder / "jobs", Ask(Strategy("tokens")))
        assert findings.closer == closer
        assert findings.pieces == 5 and findings.worst["screen"] == pytest.approx(behind / margins, rel=1e-3)
        (folder / "calibration.json").write_text(json.dumps(report | {"profile_root": "00"}))
        assert Judge(folder).margins == SCREEN_MARGINS  # of another calibration


def test_a_report_that_forgives_everything_is_not_believed(judge: Judge, tmp_path: Path) -> None:
    shutil.copytree(judge.folder, tmp_path / "model")
    logits = {"screen": {"threshold": 1e9}, "token": {"threshold": 1.0}}
    report = {"profile_root": judge.profile.root.hex(), "logits": logits}
    (tmp_path / "model" / "calibration.json").write_text(json.dumps(report))
    assert Judge(tmp_path / "model").margins == SCREEN_MARGINS


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"logits": {"screen": {"threshold": 0}, "token": {"threshold": 1}}, "profile_root": ""}']
)
def test_a_calibration_that_is_none_is_refused(judge: Judge, tmp_path: Path, text: str) -> None:
    shutil.copytree(judge.folder, tmp_path / "model")
    (tmp_path / "model" / "calibration.json").write_text(text)
    with pytest.raises(InvalidProfile, match=r"calibration\.json: expected"):
        Judge(tmp_path / "model")


def test_drawn_tokens_are_screened_by_the_law_of_drawing(judge: Judge, hall: Hall, tmp_path: Path) -> None:
    """What a seed draws stands; the least likely token of all does not."""
    request = Request((5, 6, 7), 1, temperature=1 << 16, top_k=20, seed=3)
    arrays = serve(judge.weights, requests=(Request((5, 6, 7), 1), REQUESTS[1]))
    rows = arrays.traces[1][0].arrays["out"][-1:]
    logits = torch.cat([tile for _, tile in judge.auditor.reference.logits(rows)], dim=1)[0].numpy()
    scores = logits + request.temperature / WHOLE_TOP_P * noise(3, 0, 2, len(logits)) / Q30
    allowed = set(np.argsort(-logits)[:20].tolist())
    drawn = max(allowed, key=lambda token: scores[token])
    for token, closer in ((drawn, ()), (int(logits.argmin()), (0,))):
        output = replace(arrays.outputs[0], tokens=(token,))
        served = Served((request, REQUESTS[1]), (output, *arrays.outputs[1:]), arrays.traces, arrays.tokens)
        _, findings, _ = look(judge, hall, served, tmp_path / str(token), Ask(Strategy("tokens")))
        assert findings.closer == closer


def test_auto_takes_all_where_that_fits_and_as_many_cells_as_do_else(judge: Judge) -> None:
    shape = judge.weights.shape
    assert settled(Strategy("auto"), shape, [5, 3], 3600.0) == Strategy("full")
    wanted = [settled(Strategy("auto"), shape, [1000] * 100_000, 1.1**n) for n in range(180)]
    names = list(dict.fromkeys(each.name for each in wanted))  # the more time there is, the more is looked at
    assert names == ["cells", "sweep", "full"] and {each.count for each in wanted if each.name == "sweep"} == {THIN}
    few = settled(Strategy("auto"), shape, [1000] * 100_000, 0.5)
    more = settled(Strategy("auto"), shape, [1000] * 100_000, 5.0)
    assert few.name == more.name == "cells" and 1 <= few.count < more.count
    assert settled(Strategy("cells", 3), shape, [5], 1.0) == Strategy("cells", 3)
