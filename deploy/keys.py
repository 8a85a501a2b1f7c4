"""Throwaway accounts of a local chain, and V3 keystores for them.

Never for a chain that holds value: the phrase is public.
"""

import secrets
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from eth_account import Account
from eth_account.signers.local import LocalAccount

from contracts.keys import save_account

DEV_PHRASE = "test test test test test test test test test test test junk"  # anvil's own default
_QUICK_ITERATIONS = 1024  # opens in milliseconds; enough for a key that everyone knows anyway

Account.enable_unaudited_hdwallet_features()


@dataclass(frozen=True)
class Keystore:
    path: Path
    password: Path  # the password in a file beside it
    address: str


@cache
def dev_account(index: int) -> LocalAccount:
    """Account `index` of the public development phrase, m/44'/60'/0'/0/index; anvil funds the first ones."""
    account: LocalAccount = Account.from_mnemonic(DEV_PHRASE, account_path=f"m/44'/60'/0'/0/{index}")
    return account


def write_keystore(account: LocalAccount, folder: Path, name: str) -> Keystore:
    """`folder/name.json` and `folder/name.password`, both readable by their owner alone."""
    keystore = folder / f"{name}.json"
    password = folder / f"{name}.password"
    secret = secrets.token_urlsafe(16)
    save_account(account, keystore, secret, iterations=_QUICK_ITERATIONS)
    password.touch(mode=0o600)
    password.write_text(secret + "\n", encoding="utf-8")
    return Keystore(keystore, password, account.address)
