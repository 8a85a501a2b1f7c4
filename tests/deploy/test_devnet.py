"""The local chain, its throwaway keys and the deployment."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from contracts.client import Chain, ChainUnreachable, KeystoreError, load_account
from contracts.transport import Transport
from deploy.deployment import deploy, deploy_once, predict
from deploy.devnet import Devnet, DevnetError, foundry_binary
from deploy.keys import dev_account, write_keystore


def test_a_keystore_opens_with_its_password_alone(tmp_path: Path) -> None:
    kept = write_keystore(dev_account(3), tmp_path, "three")
    assert load_account(kept.path, kept.password).address == dev_account(3).address
    assert kept.path.stat().st_mode & 0o077 == 0
    assert kept.password.stat().st_mode & 0o077 == 0
    kept.password.write_text("guess\n", encoding="utf-8")
    with pytest.raises(KeystoreError, match="does not open"):
        load_account(kept.path, kept.password)


def test_a_keystore_that_is_none_is_refused(tmp_path: Path) -> None:
    kept = write_keystore(dev_account(3), tmp_path, "three")
    with pytest.raises(KeystoreError, match="no keystore at"):
        load_account(tmp_path / "absent.json", kept.password)
    with pytest.raises(KeystoreError, match="no password file at"):
        load_account(kept.path, tmp_path / "absent")
    content = json.loads(kept.path.read_text(encoding="utf-8"))
    content["address"] = dev_account(4).address
    kept.path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(KeystoreError, match="its key belongs to"):
        load_account(kept.path, kept.password)
    for text in ("no json", "[]", '{"version": 1}', '{"version": 3, "crypto": {}}'):
        kept.path.write_text(text, encoding="utf-8")
        with pytest.raises(KeystoreError, match="is no V3 keystore"):
            load_account(kept.path, kept.password)


def test_contract_addresses_follow_from_nonces() -> None:
    # The well-known first contract of anvil's first account.
    assert predict("0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266", 0) == "0x5FbDB2315678afecb367f032d93F642f64180aa3"


def is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def test_the_local_chain_survives_a_kill_with_its_state(tmp_path: Path) -> None:
    state = tmp_path / "chain.json"
    devnet = Devnet(state=state)
    devnet.start()
    try:
        addresses = deploy(devnet.url, dev_account(0))
        Chain(devnet.url, addresses, dev_account(0)).token.mint(dev_account(5).address, 77)
        # It saves every second, in place: the second save from here on holds the mint, and the next is a second away.
        for _ in range(2):
            before = state.stat().st_mtime_ns if state.exists() else 0
            while not state.exists() or state.stat().st_mtime_ns == before or not is_json(state):
                time.sleep(0.01)
        devnet.kill()
        devnet.start()
        assert Chain(devnet.url, addresses).token.balance(dev_account(5).address) == 77
    finally:
        devnet.stop()


def test_the_local_chain_ends_with_its_parent() -> None:
    script = (
        "import os, signal\n"
        "from deploy.devnet import Devnet\n"
        "print(Devnet().start().url, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).resolve().parents[2]
    child = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60)
    url = child.stdout.strip()
    assert url.startswith("http://127.0.0.1:"), child.stderr
    with pytest.raises(ChainUnreachable):
        _ = Transport(url, None, patience_seconds=0.5).chain_id


def test_a_local_chain_that_cannot_start_says_why(tmp_path: Path) -> None:
    with Devnet() as first, pytest.raises(DevnetError, match=f"port {first.port} is taken"):
        Devnet(port=first.port).start()
    broken = tmp_path / "state.json"
    broken.write_text("no state", encoding="utf-8")
    with pytest.raises(DevnetError, match=r"did not come up .* output: .*state"):
        Devnet(state=broken, log=tmp_path / "anvil.log").start()
    assert foundry_binary("forge").name == "forge"


def test_contracts_that_are_on_the_chain_are_not_deployed_again(tmp_path: Path) -> None:
    file = tmp_path / "addresses.json"
    with Devnet(accounts=1) as chain:
        assert deploy_once(chain.url, dev_account(0), file, withdrawal_seconds=60)
        first = file.read_bytes()
        assert not deploy_once(chain.url, dev_account(0), file, withdrawal_seconds=60)
        assert file.read_bytes() == first
    with Devnet(accounts=1) as another:
        assert deploy_once(another.url, dev_account(0), file, withdrawal_seconds=60)
