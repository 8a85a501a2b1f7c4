"""A requester's desk: a local chain, a pipeline behind a hall, and the `plumb request` command."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from bench._town import REQUESTER, Hall, Served, Town, model, serve
from contracts.client import Chain
from contracts.keys import save_account
from deploy.deployment import deploy
from deploy.devnet import Devnet
from deploy.keys import dev_account
from requester.cli import app
from tests.requester.words import write_tokenizer
from verifier.commit import Request

LINES = [
    {"custom_id": "a", "method": "POST", "url": "/v1/completions",
     "body": {"prompt": "the cat sat", "max_tokens": 3, "temperature": 0}},
    {"custom_id": "b", "method": "POST", "url": "/v1/completions",
     "body": {"prompt": "the cat", "max_tokens": 2, "temperature": 0, "stop": "mat"}},
]  # fmt: skip
REQUESTS = (Request((1, 2, 3), 3, (0,)), Request((1, 2), 2, (0, 6)))


@dataclass
class Office:
    devnet: Devnet
    town: Town
    folder: Path
    home: Path
    served: Served

    def run(self, command: str, *arguments: Any, **changes: str) -> Result:
        told = {
            "PLUMB_RPC": self.town.url,
            "PLUMB_ADDRESSES": str(self.home / "addresses.json"),
            "PLUMB_KEYSTORE": str(self.home / "key.json"),
            "PLUMB_PASSWORD": str(self.home / "password"),
            "PLUMB_HOME": str(self.home / "jobs"),
        }
        return CliRunner().invoke(app, [command, *map(str, arguments)], env={**told, **changes})

    def batch(self, *lines: Any) -> Path:
        path = self.home / "batch.jsonl"
        path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
        return path

    def submit(self, *arguments: Any, lines: Any = None, **changes: str) -> Result:
        where = ("--model", self.folder, "--pipeline", f"0x{self.town.pipeline.hex()}")
        return self.run("submit", self.batch(*(lines or LINES)), *where, *arguments, **changes)

    @property
    def requester(self) -> Chain:
        return self.town.requester

    def spent(self) -> tuple[int, int]:
        """What must not change where nothing is charged: tokens, and jobs remembered."""
        remembered = len(list((self.home / "jobs").glob("*"))) if (self.home / "jobs").exists() else 0
        return self.requester.token.balance(self.requester.account), remembered


@contextmanager
def open_office(folder: Path, home: Path) -> Iterator[Office]:
    """folder: of the model."""
    weights, profile = model(folder)
    write_tokenizer(folder)
    save_account(dev_account(REQUESTER), home / "key.json", "secret", iterations=2)
    (home / "password").write_text("secret\n")
    (home / "wrong").write_text("other\n")
    with Devnet() as devnet, Hall() as hall:
        town = Town(devnet.url, deploy(devnet.url, dev_account(0), withdrawal_seconds=60), hall, weights, profile)
        town.settle_in()
        town.addresses.save(home / "addresses.json")
        yield Office(devnet, town, folder, home, serve(weights, requests=REQUESTS))


def job_of(result: Result) -> bytes:
    """Standard output is the id, and nothing else."""
    return bytes.fromhex(result.stdout.strip().removeprefix("0x"))
