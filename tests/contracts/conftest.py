"""A local chain with the contracts on it, one for each test file that asks."""

import dataclasses
from collections.abc import Iterator

import pytest

from contracts.client import Addresses, Chain
from deploy.deployment import deploy
from deploy.devnet import Devnet
from deploy.keys import dev_account


@dataclasses.dataclass(frozen=True)
class World:
    devnet: Devnet
    addresses: Addresses

    def chain(self, index: int) -> Chain:
        return Chain(self.devnet.url, self.addresses, dev_account(index), patience_seconds=5)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Devnet() as devnet:
        yield World(devnet, deploy(devnet.url, dev_account(0), withdrawal_seconds=60))
