"""Downloads from servers of every kind: what comes is right, or refused with a reason."""

import gzip
import json
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

import challenger.fetch
from bench._town import Hall, Misbehaviour, Served, facts, model, say, serve
from challenger.evidence import Archive, Unavailable, trace_name
from challenger.fetch import Fetcher
from challenger.judge import Judge
from verifier.weights import Weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model(path)
    return path


@pytest.fixture(scope="module")
def weights(folder: Path) -> Weights:
    return Weights.open(folder, threads=1)


@pytest.fixture(scope="module")
def honest(weights: Weights) -> Served:
    return serve(weights)


@pytest.fixture
def hall() -> Iterator[Hall]:
    with Hall() as hall:
        yield hall


@pytest.fixture
def fetcher(tmp_path: Path) -> Fetcher:
    return Fetcher(Archive(tmp_path), 1 << 20)


def test_an_honest_job_arrives_whole(weights: Weights, honest: Served, hall: Hall, fetcher: Fetcher) -> None:
    known = facts(weights, honest, hall)
    evidence = fetcher.fetch(known, weights.shape, 20.0)
    assert evidence.missing == () and evidence.held == (True, True)
    assert evidence.requests == honest.requests and evidence.outputs == honest.outputs
    for stage in (0, 1):
        for r in range(len(honest.requests)):
            trace = evidence.trace(stage, r)
            assert trace is not None and trace.tensors_root == honest.traces[stage][r].tensors_root


def test_what_was_fetched_needs_no_worker_any_more(
    weights: Weights, honest: Served, hall: Hall, fetcher: Fetcher
) -> None:
    known = facts(weights, honest, hall)
    with pytest.raises(Unavailable):
        fetcher.load(known, weights.shape)
    fetcher.fetch(known, weights.shape, 20.0)
    hall.misbehave = lambda handler, path: pytest.fail(f"asked for {path}")
    assert fetcher.load(known, weights.shape).missing == ()
    fetcher.archive.forget(known.id)
    assert list(fetcher.archive.folder.iterdir()) == []


def test_an_interrupted_download_goes_on(weights: Weights, honest: Served, hall: Hall, fetcher: Fetcher) -> None:
    known, asked = facts(weights, honest, hall), []

    def listen(handler: BaseHTTPRequestHandler, path: str) -> bool:
        asked.append(path)
        return False

    def second_request_is_refused(handler: BaseHTTPRequestHandler, path: str) -> bool:
        asked.append(path)
        if "/trace/1/" in path:
            say(handler, b"", 503)
            return True
        return False

    hall.misbehave = second_request_is_refused
    evidence = fetcher.fetch(known, weights.shape, 20.0)
    assert evidence.held == (False, False) and "503" in evidence.missing[0]
    hall.misbehave, before = listen, len(asked)
    torn = fetcher.archive.trace_path(known.id, trace_name(1, 0))
    torn.write_bytes(torn.read_bytes()[:100])  # a power failure
    assert fetcher.fetch(known, weights.shape, 20.0).missing == ()
    again = asked[before:]
    assert not any(path.startswith("/s0/") and "/trace/0/" in path for path in again)
    assert any(path.startswith("/s1/") and "/trace/0/" in path for path in again)


def endless(handler: BaseHTTPRequestHandler, path: str) -> bool:
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(bytes(1 << 16))
    except OSError:
        return True


def dripping(handler: BaseHTTPRequestHandler, path: str) -> bool:
    """Never silent for long, never done: header after header."""
    try:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for i in range(1000):
            handler.wfile.write(b"X-%d: 1\r\n" % i)
            time.sleep(0.02)
    except OSError:
        pass
    return True


def answering(body: bytes, status: int = 200, **headers: str) -> Misbehaviour:
    def answer(handler: BaseHTTPRequestHandler, path: str) -> bool:
        handler.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(key.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)
        return True

    return answer


