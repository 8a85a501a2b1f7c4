"""A chain, a pipeline that serves badly or well, and whoever watches it."""

from collections.abc import Iterator

import pytest

from bench._place import Place
from bench._town import Hall, Town, model
from deploy.deployment import deploy
from deploy.devnet import Devnet
from deploy.keys import dev_account


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("model")
    weights, profile = model(folder)
    with Devnet() as devnet, Hall() as hall:
        town = Town(devnet.url, deploy(devnet.url, dev_account(0), withdrawal_seconds=60), hall, weights, profile)
        town.settle_in()
        yield Place(devnet, town, folder, tmp_path_factory.mktemp("home"))
