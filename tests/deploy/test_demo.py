"""The demo's own judgment: which scenarios run, what the chain's events say of them, and what the report tells."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from contracts.events import (
    Event,
    GameEnded,
    GameMoved,
    JobCommitted,
    JobOpened,
    JobPaid,
    JobRefunded,
    JobReleased,
    JobVoided,
    StageConvicted,
)
from contracts.records import Job
from deploy.demo import cli
from deploy.demo.outcome import FLAG, NOBODY, Outcome, events_of, is_final, outcome
from deploy.demo.players import ROLES
from deploy.demo.run import PROMPTS, STAGES, Result, make_requests, report, terms_for, write_report
from deploy.demo.scenarios import SCENARIOS, Ending, select
from tests.verifier import tiny
from verifier.commit import validate_request
from verifier.game import Game, Phase, Segment
from verifier.program import Kind
from verifier.referee.codec import Trace
from verifier.shape import shape_from_config

JOB, OTHER, GAME, SECOND = (bytes([n]) * 32 for n in (1, 2, 3, 4))
PROVED, SHOWN, DEFLECTED = 1, 3, 4
SEGMENT = Segment(JOB, 1, int(Kind.MLP), 0, 3, 5, 0)
AT: dict[str, Any] = {"contract": "", "block": 1, "log_index": 0, "transaction": b""}


def moved(segment: Segment = SEGMENT, id: bytes = GAME) -> GameMoved:
    trace, nothing = Trace(bytes(32), 0, 0, 0), bytes(32)
    game = Game(
        *(segment, "", "", 0, 0, 0, 0, nothing, nothing, 0, 0, trace, nothing, 0, nothing, Phase.STEPS, 0),
        *(0, 0, 0, 0, nothing, True, 0, 0, 0, 0, 0),
    )
    return GameMoved(id=id, job=segment.job, mover="", game=game, list=b"", place=0, **AT)


def ended(stage: int, convicted: int, reason: int, id: bytes = GAME, job: bytes = JOB) -> GameEnded:
    return GameEnded(id=id, job=job, stage=stage, convicted=convicted, reason=reason, **AT)


def convicted(stage: int) -> StageConvicted:
    return StageConvicted(id=JOB, stage=stage, challenger="", **AT)


def opened(id: bytes = JOB) -> list[Event]:
    job = Job(*(bytes(32),) * 3, *(0,) * 13)
    committed = JobCommitted(id=id, outputs=bytes(32), tokens=1, window_end=2, **AT)
    return [JobOpened(id=id, requester="", pipeline=bytes(32), job=job, **AT), committed]


PAID = JobPaid(id=JOB, price=1, returned=0, **AT)
VOIDED, RELEASED = JobVoided(id=JOB, **AT), JobReleased(id=JOB, **AT)
REFUNDED = JobRefunded(id=JOB, refund=1, no_show_fee=1, **AT)
LINK = replace(SEGMENT, kind=int(Kind.LINK))
LAST_STAGE = replace(SEGMENT, stage=2, kind=int(Kind.TOKEN))

# What the chain tells of each scenario, in order.
STORIES: dict[str, tuple[list[Event], Outcome]] = {
    "a": ([PAID], Outcome(Ending.PAID, None, None)),
    "b": ([moved(), ended(1, 1, PROVED), convicted(1), VOIDED, RELEASED], Outcome(Ending.SLASHED, 1, SEGMENT)),
    "c": ([moved(LINK), ended(1, 1, SHOWN), convicted(1), VOIDED, RELEASED], Outcome(Ending.SLASHED, 1, LINK)),
    "d": ([moved(LAST_STAGE), ended(2, 2, PROVED), convicted(2), VOIDED], Outcome(Ending.SLASHED, 2, LAST_STAGE)),
    "e": ([moved(), ended(1, 1, PROVED), convicted(1), VOIDED, RELEASED], Outcome(Ending.SLASHED, 1, SEGMENT)),
    "f": ([moved(), ended(1, 1, FLAG), convicted(1), VOIDED, RELEASED], Outcome(Ending.FLAGGED, 1, SEGMENT)),
    "g": ([moved(), ended(1, NOBODY, PROVED), PAID], Outcome(Ending.BOND_LOST, 1, SEGMENT)),
    "h": ([REFUNDED], Outcome(Ending.REFUNDED, None, None)),
}


def result(name: str, found: Outcome, margin: float | None = None, worst: dict[str, float] | None = None) -> Result:
    (scenario,) = select(name, None, STAGES)
    balances = {"requester": {"before": "10", "after": "9"}}
    sent = [{"method": "Escrow.open", "sender": "0x1", "gas": 5, "calldata_bytes": 6}]
    return Result(scenario, found, margin, balances, sent, 1.26, worst or {})


# ---- select


def test_all_scenarios_run_in_order_with_their_stages_resolved() -> None:
    chosen = select(None, None, STAGES)
    assert [scenario.name for scenario in chosen] == list("abcdefgh")
    assert {scenario.role for scenario in chosen} == set(ROLES)
    assert chosen[3].stage == STAGES - 1  # tokens are the last stage's
    assert {scenario.expected for scenario in chosen} == set(Ending) - {Ending.UNFINISHED}


def test_a_busy_machine_gets_a_longer_window_and_clock() -> None:
    assert [(t.window, t.clock) for t in (terms_for(False, busy) for busy in (0.0, 2.0, 5.0))] == [
        (20, 10),
        (20, 10),
        (50, 25),
    ]


def test_one_scenario_moves_to_the_stage_that_was_asked_for() -> None:
    assert [scenario.stage for scenario in select("b", 2, STAGES)] == [2]
    moved_to = {scenario.stage for scenario in select(None, 0, STAGES) if scenario.movable}
    assert moved_to == {0}
    assert SCENARIOS[1].stage == 1  # select made copies


@pytest.mark.parametrize(
    ("only", "stage", "reason"),
    [
        ("z", None, "got 'z'"),
        ("b", 3, "below 3, got 3"),
        (None, -1, "got -1"),
        *((name, 0, f"no stage for scenario {name}, got 0: only b, c, e, f, h can move") for name in "adg"),
    ],
)
def test_what_does_not_exist_is_refused(only: str | None, stage: int | None, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        select(only, stage, STAGES)


# ---- outcome


@pytest.mark.parametrize("name", STORIES)
def test_the_events_tell_each_ending(name: str) -> None:
    story, expected = STORIES[name]
    found = outcome([*opened(), *story])
    assert found == expected
    assert result(name, found).as_expected


@pytest.mark.parametrize("name", STORIES)
def test_an_ending_of_another_kind_is_not_as_expected(name: str) -> None:
    expected = {scenario.name: scenario.expected for scenario in SCENARIOS}
    for other, (story, _) in STORIES.items():
        found = outcome([*opened(), *story])
        same_ending = expected[other] == expected[name]
        guilty = expected[name] in (Ending.SLASHED, Ending.FLAGGED)
        same_stage = not guilty or found.stage == select(name, None, STAGES)[0].stage
        assert result(name, found).as_expected == (same_ending and same_stage), other
    assert not result(name, outcome(opened())).as_expected


def test_the_wrong_stage_convicted_is_not_as_expected() -> None:
    story = [moved(), ended(1, 0, DEFLECTED), convicted(0), VOIDED]
    found = outcome(story)
    assert found == Outcome(Ending.SLASHED, 0, SEGMENT)  # the sender, though the receiver was accused
    assert not result("b", found).as_expected


def test_a_conviction_outweighs_a_bond_that_was_lost_beside_it() -> None:
    in_vain = replace(SEGMENT, stage=0)
    story = [moved(in_vain, SECOND), ended(0, NOBODY, PROVED, SECOND), moved(), ended(1, 1, PROVED), convicted(1)]
    assert outcome(story) == Outcome(Ending.SLASHED, 1, SEGMENT)


def test_a_job_is_over_when_its_money_is_shared_out() -> None:
    for last in (PAID, REFUNDED, RELEASED):
        assert is_final([*opened(), last])
    assert not is_final([*opened(), moved(), ended(1, 1, PROVED), convicted(1), VOIDED])


def test_other_jobs_events_tell_nothing() -> None:
    paid_elsewhere = replace(PAID, id=OTHER)
    played_elsewhere = ended(0, 0, PROVED, job=OTHER)
    story = events_of([*opened(), *opened(OTHER), paid_elsewhere, played_elsewhere], JOB)
    assert story == opened()
    assert outcome(story).ending == Ending.UNFINISHED


# ---- report


def test_the_report_has_what_the_issue_asks_for(tmp_path: Path) -> None:
    worst = {"q": 0.7, "mlp": 0.8, "token": 0.1, "link": 0.0, "embed": 0.0}
    results = [
        result("a", STORIES["a"][1], None, worst),
        result("b", STORIES["b"][1], 3.5, {"mlp": 3.5}),
        result("c", STORIES["c"][1], float("inf"), {"link": float("inf")}),
        result("d", STORIES["d"][1], 40.0, {"token": 40.0}),
        result("g", STORIES["g"][1], 2.0, {"mlp": 0.9}),
    ]
    path = tmp_path / "deep" / "report.json"
    write_report(path, results)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    told = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert told["margins"] == {"worst_honest": 0.9, "smallest_convicting": 3.5}
    rows = {row["name"]: row for row in told["scenarios"]}
    assert list(rows) == ["a", "b", "c", "d", "g"]
    asked = {"name", "stage", "expected", "actual", "segment", "margin", "balances", "transactions", "seconds"}
    for row in rows.values():
        assert asked <= set(row)
        assert row["balances"] == {"requester": {"before": "10", "after": "9"}}
        assert row["transactions"] == [{"method": "Escrow.open", "sender": "0x1", "gas": 5, "calldata_bytes": 6}]
        assert row["seconds"] == 1.3
    place = {"kind": "mlp", "request": 0, "layer": 3, "position": 5, "unit": 0}
    assert (rows["b"]["stage"], rows["b"]["segment"], rows["b"]["margin"]) == (1, place, 3.5)
    assert (rows["b"]["expected"], rows["b"]["actual"]) == ("slashed", "slashed")
    assert (rows["a"]["stage"], rows["a"]["segment"], rows["a"]["margin"]) == (None, None, None)
    assert rows["c"]["margin"] == "exact"


def test_margins_stay_json_where_honest_work_holds_no_number_or_nothing_was_judged() -> None:
    broken = report([result("a", STORIES["a"][1], None, {"mlp": float("inf")})])
    assert json.loads(json.dumps(broken, allow_nan=False))["margins"]["worst_honest"] == "exact"
    assert report([result("h", STORIES["h"][1])])["margins"] == {"worst_honest": None, "smallest_convicting": None}


# ---- requests


def test_the_prompts_of_a_model_without_tokenizer_are_servable(tmp_path: Path) -> None:
    shape = shape_from_config(tiny.config())
    requests = make_requests(tmp_path, shape.vocabulary)
    assert len(requests) == len(PROMPTS)
    for request in requests:
        validate_request(request, shape)
    assert len(requests[0].prompt) > 5  # the altering worker and the false accuser touch position 5


# ---- exit codes


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--only", "z"], "expected a scenario of a, b, c, d, e, f, g, h, got 'z'"),
        (["--stage", "9"], "expected a stage below 3, got 9"),
        (["--only", "b", "--stage", "-1"], "expected a stage below 3, got -1"),
        (["--only", "d", "--stage", "0"], "expected no stage for scenario d, got 0: only b, c, e, f, h can move"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(arguments: list[str], reason: str) -> None:
    answer = CliRunner().invoke(cli.app, arguments)
    assert answer.exit_code == 2
    assert reason in answer.output


def test_a_missing_model_folder_is_no_verdict(tmp_path: Path) -> None:
    answer = CliRunner().invoke(cli.app, ["--only", "a", "--model", str(tmp_path / "absent")])
    assert answer.exit_code == 2  # 1 would say that a scenario ended otherwise than it must
    assert "error: expected" in answer.output and "absent" in answer.output


def test_a_model_that_can_not_be_calibrated_is_no_verdict(tmp_path: Path) -> None:
    tiny.make_weights(tmp_path, tiny.config())
    tiny.set_weight(tmp_path, "model.layers.1.mlp.up_proj.weight", (3, 5), 0x7FC0)  # NaN
    answer = CliRunner().invoke(cli.app, ["--only", "a", "--model", str(tmp_path)])
    assert answer.exit_code == 2, answer.output
    assert "error: model.layers.1.mlp.up_proj.weight[3, 5]" in answer.output and "0x7fc0" in answer.output
    assert not (tmp_path / "tolerance.json").exists()


class Played:
    """A village and a demo that took no time."""

    results: list[Result] = []  # noqa: RUF012 - set by each test

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> "Played":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def play(self, _: object) -> list[Result]:
        return self.results


@pytest.mark.parametrize(("ending", "status"), [(Ending.SLASHED, 0), (Ending.PAID, 1), (Ending.UNFINISHED, 1)])
def test_the_exit_status_says_whether_everything_ended_as_it_must(
    ending: Ending, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.make(tmp_path / "model", tiny.config(), positions=2).profile.save(tmp_path / "model")
    monkeypatch.setattr(Played, "results", [result("b", Outcome(ending, 1, SEGMENT), 3.5)])
    monkeypatch.setattr(cli, "Village", Played)
    monkeypatch.setattr(cli, "Demo", Played)
    path = tmp_path / "report.json"
    arguments = ["--only", "b", "--model", str(tmp_path / "model"), "--report", str(path)]
    answer = CliRunner().invoke(cli.app, arguments)
    assert answer.exit_code == status, answer.output
    (row,) = json.loads(path.read_text(encoding="utf-8"))["scenarios"]
    assert row["actual"] == str(ending)
