"""Audits on a Ray cluster: what is found is what one thread finds."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from bench._town import Hall, facts, model, serve
from challenger.config import ConfigError
from challenger.evidence import Archive, Evidence
from challenger.fetch import Ask, Fetcher
from challenger.fleet import Fleet
from challenger.judge import Judge
from challenger.strategy import Strategy
from deploy.devnet import free_port


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    folder = tmp_path_factory.mktemp("model")
    model(folder)
    return Judge(folder)


@pytest.fixture(scope="module")
def fleet(judge: Judge) -> Iterator[Fleet]:
    root = str(Path(__file__).resolve().parent.parent.parent)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}},
    )
    yield Fleet(judge, "local")
    ray.shutdown()


def evidence(judge: Judge, hall: Hall, folder: Path, spoil: bool, ask: Ask) -> Evidence:
    served = serve(judge.weights, spoil=spoil)
    return Fetcher(Archive(folder), 1 << 30).fetch(facts(judge.weights, served, hall), judge.weights.shape, 60.0, ask)


@pytest.mark.parametrize("strategy", [Strategy(), Strategy("cells", 5), Strategy("cells", 1000)])
def test_a_cluster_finds_what_one_thread_finds(fleet: Fleet, judge: Judge, tmp_path: Path, strategy: Strategy) -> None:
    with Hall() as hall:
        for spoil in (False, True):
            held = evidence(judge, hall, tmp_path / str(spoil), spoil, Ask(strategy, seed=b"s"))
            alone, spread = judge.audit(held), judge.audit(held, fleet.work)
            assert alone == spread and alone.pieces > 0
            assert bool(alone.wrong) == spoil or strategy.count == 5


def test_hands_that_are_lost_cost_no_audit(fleet: Fleet, judge: Judge, tmp_path: Path) -> None:
    """One after the other, to the last: a watchtower must not go blind."""
    with Hall() as hall:
        held = evidence(judge, hall, tmp_path, True, Ask(Strategy(), seed=b"s"))
        alone = judge.audit(held)
        for left in reversed(range(len(fleet._hands))):
            ray.kill(fleet._hands[-1])  # which is asked first
            assert judge.audit(held, fleet.work) == alone and alone.wrong
            assert len(fleet._hands) == left


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_no_cluster_is_told(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without asking Ray, which gives up after minutes."""
    ray.shutdown()
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("asked Ray"))
    address = f"{scheme}127.0.0.1:{free_port()}"
    with pytest.raises(ConfigError, match=rf"ray: no cluster at {address}: .*refused"):
        Fleet(Judge.__new__(Judge), address)


@pytest.mark.parametrize("address", ["nonsense", "host:99999999", "127.0.0.1:x"])
def test_an_address_that_is_none_is_told(address: str) -> None:
    ray.shutdown()
    with pytest.raises(ConfigError, match=f"ray: no cluster at {address}: "):
        Fleet(Judge.__new__(Judge), address)
