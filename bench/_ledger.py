"""What parties spend and lose, by receipts and by what they hold anywhere before and after."""

from collections.abc import Sequence
from typing import Any

from bench._arena import Arena
from bench._court import GAS_RATE
from bench._market import CHALLENGER, REQUESTER, WORKERS, Market

Row = dict[str, Any]
Mark = dict[int, tuple[int, int]]  # account -> gas spent so far, tokens held


class Ledger:
    """The accounts of a market in which an arena's games are played."""

    def __init__(self, market: Market, arena: Arena) -> None:
        self._market, self._arena = market, arena

    def mark(self) -> Mark:
        """How everybody stands."""
        return {index: self._stands(index) for index in (*WORKERS, REQUESTER, CHALLENGER)}

    def row(
        self,
        mark: Mark,
        name: str,
        attackers: Sequence[int],
        attacked: Sequence[int],
        seconds: int = 0,
        locked: int = 0,
        attacked_locked: int = 0,
    ) -> Row:
        """What an attack has cost since the mark (bench/griefing.py). locked: in tokens."""
        return {
            "attack": name,
            "attacker": self._side(mark, attackers, locked),
            "attacked": self._side(mark, attacked, attacked_locked),
            "burned": in_gas(sum(self._spent(mark, index)[1] for index in mark)),
            "seconds": seconds,
        }

    def _side(self, mark: Mark, accounts: Sequence[int], locked: int) -> dict[str, int]:
        spent = [self._spent(mark, index) for index in accounts]
        gas, tokens = sum(each[0] for each in spent), sum(each[1] for each in spent)
        return {"gas": gas, "lost": gas + in_gas(tokens), "locked": in_gas(locked)}

    def _spent(self, mark: Mark, index: int) -> tuple[int, int]:
        (gas, held), (gas_before, held_before) = self._stands(index), mark[index]
        return gas - gas_before, held_before - held

    def _stands(self, index: int) -> tuple[int, int]:
        chain = self._market.chain(index)
        account = chain.account
        held = chain.token.balance(account) + chain.workers.free_stake(account) + chain.workers.locked_stake(account)
        held += sum(door.credit(account) for door in (chain.escrow, chain.disputes, chain.demands))
        return self._arena.gas(index) + sum(receipt.gas for receipt in chain.receipts), held


def joined(first: Row, second: Row, locked: int) -> Row:
    """Two parts of one attack: the attackers' losses of both, name and time of the second."""
    attacker = {name: first["attacker"][name] + second["attacker"][name] for name in ("gas", "lost")}
    return second | {"attacker": attacker | {"locked": locked}, "burned": first["burned"] + second["burned"]}


def in_gas(tokens: int) -> int:
    """Tokens at the job's rate."""
    return round(tokens / GAS_RATE)
