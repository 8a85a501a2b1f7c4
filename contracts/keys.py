"""Keys on disk: V3 keystores, opened with a password from a file."""

import json
from pathlib import Path

from eth_account import Account
from eth_account.signers.local import LocalAccount
from eth_utils.address import to_checksum_address

from contracts.errors import KeystoreError


def load_account(keystore: Path, password: Path) -> LocalAccount:
    """Opens a V3 keystore with the password in the first line of a file."""
    try:
        content = json.loads(keystore.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KeystoreError(f"no keystore at {keystore}") from None
    except (ValueError, UnicodeDecodeError):
        raise KeystoreError(f"{keystore} is no V3 keystore: expected JSON") from None
    try:
        secret = password.read_text(encoding="utf-8").split("\n", 1)[0].rstrip("\r")
    except FileNotFoundError:
        raise KeystoreError(f"no password file at {password}") from None
    if not isinstance(content, dict) or content.get("version") != 3 or not ({"crypto", "Crypto"} & content.keys()):
        raise KeystoreError(f'{keystore} is no V3 keystore: expected "version": 3 and "crypto"')
    try:
        key = Account.decrypt(content, secret)
    except ValueError:
        raise KeystoreError(f"the password in {password} does not open {keystore}") from None
    except (KeyError, TypeError) as error:
        raise KeystoreError(f"{keystore} is no V3 keystore: {error!r}") from None
    account: LocalAccount = Account.from_key(key)
    claimed = content.get("address")
    if isinstance(claimed, str) and to_checksum_address(_prefixed(claimed)) != account.address:
        raise KeystoreError(f"{keystore} says address {_prefixed(claimed)}, but its key belongs to {account.address}")
    return account


def save_account(account: LocalAccount, keystore: Path, password: str, iterations: int | None = None) -> None:
    """Writes a V3 keystore readable by its owner alone. Few `iterations` make it quick to open and cheap to guess."""
    content = Account.encrypt(account.key, password, kdf="pbkdf2" if iterations else None, iterations=iterations)
    keystore.parent.mkdir(parents=True, exist_ok=True)
    keystore.touch(mode=0o600)
    keystore.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _prefixed(address: str) -> str:
    return address if address.startswith("0x") else "0x" + address
