"""What can go wrong on the way to the chain.

ContractsError
├── RpcUrlError         a URL that no node can be asked at
├── ChainUnreachable    nobody answers at the URL
│   └── Disagreement    several nodes answer, and too few of them the same
├── AnswerTooLarge      a node's answer that we read no further
├── ChainError          a contract refused; carries the custom error's name and arguments
├── ReceiptTimeout      sent, but not in a block in time
├── NonceTaken          sent, but somebody else who holds the key took its place
├── KeystoreError       a keystore that cannot be opened
├── AddressesError      an addresses file that says something else than seven addresses
└── BuildError          the compiler refused, or its set-up is incomplete
"""

from collections.abc import Sequence
from typing import Any


class ContractsError(Exception):
    """Base of everything that contracts/ raises on purpose."""


class RpcUrlError(ContractsError, ValueError):
    def __init__(self, url: str, schemes: Sequence[str]) -> None:
        expected = ", ".join(f"{scheme}://host" for scheme in schemes)
        super().__init__(f"expected a URL of a chain, one of {expected}, got {url!r}")


class ChainUnreachable(ContractsError):
    def __init__(self, url: str, attempts: int, seconds: float, reason: str) -> None:
        super().__init__(f"no answer from the chain at {url} after {attempts} attempts in {seconds:.1f} s: {reason}")
        self.url = url
        self.attempts = attempts


class Disagreement(ChainUnreachable):
    """Not enough nodes say the same."""


class AnswerTooLarge(ContractsError):
    def __init__(self, method: str, most: int) -> None:
        super().__init__(f"{method}: expected an answer of at most {most} bytes, got more")


class ChainError(ContractsError):
    """A contract refused. `name` is the Solidity error ("WrongStatus"), `args_by_name` its arguments in order.

    `Error` (a require string) carries {"message"}, `Panic` {"code"}. Names of ours, not Solidity's: `Unknown` {"data"}
    is revert data that no ABI explains, `NoContract` {"address"}, `OutOfGas` {"gas"}, `Reverted` {"transaction"},
    `Rpc` {"message"} the node's own words.
    """

    def __init__(self, name: str, args_by_name: dict[str, Any], call: str = "") -> None:
        shown = ", ".join(f"{key}={_show(value)}" for key, value in args_by_name.items())
        super().__init__(f"{call + ': ' if call else ''}{name}({shown})")
        self.name = name
        self.args_by_name = args_by_name
        self.call = call


class ReceiptTimeout(ContractsError):
    def __init__(self, call: str, transaction: str, seconds: float) -> None:
        super().__init__(f"{call}: transaction {transaction} is in no block after {seconds:.0f} s")
        self.transaction = transaction


class NonceTaken(ContractsError):
    def __init__(self, call: str, nonce: int) -> None:
        super().__init__(f"{call}: expected nonce {nonce} to be free, another transaction of this account took it")
        self.nonce = nonce


class KeystoreError(ContractsError):
    pass


class AddressesError(ContractsError):
    pass


class BuildError(ContractsError):
    pass


def _show(value: Any) -> str:
    return "0x" + value.hex() if isinstance(value, bytes) else str(value)
