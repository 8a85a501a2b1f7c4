"""Every fraud of the demo, and honest work, from an opened job to its last coin: real workers, a real watchtower and
real contracts, in one process. And each verdict is needed: without it, the same fraud ends otherwise.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.demo.players import ROLES, SilentResponder
from deploy.demo.scenarios import SCENARIOS, Ending, Scenario, select
from deploy.devnet import Devnet
from tests.end_to_end import random_model
from tests.end_to_end.hamlet import STAGES, Hamlet, line_of
from verifier.audit import JUDGED
from verifier.program import Kind
from verifier.referee.floats import Dtype

WEIGHTS = frozenset(JUDGED)


@pytest.fixture(scope="module")
def hamlet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hamlet]:
    folder = tmp_path_factory.mktemp("model")
    small = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 211}
    random_model.make(folder, Dtype.BFLOAT16, num_hidden_layers=4, **small)  # the middle stage holds two layers
    with Devnet() as devnet:
        made = Hamlet(devnet, folder, tmp_path_factory.mktemp("hamlet"))
        made.settle_in()
        yield made


def scenario(name: str) -> Scenario:
    return select(name, None, STAGES)[0]


@pytest.mark.parametrize("name", [scenario.name for scenario in SCENARIOS])
def test_every_scenario_ends_as_it_must(hamlet: Hamlet, tmp_path: Path, name: str) -> None:
    played = scenario(name)
    seen = hamlet.play(played, line_of(played), tmp_path)
    result, lost = seen.result, [b - a for b, a in zip(seen.before.stakes, seen.after.stakes, strict=True)]
    assert result.as_expected, result.outcome
    if played.expected in (Ending.SLASHED, Ending.FLAGGED):
        assert result.outcome.stage == played.stage
        assert result.outcome.segment is not None and result.outcome.segment.stage == played.stage
        assert result.margin is not None and result.margin > 1
        assert [index for index, amount in enumerate(lost) if amount] == [played.stage]
        assert seen.after.requester == seen.before.requester  # refunded in full
    elif played.expected == Ending.REFUNDED:
        # The fee comes from the mute stage and its predecessor, half each; the other stage loses nothing.
        assert [index for index, amount in enumerate(lost) if amount] == [played.stage - 1, played.stage]
        assert seen.after.requester >= seen.before.requester
    else:
        assert lost == [0] * STAGES
        assert seen.after.requester < seen.before.requester  # the workers were paid


@pytest.mark.parametrize(
    ("name", "off"),
    [("b", WEIGHTS), ("c", frozenset({Kind.LINK})), ("d", frozenset({Kind.TOKEN}))],
    ids=["int8 weights", "altered state", "chosen token"],
)
def test_without_its_verdict_a_fraud_is_paid(hamlet: Hamlet, tmp_path: Path, name: str, off: frozenset[Kind]) -> None:
    played = scenario(name)
    seen = hamlet.play(played, line_of(played), tmp_path, off)
    assert seen.result.outcome.ending == Ending.PAID
    assert not seen.result.as_expected
    assert seen.before.stakes == seen.after.stakes


def test_without_a_defence_a_false_accusation_convicts(hamlet: Hamlet, tmp_path: Path) -> None:
    played = scenario("g")
    line = list(line_of(played))
    line[0] = replace(ROLES["honest"], responder=SilentResponder)
    seen = hamlet.play(played, tuple(line), tmp_path)
    assert seen.result.outcome.ending == Ending.FLAGGED
    assert not seen.result.as_expected
