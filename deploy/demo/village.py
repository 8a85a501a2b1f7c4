"""Everybody the demo needs on one machine: a chain, accounts with money, and a process for every player."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from eth_account.signers.local import LocalAccount

from contracts.client import Addresses, Chain, Worker
from deploy.demo import nursery
from deploy.demo.players import ROLES
from deploy.deployment import deploy
from deploy.devnet import Devnet, free_port
from deploy.keys import dev_account, write_keystore
from verifier.tolerance import Profile
from verifier.weights import Weights, identify
from worker import tls
from worker.errors import Refused
from worker.pipeline import propose

START_SECONDS = 300.0
MONEY = 10**15  # base units given to every party: more than all jobs cost
STAKE = 10**14
ETHER = 10**20  # wei for gas


class DemoError(Exception):
    """The demo cannot go on; says which player did what."""


@dataclass
class Player:
    """One process. account: who it is on chain."""

    name: str
    role: str
    account: str
    process: BaseProcess
    log: Path
    url: str = ""
    first_layer: int = 0
    end_layer: int = 0


@dataclass
class Village:
    """Started by `with`. Everything it started, and nothing else, ends with it."""

    model: Path
    home: Path
    players: list[Player] = field(default_factory=list)
    serving: dict[str, Any] = field(default_factory=dict)  # of the workers, besides what suits one machine
    policy: dict[str, Any] = field(default_factory=dict)  # of the workers

    def __enter__(self) -> Village:
        nursery.warm()
        self.home.mkdir(parents=True, exist_ok=True)
        self.devnet = Devnet(block_seconds=1, accounts=2, log=self.home / "anvil.log")
        self.devnet.start()
        try:
            self._settle()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for player in self.players:
            player.process.terminate()
        for player in self.players:
            nursery.stop(player.process)
        self.devnet.stop()

    def _settle(self) -> None:
        self._newcomers = count(2)  # 0 deploys, 1 pays; next() is safe between threads
        deployer = dev_account(0)
        self.addresses: Addresses = deploy(self.devnet.url, deployer, withdrawal_seconds=60)
        self.addresses.save(self.home / "addresses.json")
        self.bank = Chain(self.devnet.url, self.addresses, deployer)
        self.requester = Chain(self.devnet.url, self.addresses, dev_account(1))
        self.bank.token.mint(self.requester.account, MONEY)
        weights = Weights.open(self.model)
        self.shape = weights.shape
        self.model_id = self.bank.models.register(identify(weights, Profile.load(self.model, weights.shape)))

    # ---- players

    def worker(self, role: str, first_layer: int, end_layer: int, name: str) -> Player:
        """Starts a worker process, funded, registered and staked. Call `ready` before relying on it."""
        assert role in ROLES
        account, chain = self._newcomer()
        folder = self.home / name
        keystore = write_keystore(account, folder, "key")
        tls.create(folder / "tls.pem", folder / "tls.key")
        http, grpc = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        config: dict[str, Any] = {
            "model": str(self.model.resolve()),
            "data": "data",
            "first_layer": first_layer,
            "end_layer": end_layer,
            "keystore": str(keystore.path.resolve()),
            "password_file": str(keystore.password.resolve()),
            "tls_certificate": "tls.pem",
            "tls_key": "tls.key",
            "http": http,
            "url": f"http://{http}",
            "grpc": grpc,
            "chain": {"rpc": self.devnet.url, "poll_seconds": 0.5, "addresses": asdict(self.addresses)},
            "serving": {"threads": 1, "claim_seconds": 2.0, **self.serving},
            "policy": self.policy,
        }
        path = folder / "stage.toml"
        path.write_text(_toml(config), encoding="utf-8")
        fingerprint = tls.fingerprint((folder / "tls.pem").read_bytes())
        chain.workers.register(Worker(account.address, fingerprint, config["url"]))
        chain.token.approve(self.addresses.workers, STAKE)
        chain.workers.stake(STAKE)
        player = self._start(name, role, account.address, path)
        player.url, player.first_layer, player.end_layer = config["url"], first_layer, end_layer
        return player

    def watcher(self, name: str, role: str | None = None) -> Player:
        """Starts a watchtower, or the role's dishonest challenger, from the chain's present block on."""
        account, _ = self._newcomer()
        folder = self.home / name
        keystore = write_keystore(account, folder, "key")
        config = {
            "rpc_url": self.devnet.url,
            "addresses": str((self.home / "addresses.json").resolve()),
            "keystore": str(keystore.path.resolve()),
            "password": str(keystore.password.resolve()),
            "models": [str(self.model.resolve())],
            "data": "data",
            "poll_seconds": 0.5,
            "from_block": self.bank.block_number() + 1,
        }
        path = folder / "watch.toml"
        path.write_text(_toml(config), encoding="utf-8")
        return self._start(name, role, account.address, path)

    def ready(self, *players: Player) -> None:
        """Waits until these workers answer. Raises DemoError with the log's end of one that does not."""
        deadline = time.monotonic() + START_SECONDS
        for player in players:
            while True:
                self.alive(player)
                try:
                    if httpx.get(f"{player.url}/info", timeout=2.0, trust_env=False).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                if time.monotonic() > deadline:
                    raise DemoError(f"{player.name} does not answer at {player.url}: {_tail(player.log)}")
                time.sleep(0.1)

    def watching(self, player: Player) -> None:
        """Waits until a watcher has loaded its models; its database comes last. Raises DemoError."""
        deadline = time.monotonic() + START_SECONDS
        while not (player.log.parent / "data" / "challenger.db").exists():
            self.alive(player)
            if time.monotonic() > deadline:
                raise DemoError(f"{player.name} does not come up: {_tail(player.log)}")
            time.sleep(0.1)

    def alive(self, player: Player) -> None:
        if not player.process.is_alive():
            raise DemoError(f"{player.name} ended with status {player.process.exitcode}: {_tail(player.log)}")

    def pipeline(self, workers: list[Player]) -> bytes:
        """Creates a pipeline of these workers; pay by layers. Each signs over HTTP."""
        try:
            return propose(self.requester, [player.account for player in workers])
        except Refused as error:
            raise DemoError(f"no pipeline: {error}") from error

    def stop(self, player: Player) -> None:
        nursery.stop(player.process)
        self.players.remove(player)

    def wealth(self, account: str) -> int:
        """Everything of the token that is an account's: wallet, credits, stake. Base units."""
        chain = self.bank
        while True:  # all of one block: what moves from one place to another counts once
            block = chain.block_number()
            credits = sum(door.credit(account) for door in (chain.escrow, chain.disputes, chain.demands))
            stake = chain.workers.free_stake(account) + chain.workers.locked_stake(account)
            total = chain.token.balance(account) + credits + stake
            if chain.block_number() == block:
                return total

    def _newcomer(self) -> tuple[LocalAccount, Chain]:
        """A fresh account with ether and tokens."""
        account = dev_account(next(self._newcomers))
        self.devnet.give_ether(account.address, ETHER)
        self.bank.token.mint(account.address, MONEY)
        return account, Chain(self.devnet.url, self.addresses, account)

    def _start(self, name: str, role: str | None, account: str, config: Path) -> Player:
        log = config.parent / "log.txt"
        if role is None:
            command = ["plumb", "challenger", "run"]
        elif role == "honest":
            command = ["plumb", "worker", "run", "--verbose"]
        else:
            command = ["players", role]
        process = nursery.start([*command, "--config", str(config)], log)
        player = Player(name, role or "watchtower", account, process, log)
        self.players.append(player)
        return player


def _toml(table: dict[str, Any]) -> str:
    """Strings, numbers, lists of strings, and tables of tables: JSON's spelling of a value is TOML's."""
    plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += _table(key, value)
    return "\n".join(lines) + "\n"


def _table(name: str, table: dict[str, Any]) -> list[str]:
    lines = [f"[{name}]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += _table(f"{name}.{key}", value)
    return lines


def _tail(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")[-1500:]
