"""All that is suspicious is looked at: nobody hides behind requests that lie farther off and are right."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench._town import SPOILT_POSITION, SPOILT_REQUEST, Hall, Served, facts, model, say, serve, until
from challenger.desk import Desk, Outcome, Task
from challenger.evidence import Archive, Evidence, Facts, Unavailable
from challenger.fetch import Ask, Fetcher
from challenger.judge import Findings, Judge
from challenger.look import FEW, Fetch, Look
from challenger.strategy import Strategy
from verifier.commit import Request, make_outputs
from verifier.program import Kind
from verifier.referee.fixed import Q30

DECOYS = 2 * FEW + 1  # in front of the wrong request, which the third round is the first to reach
TOKENS = Ask(Strategy("tokens"), seed=b"secret")
GREAT = 1 << 30


def second_best(judge: Judge, honest: Served) -> tuple[list[int], list[float]]:
    """The second best token at each request's end; by how many token margins it is behind the best."""
    tokens, behind = [], []
    for trace in honest.traces[1]:
        rows = trace.arrays["out"][-1:]
        logits = torch.cat([tile for _, tile in judge.auditor.reference.logits(rows)], dim=1)[0]
        best, second = logits.topk(2).indices.tolist()
        tokens.append(second)
        behind.append(float(logits[best] - logits[second]) / (judge.profile.margin / Q30))
    return tokens, behind


@dataclass
class Stand:
    """A judge to whom every second best token is suspicious and lawful, and a job of such tokens alone.

    The request that lies nearest to the best one is SPOILT_REQUEST: its tensors are wrong.
    """

    judge: Judge
    hall: Hall
    wrong: Served
    right: Served

    def fetch(self, served: Served, archive: Archive, most: int = GREAT) -> Fetch:
        fetcher, known = Fetcher(archive, most), facts(self.judge.weights, served, self.hall)
        shape = self.judge.weights.shape
        return lambda closer, seconds: fetcher.fetch(known, shape, seconds, replace(TOKENS, closer=closer))


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    folder = tmp_path_factory.mktemp("model")
    weights, profile = model(folder)
    judge = Judge(folder)
    requests = tuple(Request((5 + r, 6, 7), 1) for r in range(DECOYS + 1))
    honest = serve(weights, requests=requests)
    tokens, behind = second_best(judge, honest)
    order = sorted(range(len(requests)), key=behind.__getitem__)
    requests, tokens = tuple(requests[r] for r in order), [tokens[r] for r in order]
    outputs = tuple(make_outputs([[token] for token in tokens], requests))
    traces = tuple(tuple(stage[r] for r in order) for stage in honest.traces)
    right = Served(requests, outputs, traces, len(outputs))
    spoilt = serve(weights, spoil=True, requests=requests[:1])
    wrong = replace(right, traces=tuple((*bad, *good[1:]) for bad, good in zip(spoilt.traces, traces, strict=True)))
    *others, margin = profile.cells
    replace(profile, cells=(*others, replace(margin, floor=round(2 * max(behind) * margin.floor)))).save(folder)
    judge = Judge(folder)
    judge.margins = min(behind) / max(behind) / 4
    with Hall() as hall:
        yield Stand(judge, hall, wrong, right)


@pytest.fixture(autouse=True)
def behave(stand: Stand) -> Iterator[None]:
    yield
    stand.hall.misbehave = lambda handler, path: False


def two_of(served: Served) -> int:
    """A limit that two requests of a stage keep and three do not; all have as many positions."""
    return 5 * max(sum(array.nbytes for array in traces[0].arrays.values()) for traces in served.traces) // 2


def requests_on_disk(archive: Archive, known: Facts) -> set[int]:
    return {int(name.split("-")[1]) for name in archive.names(known.id) if name.endswith(".bits")}


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("most", [GREAT, 0])
def test_who_is_wrong_is_found_behind_decoys(stand: Stand, tmp_path: Path, final: bool, most: int) -> None:
    """most: what the watchtower takes at a time; 0: two requests."""
    archive, rounds = Archive(tmp_path), list[tuple[int, ...]]()
    fetch = stand.fetch(stand.wrong, archive, most or two_of(stand.wrong))

    def heard(closer: tuple[int, ...], seconds: float) -> Evidence:
        evidence = fetch(closer, seconds)
        rounds.append(evidence.closer)
        return evidence

    evidence, findings = Look().go_on(heard, stand.judge.audit, 60.0, final)
    assert findings is not None and evidence.missing == ()
    assert [(v.kind, v.request, v.position) for v in findings.wrong] == [(Kind.MLP, SPOILT_REQUEST, SPOILT_POSITION)]
    seen = [r for each in rounds for r in each]
    assert sorted(seen) == list(range(DECOYS + 1)) and seen[-1] == SPOILT_REQUEST
    sizes = [len(each) for each in rounds[1:]]
    assert sizes == ([2] * 5 if most == 0 else [DECOYS + 1] if final else [4, 4, 2])
    assert findings.looked_closer == DECOYS + 1 == findings.receipt()["looked_closer"]
    assert requests_on_disk(archive, facts(stand.judge.weights, stand.wrong, stand.hall)) == set(rounds[-1])


