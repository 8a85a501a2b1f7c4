"""`plumb worker ...` against a local chain: a stake's way in, and out again."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from contracts.client import Addresses, Chain, load_account
from deploy.deployment import deploy
from deploy.devnet import Devnet
from deploy.keys import dev_account
from worker import cli

DELAY_SECONDS = 3600
STAKE = 1000


@pytest.fixture(scope="module")
def devnet() -> Iterator[Devnet]:
    with Devnet() as made:
        yield made


@pytest.fixture(scope="module")
def addresses(devnet: Devnet) -> Addresses:
    return deploy(devnet.url, dev_account(0), withdrawal_seconds=DELAY_SECONDS)


@pytest.fixture
def stage(tmp_path: Path, devnet: Devnet, addresses: Addresses) -> Path:
    """The configuration of a worker with keys, ether and tokens, over WebSocket."""
    table = "\n".join(f'{name} = "{value}"' for name, value in vars(addresses).items())
    path = tmp_path / "stage.toml"
    path.write_text(f"""
model = "model"
data = "data"
first_layer = 0
end_layer = 2
keystore = "key.json"
password_file = "key.password"
tls_certificate = "tls.pem"
tls_key = "tls.key"
http = "127.0.0.1:9001"
url = "http://127.0.0.1:9001"
grpc = "127.0.0.1:9101"
chain.rpc = "{devnet.url.replace("http", "ws")}"
[chain.addresses]
{table}
""")
    assert plumb("keys", path).exit_code == 0
    account = account_of(path)
    devnet.give_ether(account, 10**20)
    Chain(devnet.url, addresses, dev_account(0)).token.mint(account, STAKE)
    return path


def plumb(command: str, config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli.app, [command, "--config", str(config), *arguments])


def account_of(config: Path) -> str:
    return load_account(config.parent / "key.json", config.parent / "key.password").address


def test_stake_goes_in_and_comes_back_after_the_delay(devnet: Devnet, addresses: Addresses, stage: Path) -> None:
    chain, account = Chain(devnet.url, addresses), account_of(stage)
    answer = plumb("register", stage, "--stake", str(STAKE))
    assert answer.exit_code == 0 and answer.stdout.endswith(f"free stake {STAKE}\n"), answer.output
    assert chain.token.balance(account) == 0

    answer = plumb("withdraw", stage)
    assert answer.exit_code == 1
    assert "error: no stake is leaving: `plumb worker unstake AMOUNT` asks for it" in answer.stderr

    answer = plumb("unstake", stage, "400")
    assert answer.exit_code == 0, answer.output
    assert answer.stdout.startswith("leaving 400, to be withdrawn from 20") and "free stake 600" in answer.stdout
    assert chain.workers.withdrawal_of(account) == (400, chain.block_timestamp() + DELAY_SECONDS)
    answer = plumb("withdraw", stage)
    assert answer.exit_code == 1 and "error: 400 may be withdrawn from 20" in answer.stderr

    # Asking again replaces the request, up to all that is free.
    answer = plumb("unstake", stage, "1001")
    assert answer.exit_code == 1
    assert f"InsufficientStake(account={account}, free={STAKE}, needed=1001)" in answer.stderr
    assert plumb("unstake", stage, "0").stdout == f"leaving 0, free stake {STAKE}\n"
    assert plumb("unstake", stage, "700").exit_code == 0

    devnet.pass_seconds(DELAY_SECONDS + 1)
    answer = plumb("withdraw", stage)
    assert answer.exit_code == 0 and answer.stdout == f"withdrew 700 to {account}\n", answer.output
    assert chain.token.balance(account) == 700
    assert chain.workers.free_stake(account) == 300
    assert chain.workers.withdrawal_of(account) == (0, 0)


def test_only_the_staked_account_itself_is_given_stake_back(stage: Path) -> None:
    staked = dev_account(1).address
    stage.write_text(f'account = "{staked}"\n' + stage.read_text())
    for command, arguments in (("unstake", ["1"]), ("withdraw", [])):
        answer = plumb(command, stage, *arguments)
        assert answer.exit_code == 1
        expected = f"expected the keystore of the staked account {staked}, got that of its signer {account_of(stage)}"
        assert expected in answer.stderr


def test_an_unknown_way_to_retain_is_refused(stage: Path) -> None:
    answer = plumb("run", stage, "--retain", "forget")
    assert answer.exit_code == 1
    assert "serving.retain: expected one of store, regenerate, came 'forget'" in answer.stderr


def test_no_negative_amount(stage: Path) -> None:
    answer = plumb("unstake", stage, "--", "-1")
    told = re.sub(r"[\s│]+", " ", answer.stderr)  # without the frame around it
    assert answer.exit_code == 2 and "greater than or equal to 0" in told
