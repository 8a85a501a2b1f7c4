"""`plumb request` against a local chain: what it costs, what it never loses, what it says."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench._town import say, serve
from contracts.client import Chain, Status
from contracts.keys import save_account
from deploy.keys import dev_account
from requester.client import Requester, RequesterError
from tests.requester.office import LINES, REQUESTS, Office, job_of, open_office
from tests.requester.words import write_tokenizer
from verifier.commit import Request


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    with open_office(tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("home")) as opened:
        yield opened


@pytest.fixture(autouse=True)
def behave(office: Office) -> Iterator[None]:
    office.town.hall.handed_over.clear()
    yield
    office.town.hall.misbehave = lambda handler, path: False


def test_a_batch_from_submission_to_money_back(office: Office, tmp_path: Path) -> None:
    done = office.submit("--window", 60)
    assert done.exit_code == 0, done.output
    id = job_of(done)
    assert office.town.hall.handed_over[0]["requests"][0]["prompt"] == [1, 2, 3]
    told = office.run("status", id.hex())
    assert "open: waiting for all stages to accept: 0 did" in told.stdout and "stage 1" in told.stdout
    early = office.run("fetch", id.hex(), "-o", tmp_path / "r.jsonl", "--receipt", tmp_path / "r.json")
    assert early.exit_code == 1 and "no outputs yet" in early.output and (tmp_path / "r.json").exists()

    office.batch({"changed": "since"})  # the file of the submission is not needed any more
    office.town.finish(id, office.served)
    fetched = office.run("fetch", f"0x{id.hex()}", "-o", tmp_path / "r.jsonl", "--receipt", tmp_path / "r.json")
    assert fetched.exit_code == 0, fetched.output
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [row["custom_id"] for row in rows] == ["a", "b"]
    assert rows[0]["response"]["body"]["usage"]["completion_tokens"] == office.served.outputs[0].count
    receipt = json.loads((tmp_path / "r.json").read_text())
    assert receipt["status"] == "committed" and "for" in receipt["why"]
    assert receipt["tokens"]["output"] == office.served.tokens and receipt["price"] == "0"
    assert receipt["model"]["id"] == office.town.model.hex() and len(receipt["tokenizer_sha256"]) == 64
    assert [stage["first_layer"] for stage in receipt["pipeline"]["stages"]] == [0, 1]
    assert [item["method"] for item in receipt["transactions"]] == ["Escrow.open", "Escrow.accept", "Escrow.commit"]
    assert all(item["gas"] > 21_000 for item in receipt["transactions"])

    assert "nothing to collect yet" in office.run("collect", id.hex()).output
    unknown = office.run("collect", "77" * 32)
    assert unknown.exit_code == 1 and f"job 0x{'77' * 32} was never opened on this chain" in unknown.output
    office.devnet.pass_seconds(61)
    assert "`plumb request collect` pays it" in office.run("status", id.hex()).output
    assert "settled the job" in office.run("collect", id.hex()).output
    told = office.run("status", id.hex(), "--follow")
    assert told.stdout.startswith("paid: the window passed without a conviction")
    office.run("fetch", id.hex(), "-o", tmp_path / "r.jsonl", "--receipt", tmp_path / "r.json")
    paid = json.loads((tmp_path / "r.json").read_text())
    assert int(paid["price"]) == 5 * 1000 + office.served.tokens * 5000


def bad_line(number: int) -> dict[str, Any]:
    return {**LINES[0], "custom_id": f"bad {number}", "url": "/v1/images"}


def test_refusals_charge_nothing(office: Office) -> None:
    before = office.spent()
    pipeline = f"0x{office.town.pipeline.hex()}"
    poor = office.home / "poor.json"
    save_account(dev_account(9), poor, "secret", iterations=2)
    refused = [
        (office.submit(lines=[LINES[0], bad_line(2), bad_line(3)]), "line 2 (bad 2)"),
        (office.submit(lines=[LINES[0], bad_line(2), bad_line(3)]), "2 bad lines; nothing was sent"),
        (office.submit("--skip-bad", lines=[bad_line(1)]), "no line of the batch can be run"),
        (office.submit(PLUMB_PASSWORD=str(office.home / "wrong")), "does not open"),
        (office.submit(PLUMB_KEYSTORE=str(office.home / "none")), "no keystore"),
        (office.submit(PLUMB_ADDRESSES=str(office.home / "none")), "no addresses file"),
        (office.submit(PLUMB_KEYSTORE=str(poor)), "the job costs at most 30000 base units"),
        (office.submit("--token-price", 10**23), "of free stake"),
        (office.run("submit", office.batch(*LINES), "--model", office.home, "--pipeline", pipeline), "config.json"),
        (office.run("submit", office.batch(*LINES), "--model", office.folder, "--pipeline", "0x12"), "32 bytes"),
        (
            office.run("submit", office.batch(*LINES), "--model", office.folder, "--pipeline", "11" * 32),
            "no pipeline 0x1111",
        ),
    ]
    for result, reason in refused:
        assert result.exit_code == 1 and reason in result.output, result.output
        assert result.stdout == ""
    assert office.spent() == before


def test_prompts_that_no_model_serves_are_refused_and_the_others_run(office: Office) -> None:
    def line(name: str, prompt: Any) -> dict[str, Any]:
        return {**LINES[0], "custom_id": name, "body": {"prompt": prompt, "max_tokens": 3, "temperature": 0}}

    most, vocabulary = office.town.weights.shape.max_positions, office.town.weights.shape.vocabulary
    before = office.spent()
    bad = [
        (line("empty", []), "line 2 (empty): expected a prompt of 1 token or more, got none"),
        (line("no text", ""), "line 3 (no text): expected a prompt of 1 token or more, got none"),
        (line("long", [1] * most), f"line 4 (long): expected prompt and limit within {most} positions, got {most} + 3"),
        (
            line("alien", [1, vocabulary]),
            f"line 5 (alien): expected prompt ids below {vocabulary}, got {vocabulary} at 1",
        ),
    ]
    lines = [LINES[0], *(one for one, _ in bad), LINES[1]]
    refused = office.submit(lines=lines)
    assert refused.exit_code == 1 and "4 bad lines; nothing was sent and nothing is charged" in refused.output
    assert all(reason in refused.output for _, reason in bad), refused.output
    assert office.spent() == before
    done = office.submit("--skip-bad", lines=lines)
    assert done.exit_code == 0 and all(reason in done.output for _, reason in bad), done.output
    assert [told["prompt"] for told in office.town.hall.handed_over[-1]["requests"]] == [[1, 2, 3], [1, 2]]


def test_a_stage_that_would_refuse_is_asked_first(office: Office) -> None:
    before = office.spent()
    info = dict(office.town.hall.info)
    try:
        for change, reason in (
            ({"min_token_price": "6000"}, "takes a token_price of 6000 or more, the job offers 5000"),
            ({"max_positions": 5}, "keeps 5 positions of a request, the longest may take 6"),
            ({"model": "ab"}, "serves model 0xab"),
            ({"model": None, "min_gas_rate": "x"}, "does not say what it serves"),
        ):
            office.town.hall.info = {**info, **change}
            result = office.submit()
            assert result.exit_code == 1 and reason in result.output and "nothing is charged" in result.output
    finally:
        office.town.hall.info = info
    office.town.hall.misbehave = lambda handler, path: say(handler, b"", 503)
    assert "answered 503" in office.submit().output
    assert office.spent() == before


def test_another_model_than_the_pipelines(office: Office, tmp_path: Path) -> None:
    from tests.verifier import tiny
    from verifier.tolerance import uniform_profile

    weights = tiny.make_weights(tmp_path, tiny.config(), seed=5)
    write_tokenizer(tmp_path)
    pipeline = ("--pipeline", office.town.pipeline.hex(), "--model", tmp_path)
    before = office.spent()
    uniform_profile(weights.shape, 10, 1000, 1 << 14, 1 << 20).save(tmp_path)
    result = office.run("submit", office.batch(*LINES), *pipeline)
    assert result.exit_code == 1 and "holds 0x" in result.output
    assert office.spent() == before
    (tmp_path / "tolerance.json").unlink()
    assert "note: not checked" in office.run("submit", office.batch(*LINES), *pipeline).output


def test_a_job_whose_hand_over_fails_is_not_lost(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("requester.client.HAND_OVER_ATTEMPTS", 2)
    office.town.hall.misbehave = lambda handler, path: "/jobs/" in path and say(handler, b"busy", 503)
    result = office.submit()
    assert result.exit_code == 1 and "plumb request resume" in result.output and "busy" in result.output
    id = job_of(result)
    assert office.requester.escrow.status(id) is Status.OPEN
    office.town.hall.misbehave = lambda handler, path: "/jobs/" in path and say(handler, b"too cheap", 409)
    again = office.run("resume", id.hex())
    assert again.exit_code == 1 and "refused the prompts" in again.output and "too cheap" in again.output
    office.town.hall.misbehave = lambda handler, path: False
    assert office.run("resume", id.hex()).exit_code == 0
    assert len(office.town.hall.handed_over[-1]["requests"]) == 2

    office.devnet.pass_seconds(61)
    assert "not every stage accepted in time" in office.run("status", id.hex()).output
    before, _ = office.spent()
    assert "expired the job" in office.run("collect", id.hex()).output
    assert office.spent()[0] == before + 30_000
    assert "refunded: not served in time" in office.run("status", id.hex()).output
    assert "nothing is to be handed over" in office.run("resume", id.hex()).output


def test_a_stage_that_is_busy_for_a_moment(office: Office) -> None:
    answers = [503, 404, 200]

    def busy(handler: Any, path: str) -> bool:
        if "/jobs/" not in path or answers[0] == 200:
            return False
        return say(handler, b"", answers.pop(0))

    office.town.hall.misbehave = busy
    assert office.submit().exit_code == 0 and len(office.town.hall.handed_over) == 1


def test_killed_between_escrow_and_hand_over(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Requester.open

    def die(self: Requester, job: Any) -> bytes:
        real(self, job)
        raise KeyboardInterrupt

    monkeypatch.setattr(Requester, "open", die)
    before = set((office.home / "jobs").glob("*.json"))
    office.submit()
    (path,) = set((office.home / "jobs").glob("*.json")) - before
    assert office.run("resume", path.stem).exit_code == 0


def test_bad_lines_are_skipped_and_told_in_the_results(office: Office, tmp_path: Path) -> None:
    done = office.submit("--skip-bad", lines=[LINES[0], bad_line(2), LINES[1]])
    assert done.exit_code == 0, done.output
    id = job_of(done)
    office.town.finish(id, office.served)
    office.town.hall.misbehave = lambda handler, path: path.startswith("/s1/") and say(handler, b"gone", 404)
    fetched = office.run("fetch", id.hex(), "-o", tmp_path / "r.jsonl", "--receipt", tmp_path / "r.json")
    assert fetched.exit_code == 0, fetched.output  # stage 0 holds the outputs too
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [row["error"] is None for row in rows] == [True, False, True] and rows[1]["error"]["line"] == 2


def test_outputs_are_the_chains_or_none(office: Office) -> None:
    id = job_of(office.submit())
    office.town.finish(id, office.served)
    requester = Requester(office.requester)
    other = serve(office.town.weights, requests=(Request((9, 9), 3), Request((1, 2), 2)))
    office.town.hall.served[id.hex()] = other
    with pytest.raises(RequesterError, match="expected outputs with root"):
        requester.outputs(id, REQUESTS)
    office.town.hall.misbehave = lambda handler, path: say(handler, b"[" * 5000)
    with pytest.raises(RequesterError, match=r"stage 1: .*; stage 0: "):
        requester.outputs(id, REQUESTS)
    office.town.hall.misbehave = lambda handler, path: False
    office.town.hall.served[id.hex()] = office.served
    assert requester.outputs(id, REQUESTS) == office.served.outputs
    with pytest.raises(RequesterError, match="break the law"):
        requester.outputs(id, (Request((1, 2, 3), 9), REQUESTS[1]))


def test_jobs_that_are_none(office: Office) -> None:
    for command in ("status", "resume", "fetch"):
        told = office.run(command, "ab" * 32)
        assert told.exit_code == 1 and ("no job" in told.output or "not submitted from here" in told.output)
        assert "32 bytes" in office.run(command, "xyz").output


def test_a_chain_that_does_not_answer(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "requester.cli.Chain", lambda rpc, addresses, key=None: Chain(rpc, addresses, key, patience_seconds=0.2)
    )
    result = office.submit(PLUMB_RPC="http://127.0.0.1:1")
    assert result.exit_code == 1 and "no answer from the chain at http://127.0.0.1:1" in result.output