BAD: dict[str, Misbehaviour] = {
    "endless": endless,
    "dripping": dripping,
    "empty": answering(b""),
    "no JSON": answering(b"\xff{"),
    "deep": answering(b"[" * 100_000),
    "a list": answering(b"[]"),
    "no entries": answering(json.dumps({"requests": [], "outputs": []}).encode()),
    "wrong types": answering(
        json.dumps(
            {
                "requests": [{"prompt": ["a"], "limit": True, "positions": -1, "tensors_root": 5}],
                "outputs": [{"start": 0.5, "count": 1, "code": 1, "tokens": [1 << 40]}],
            }
        ).encode()
    ),
    "unlawful": answering(
        json.dumps(
            {
                "requests": [{"prompt": [], "limit": 0, "positions": 0, "tensors_root": "00" * 32}] * 2,
                "outputs": [{"start": 0, "count": 0, "code": 1, "tokens": []}] * 2,
            }
        ).encode()
    ),
    "gone": answering(b"gone", 404),
    "elsewhere": answering(b"", 302, Location="http://127.0.0.1:1/"),
    "bomb": answering(gzip.compress(bytes(1 << 24)), Content_Encoding="gzip"),
    "cut short": answering(b"[", Content_Length="100"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_is_unavailable_with_a_reason(
    name: str, weights: Weights, honest: Served, hall: Hall, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(challenger.fetch, "ANSWER_SECONDS", 2.0)
    monkeypatch.setattr(challenger.fetch, "JSON_BYTES", 1 << 20)
    known = facts(weights, honest, hall)
    hall.misbehave = BAD[name]
    with pytest.raises(Unavailable, match="stage 0 at"):
        fetcher.fetch(known, weights.shape, 20.0)


@pytest.mark.parametrize("name", ["endless", "dripping", "gone", "bomb"])
def test_a_bad_stage_shields_nobody_else(
    name: str, weights: Weights, honest: Served, hall: Hall, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(challenger.fetch, "ANSWER_SECONDS", 2.0)
    monkeypatch.setattr(challenger.fetch, "JSON_BYTES", 1 << 20)
    known = facts(weights, honest, hall)
    hall.misbehave = lambda handler, path: path.startswith("/s0/") and BAD[name](handler, path)
    evidence = fetcher.fetch(known, weights.shape, 20.0)
    assert evidence.held == (False, True), evidence.missing  # even the prompts came, from stage 1
    assert len(evidence.missing) == 1 and evidence.missing[0].startswith("stage 0 at")


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "ftp://x", "http://", "http://[", "no url", "http://x:99999"])
def test_a_url_that_leads_nowhere(url: str, weights: Weights, honest: Served, hall: Hall, fetcher: Fetcher) -> None:
    known = facts(weights, honest, hall)
    evidence = fetcher.fetch(type(known)(**{**vars(known), "urls": (url, known.urls[1])}), weights.shape, 20.0)
    assert evidence.held == (False, True)


def change_tensor(handler: BaseHTTPRequestHandler, path: str, hall: Hall) -> bool:
    if "/trace/0/0.q" not in path:
        return False
    width = next(iter(hall.served.values())).traces[0][0].arrays["0.q"].shape[1]
    say(handler, bytes(2 * width))
    return True


def test_other_tensors_than_those_committed_to(weights: Weights, honest: Served, hall: Hall, fetcher: Fetcher) -> None:
    known = facts(weights, honest, hall)
    hall.misbehave = lambda handler, path: change_tensor(handler, path, hall)
    evidence = fetcher.fetch(known, weights.shape, 20.0)
    assert evidence.held == (False, True) and "not those committed to" in evidence.missing[0]
    assert not fetcher.archive.holds(known.id, trace_name(0, 0))


@pytest.mark.parametrize("rows", [b"", b"123", bytes(1 << 20)])
def test_rows_that_are_none(rows: bytes, weights: Weights, honest: Served, hall: Hall, fetcher: Fetcher) -> None:
    known = facts(weights, honest, hall)
    hall.misbehave = lambda handler, path: "/trace/0/" in path and answering(rows)(handler, path)
    assert fetcher.fetch(known, weights.shape, 20.0).held == (False, False)


def test_other_roots_than_the_chains(weights: Weights, honest: Served, hall: Hall, fetcher: Fetcher) -> None:
    known = facts(weights, honest, hall)
    for key in ("outputs_root", "roots"):
        other: Any = bytes(32) if key == "outputs_root" else (bytes(32), known.roots[1])
        told = type(known)(**{**vars(known), key: other})
        if key == "outputs_root":
            with pytest.raises(Unavailable, match="expected 2 with root 0000"):
                fetcher.fetch(told, weights.shape, 20.0)
        else:
            assert fetcher.fetch(told, weights.shape, 20.0).held == (False, True)


def test_a_stage_too_large_to_download(weights: Weights, honest: Served, hall: Hall, tmp_path: Path) -> None:
    known = facts(weights, honest, hall)
    evidence = Fetcher(Archive(tmp_path), 1000).fetch(known, weights.shape, 20.0)
    assert evidence.held == (False, False) and "this watchtower takes 1000" in evidence.missing[0]


def test_an_audit_of_what_there_is(folder: Path, weights: Weights, hall: Hall, fetcher: Fetcher) -> None:
    known = facts(weights, serve(weights, spoil=True), hall)
    hall.misbehave = lambda handler, path: path.startswith("/s0/") and answering(b"", 500)(handler, path)
    findings = Judge(folder).audit(fetcher.fetch(known, weights.shape, 20.0))
    assert [(wrong.stage, wrong.kind.name) for wrong in findings.wrong] == [(1, "MLP")]
    assert "embed" not in findings.worst and findings.worst["mlp"] > 1
