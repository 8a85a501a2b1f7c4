"""A worker that can't do its work says so as it starts."""

import asyncio
import socket
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest

from contracts.client import Addresses, Chain
from deploy.deployment import deploy
from deploy.devnet import Devnet
from deploy.keys import dev_account
from tests.worker.pipeline_in_process import Tiny, within
from tests.worker.village import Village
from worker.agent import build_worker
from worker.errors import ConfigError
from worker.preflight import check_chain, listen

NOWHERE = "0x" + "aa" * 20


@pytest.fixture(scope="module")
def devnet() -> Iterator[Devnet]:
    with Devnet() as made:
        yield made


def test_contracts_that_do_not_belong_together_are_refused(devnet: Devnet, caplog: pytest.LogCaptureFixture) -> None:
    ours, others = (deploy(devnet.url, dev_account(0)) for _ in range(2))
    account = dev_account(0).address
    asyncio.run(check_chain(Chain(devnet.url, ours), account, 0.1))
    assert f"{account} is not registered on this chain" in caplog.text
    for field in fields(Addresses):
        for wrong in (getattr(others, field.name), NOWHERE):
            chain = Chain(devnet.url, replace(ours, **{field.name: wrong}))
            with pytest.raises(ConfigError, match=r"chain\.addresses\.\w+: (expected 0x\w+, which|none at 0x)"):
                asyncio.run(check_chain(chain, account, 0.1))


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"http: {address} cannot be listened on"):
            listen(address, "http")


def test_a_worker_with_the_wrong_contracts_ends_with_the_reason(devnet: Devnet, tiny: Tiny, tmp_path: Path) -> None:
    village = Village(devnet, tmp_path, tiny[0])
    village.settle_in()
    config = village.configs[0]
    chain = replace(config.chain, addresses=replace(config.chain.addresses, disputes=NOWHERE))
    with pytest.raises(ConfigError, match=f"disputes: expected 0x|none at {NOWHERE}"):
        asyncio.run(within(60, build_worker(replace(config, chain=chain)).run()))
