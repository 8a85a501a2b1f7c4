"""A chain with a job market whose workers cheat now and then, and a watchtower beside it as a process of its own."""

import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import httpx

from bench import _town as town
from bench._place import Defence, Place
from bench._town import Hall, Served, Town
from challenger.config import Config, load_config
from contracts.abi import decode_error
from contracts.client import Chain
from contracts.keys import save_account
from deploy.deployment import deploy
from deploy.devnet import Devnet
from deploy.keys import dev_account

WATCHER = 4  # the development account of the watchtower
PASSWORD = "watch"


class Street:
    """`with Street(folder, block_seconds) as street:`."""

    guilty = 1  # the stage that cheats

    def __init__(self, home: Path, block_seconds: int | None) -> None:
        self.home = home
        self.devnet = Devnet()
        self.block_seconds = block_seconds
        self.hall = Hall()
        self.log = home / "log.txt"
        self.config_file = home / "watch.toml"
        self.window = 600
        self._http = httpx.Client(trust_env=False, timeout=30.0)
        self._ends: list[threading.Event] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self.devnet.start()
        self.hall.__enter__()
        model = self.home / "model"
        model.mkdir()
        weights, profile = town.model(model)
        addresses = deploy(self.devnet.url, dev_account(0), withdrawal_seconds=60)
        addresses.save(self.home / "addresses.json")
        self.town = Town(self.devnet.url, addresses, self.hall, weights, profile)
        self.town.settle_in()
        self.bank: Chain = self.town.requester
        self.place = Place(self.devnet, self.town, model, self.home)
        self.wrong, self.right = town.serve(weights, spoil=True), town.serve(weights)
        watcher = self.town.chain(WATCHER)
        watcher.token.mint(watcher.account, town.FUNDS)
        self.account = watcher.account
        self.first_block = self.bank.block_number() + 1
        save_account(dev_account(WATCHER), self.home / "key.json", PASSWORD, iterations=2)
        (self.home / "password").write_text(PASSWORD + "\n", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._ends:
            end.set()
        for thread in self._threads:
            thread.join()
        self._http.close()
        self.hall.__exit__()
        self.devnet.stop()

    def config(self, **more: Any) -> Config:
        """Writes the watchtower's configuration."""
        values = {
            "rpc_url": self.devnet.url,
            "addresses": "addresses.json",
            "keystore": "key.json",
            "password": "password",
            "models": ["model"],
            "data": "data",
            "poll_seconds": 0.2,
            "from_block": self.first_block,
            **more,
        }
        (self.home / "data").mkdir(exist_ok=True)
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        self.config_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return load_config(self.config_file)

    @contextmanager
    def hurrying(self) -> Iterator[None]:
        """A block for each transaction, for a while; then one each `block_seconds` again."""
        self._ask("evm_setIntervalMining", 0)
        self._ask("evm_setAutomine", True)
        yield
        if self.block_seconds is not None:
            self._ask("evm_setAutomine", False)
            self._ask("evm_setIntervalMining", self.block_seconds)

    def commit(self, jobs: Sequence[Served], **changes: Any) -> list[bytes]:
        """Has jobs opened, accepted and committed to."""
        with self.hurrying():
            return [self.town.commit(served, **changes) for served in jobs]

    def defend(self) -> None:
        """Has the guilty worker deny everything, from a thread, until the end."""
        end = threading.Event()
        defence = Defence(self.place, self.wrong, replace(self.place.config("defence"), from_block=self.first_block))

        def play() -> None:
            while not end.wait(0.2):
                defence.play()

        self._ends.append(end)
        self._threads.append(threading.Thread(target=play, name="defence", daemon=True))
        self._threads[-1].start()

    def wealth(self) -> int:
        """What the watchtower owns of the token, credits included."""
        chain, account = self.bank, self.account
        credits = chain.disputes.credit(account) + chain.escrow.credit(account) + chain.demands.credit(account)
        return chain.token.balance(account) + credits

    def transactions(self, account: str) -> list[str]:
        """Why each of an account's transactions that are in blocks was refused there; "" for one that was not."""
        found = []
        for number in range(self.first_block, self.bank.block_number() + 1):
            for transaction in self._ask("eth_getBlockByNumber", hex(number), True)["transactions"]:
                if transaction["from"].lower() != account.lower():
                    continue
                receipt = self._ask("eth_getTransactionReceipt", transaction["hash"])
                found.append("" if receipt["status"] == "0x1" else self._refusal(transaction, receipt))
        return found

    def _refusal(self, transaction: dict[str, Any], receipt: dict[str, Any]) -> str:
        trace = self._ask("debug_traceTransaction", transaction["hash"], {"tracer": "callTracer"})
        output = bytes.fromhex(trace.get("output", "0x")[2:])
        why = str(decode_error(output, transaction["input"][:10])) if output else str(trace.get("error"))
        return f"{why}; gas {int(receipt['gasUsed'], 16)} of {int(transaction['gas'], 16)}"

    def _ask(self, method: str, *params: Any) -> Any:
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        answer = self._http.post(self.devnet.url, json=body).raise_for_status().json()
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]


def become(config: str, log: str) -> None:
    """In a new process: `plumb challenger run --config CONFIG`, its output appended to a file."""
    from challenger import cli

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    os.close(output)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    cli.run(Path(config))