def test_decoys_alone_convict_nobody_and_the_receipt_tells_of_all_looks(stand: Stand, tmp_path: Path) -> None:
    audits: list[Findings] = []

    def audit(evidence: Evidence) -> Findings:
        audits.append(stand.judge.audit(evidence))
        return audits[-1]

    _, findings = Look().go_on(stand.fetch(stand.right, Archive(tmp_path)), audit, 60.0, final=False)
    assert (
        findings is not None and (findings.wrong, findings.closer) == ((), ()) and findings.looked_closer == DECOYS + 1
    )
    assert findings.pieces == sum(each.pieces for each in audits) and len(audits) == 4
    assert findings.worst["screen"] == audits[0].worst["screen"] > 1 > findings.worst["mlp"]


def test_what_breaks_off_is_gone_on_with_and_nothing_is_seen_twice(stand: Stand, tmp_path: Path) -> None:
    fetch, rounds, look = stand.fetch(stand.wrong, Archive(tmp_path)), list[tuple[int, ...]](), Look()

    def heard(closer: tuple[int, ...], seconds: float) -> Evidence:
        rounds.append(closer)
        if len(rounds) == 3:
            stand.hall.misbehave = lambda handler, path: "/s0/" in path and ".q?" in path and say(handler, b"", 503)
        return fetch(closer, seconds)

    evidence, findings = look.go_on(heard, stand.judge.audit, 60.0, final=False)
    assert findings is None and len(evidence.missing) == 1
    stand.hall.misbehave = lambda handler, path: False
    evidence, findings = look.go_on(heard, stand.judge.audit, 60.0, final=False)
    assert findings is not None and [v.request for v in findings.wrong] == [SPOILT_REQUEST]
    assert rounds[2] == rounds[3] and len({r for each in rounds for r in each}) == DECOYS + 1


def test_a_stage_that_withholds_its_decoys_shields_no_other_and_is_told(stand: Stand, tmp_path: Path) -> None:
    stand.hall.misbehave = lambda handler, path: "/s0/" in path and ".q?" in path and say(handler, b"", 503)
    for served, wrong in ((stand.wrong, [SPOILT_REQUEST]), (stand.right, [])):
        fetch = stand.fetch(served, Archive(tmp_path / str(len(wrong))), two_of(served))
        evidence, findings = Look().go_on(fetch, stand.judge.audit, 60.0, final=True)
        assert findings is not None and [v.request for v in findings.wrong] == wrong
        assert evidence.missing and all("/s0/" in reason and "503" in reason for reason in evidence.missing)


def test_downloads_share_the_seconds_of_an_attempt(stand: Stand, tmp_path: Path) -> None:
    fetch, given = stand.fetch(stand.right, Archive(tmp_path)), list[float]()

    def heard(closer: tuple[int, ...], seconds: float) -> Evidence:
        given.append(seconds)
        return fetch(closer, seconds)

    Look().go_on(heard, stand.judge.audit, 60.0, final=False)
    assert given[0] == 60.0 and given == sorted(given, reverse=True) and len(set(given)) == len(given)


