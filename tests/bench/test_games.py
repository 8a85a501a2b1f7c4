"""The benchmark of randomised games: everybody at fault loses, nobody else does, and it would be noticed."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import plumb
from bench import _docket, games
from bench._liar import Solver
from verifier.game import Game

KINDS = {"Q", "K", "V", "ATTEND", "MLP", "TOKEN", "SAMPLE", "EMBED", "LINK", "STOP", "BILL", "LENGTH"}


def test_no_honest_party_loses_and_no_lie_escapes() -> None:
    report = games.run(games=160, seed=7)
    assert report["failures"] == [] and report["failed"] == 0
    assert (report["honest_lost"], report["lies_escaped"]) == (0, 0)
    rows = report["results"]
    assert sum(row["games"] for row in rows) == report["games"] == 160
    assert {row["segment"] for row in rows} == KINDS
    assert {row["liar"] for row in rows} >= {"worker", "challenger", "sender", "silent worker", "silent challenger"}
    for row in rows:
        guilty = row["liar"] in ("worker", "sender", "silent worker")
        assert row["convicted"] == (row["games"] if guilty else 0), row
        assert row["moves_max"] <= 7, row
    assert report["census"]["told"] == 80
    assert set(report["depths"]) >= {"ROOT", "LOW_NODE", "ELEMENT", "CHUNK"}


@pytest.mark.parametrize("head_dim", [80, 96, 128])
def test_models_whose_sizes_divide_no_block_are_judged_alike(head_dim: int) -> None:
    """Heads of 80, 96 and 128 columns, a hidden width of 329, 601 between, a vocabulary of 301; 64 and 320 above."""
    report = games.run(games=60, seed=head_dim, head_dim=head_dim)
    assert report["failures"] == [] and report["failed"] == 0
    assert (report["honest_lost"], report["lies_escaped"]) == (0, 0)
    assert len({row["segment"] for row in report["results"]}) >= 10


class Speechless(Solver):
    """Right, but says nothing."""

    def answer(self, game: Game, posted: bytes, steps: bytes) -> None:
        return None


def test_an_honest_party_that_loses_fails_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_docket, "Solver", Speechless)
    monkeypatch.setattr(_docket, "SHOWN_SHARE", 0.0)
    monkeypatch.setattr(_docket, "SILENT_SHARE", 0.0)
    path = tmp_path / "report.json"
    result = CliRunner().invoke(plumb.app, ["bench", "games", "--games", "6", "--seed", "1", "--report", str(path)])
    assert result.exit_code == 1
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["failed"] == len(report["failures"]) > 0 and report["honest_lost"] > 0
    assert "machine" in report and "game 0" in " ".join(report["failures"])


def test_numbers_of_games_that_are_none_are_refused() -> None:
    for wrong in ({"games": 0}, {"first": -1}):
        with pytest.raises(ValueError, match="expected one game or more"):
            games.run(**wrong)
