"""Outputs that are refused after the commitment: posted on chain, or the price comes back."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench._place import Place, Poster
from bench._town import CLOCK_SECONDS, say
from contracts.client import Status
from requester.demand import posted_outputs
from tests.requester.office import Office, job_of, open_office


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    with open_office(tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("home")) as opened:
        yield opened


def committed(office: Office) -> bytes:
    """A job whose outputs nobody hands over."""
    office.town.hall.misbehave = lambda handler, path: False
    done = office.submit("--window", 600, "--clock", CLOCK_SECONDS)
    assert done.exit_code == 0, done.output
    id = job_of(done)
    office.town.finish(id, office.served)
    office.town.hall.misbehave = lambda handler, path: say(handler, b"", 503) if "outputs" in path else False
    return id


def test_refused_outputs_are_posted_and_fetched(office: Office, tmp_path: Path) -> None:
    id = committed(office)
    place = Place(office.devnet, office.town, office.folder, tmp_path)
    poster, over = Poster(place, office.served, place.config("poster", from_block=0)), threading.Event()

    def post() -> None:
        while not over.wait(0.1):
            poster.post()

    where = ("-o", tmp_path / "r.jsonl", "--receipt", tmp_path / "r.json")
    refused = office.run("fetch", id.hex(), *where)
    assert refused.exit_code == 1 and "`plumb request demand`" in refused.output
    poor = office.run("demand", id.hex(), "--budget", 1000)
    assert poor.exit_code == 1 and "1000 are left to spend" in poor.output and not poster.posted
    thread = threading.Thread(target=post)
    thread.start()
    try:
        demanded = office.run("demand", id.hex(), "--budget", 10**9)
    finally:
        over.set()
        thread.join()
    assert demanded.exit_code == 0, demanded.output
    assert len(poster.posted) == 2
    assert posted_outputs(office.requester, id, 0) == office.served.outputs
    fetched = office.run("fetch", id.hex(), *where)
    assert fetched.exit_code == 0, fetched.output
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert rows[0]["response"]["body"]["usage"]["completion_tokens"] == office.served.outputs[0].count
    again = office.run("demand", id.hex(), "--budget", 1)  # nothing is left to ask for
    assert again.exit_code == 0, again.output


def test_outputs_that_never_come_bring_the_price_back(office: Office) -> None:
    id = committed(office)
    over = threading.Event()

    def wait() -> None:
        while not over.wait(0.2):
            office.devnet.pass_seconds(CLOCK_SECONDS)

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        demanded = office.run("demand", id.hex(), "--budget", 10**9)
    finally:
        over.set()
        thread.join()
    assert demanded.exit_code == 1 and "did not post the outputs in time and is convicted" in demanded.output
    assert office.requester.escrow.status(id) == Status.VOID
    assert "convicted by its silence" in office.run("status", id.hex()).stdout
    assert "drew" in office.run("collect", id.hex()).output