def test_records_are_parsed_as_often_for_many_requests_as_for_one(
    stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tells the roots of all requests: parsed for each, a job of many would cost their square."""
    real, parsed = json.loads, list[bytes]()

    def loads(body: Any, **named: Any) -> Any:
        parsed.append(body)
        return real(body, **named)

    counts = []
    for closer in ((1,), tuple(range(DECOYS + 1))):
        fetch = stand.fetch(stand.right, Archive(tmp_path / str(len(closer))))
        monkeypatch.setattr(json, "loads", loads)
        parsed.clear()
        assert stand.judge.audit(fetch(closer, 60.0)).wrong == ()
        monkeypatch.undo()
        counts.append(sum(b'"tensors_root"' in body for body in parsed))
    assert counts[0] == counts[1] == 4  # of each stage once for its nodes, once for its roots


@pytest.mark.parametrize("spoil", ["missing", "short", "no hex", "no roots", "no object"])
def test_roots_that_are_none_concern_their_request_alone(stand: Stand, tmp_path: Path, spoil: str) -> None:
    def misbehave(handler: Any, path: str) -> bool:
        if not path.startswith("/s1/") or not path.endswith("/trace"):
            return False
        told = json.loads(stand_records(stand.right, 1))
        roots = told["requests"][3]["roots"]
        match spoil:
            case "missing":
                del roots["1.k"]
            case "short":
                roots["1.k"] = roots["1.k"][2:]
            case "no hex":
                roots["1.k"] = "zz" * 32
            case "no roots":
                del told["requests"][3]["roots"]
            case _:
                told["requests"][3]["roots"] = [1]
        return say(handler, json.dumps(told).encode())

    stand.hall.misbehave = misbehave
    fetch = stand.fetch(stand.right, Archive(tmp_path))
    assert fetch((1, 2), 60.0).missing == ()
    (missing,) = fetch((1, 3), 60.0).missing
    assert "request 3: expected a root of 32 bytes for each tensor" in missing


def stand_records(served: Served, stage: int) -> bytes:
    told = [
        {
            "positions": trace.positions,
            "tensors_root": trace.tensors_root.hex(),
            "roots": {key: trace.tensor_root(key).hex() for key in trace.keys},
        }
        for trace in served.traces[stage]
    ]
    return json.dumps({"requests": told}).encode()


def test_the_desk_looks_at_all_that_is_suspicious_over_attempts(stand: Stand, tmp_path: Path) -> None:
    fetch, asked = stand.fetch(stand.wrong, Archive(tmp_path)), list[tuple[int, ...]]()

    def broken(task: Task) -> Evidence:
        asked.append(tuple(sorted(task.closer)))
        if len(asked) == 2:
            raise Unavailable("not yet")
        return fetch(task.closer, task.seconds)

    desk = Desk(broken, lambda judge, evidence: judge.audit(evidence), 1)

    def outcome() -> Outcome:
        desk.start(Task(bytes(32), stand.judge, 60.0, True, 1))
        until(lambda: desk._done.qsize() == 1)
        (found,) = desk.finished()
        return found

    assert isinstance(outcome().error, Unavailable)
    findings = outcome().findings
    assert findings is not None and [v.request for v in findings.wrong] == [SPOILT_REQUEST]
    assert asked == [(), *[tuple(range(DECOYS + 1))] * 2]


def test_a_job_that_is_audited_once_more_is_looked_at_anew(stand: Stand, tmp_path: Path) -> None:
    """As where the games that an audit led to stand on nothing any more."""
    fetch = stand.fetch(stand.wrong, Archive(tmp_path))
    desk = Desk(lambda task: fetch(task.closer, task.seconds), lambda judge, evidence: judge.audit(evidence), 1)
    for _ in range(2):
        desk.start(Task(bytes(32), stand.judge, 60.0, False, 1))
        until(lambda: desk._done.qsize() == 1)
        (outcome,) = desk.finished()
        assert outcome.findings is not None and [v.request for v in outcome.findings.wrong] == [SPOILT_REQUEST]
        assert outcome.findings.looked_closer == DECOYS + 1


def test_what_is_seen_of_a_job_that_is_forgotten_meanwhile_counts_no_more(stand: Stand, tmp_path: Path) -> None:
    """As where the block that it was committed to in was replaced by another."""
    fetch, go = stand.fetch(stand.wrong, Archive(tmp_path)), threading.Event()

    def waiting(task: Task) -> Evidence:
        assert go.wait(60)
        return fetch(task.closer, task.seconds)

    desk = Desk(waiting, lambda judge, evidence: judge.audit(evidence), 1)
    id = bytes(32)
    desk.start(Task(id, stand.judge, 60.0, False, 1))
    desk.forget(id)
    go.set()
    until(lambda: desk._done.qsize() == 1)
    assert desk.finished() == [] and desk.free(id)
    desk.start(Task(id, stand.judge, 60.0, False, 1))
    until(lambda: desk._done.qsize() == 1)
    assert [outcome.task.id for outcome in desk.finished()] == [id]


def test_records_of_another_commitment_are_downloaded_anew(stand: Stand, tmp_path: Path) -> None:
    archive, known = Archive(tmp_path), facts(stand.judge.weights, stand.right, stand.hall)
    stand.fetch(stand.right, archive)((), 60.0)
    requests = archive.read(known.id, "requests.json")
    assert requests is not None
    for name in ("requests", "outputs", "nodes-0"):
        archive.write(known.id, f"{name}.json", b'{"requests": [], "outputs": []}')
    evidence = stand.fetch(stand.right, archive)((), 60.0)
    assert evidence.missing == () and archive.read(known.id, "requests.json") == requests
