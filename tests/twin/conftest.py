"""One node and one deployment for all twin tests."""

from collections.abc import Iterator

import pytest

from deploy.devnet import Devnet
from tests.twin.evm import Contract, Evm, compiled


@pytest.fixture(scope="session")
def evm() -> Iterator[Evm]:
    """A real EVM; the process that was started is ended whatever happens."""
    # Faults make a contract longer; the real ones are deployed under EIP-170 by every game.
    with Devnet(accounts=1, gas_limit=1_000_000_000, code_size_limit=2**16) as devnet:
        node = Evm(devnet.url)
        try:
            yield node
        finally:
            node.close()


@pytest.fixture(scope="session")
def contracts(evm: Evm) -> dict[str, Contract]:
    """Referee and Harness as they stand in the tree."""
    return {name: evm.deploy(code) for name, code in compiled().items()}


@pytest.fixture(scope="session")
def referee(contracts: dict[str, Contract]) -> Contract:
    return contracts["Referee"]


@pytest.fixture(scope="session")
def harness(contracts: dict[str, Contract]) -> Contract:
    return contracts["Harness"]
