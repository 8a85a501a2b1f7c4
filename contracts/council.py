"""Several nodes of one chain, asked as one: a node that is down, lags or lies must not lead anybody astray.

What `agreement` nodes say counts: by default more than half of an odd number, half of an even one. Of two nodes one is
thus enough (failover), and of events all that either tells; of three two have to agree. `latest` means the highest
block that so many nodes have reached, and is asked for by its number, so that answers can be compared. Quantities
without a block (fees, nonces, estimates) are the highest that so many nodes reach or exceed. Transactions go to every
node.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from web3.providers.base import JSONBaseProvider
from web3.types import RPCEndpoint, RPCResponse

from contracts.errors import ChainUnreachable, Disagreement
from contracts.providers import open_provider

NODE_SECONDS = 10.0  # a node that has not answered by then has no say in this question
REST_SECONDS = (1.0, 30.0)  # a node that failed is not asked for so long, twice as long each time
_STRAGGLER_SECONDS = 1.0  # what is known already waits no longer for the others

_HEIGHT = "eth_blockNumber"
_SEND = "eth_sendRawTransaction"
_LOGS = "eth_getLogs"
_QUANTITIES = (
    _HEIGHT,
    "eth_gasPrice",
    "eth_maxPriorityFeePerGas",
    "eth_estimateGas",
    "eth_getTransactionCount",
)
_BLOCK_AT = {"eth_call": 1, "eth_getBalance": 1, "eth_getTransactionCount": 1, "eth_getBlockByNumber": 0}
_FOUND = ("eth_getTransactionReceipt", "eth_getTransactionByHash")  # a node that has not heard of it says null
_RECEIPT = ("transactionHash", "blockHash", "status", "gasUsed")
_TRANSACTION = ("hash", "from", "to", "input")
_BLOCK = ("hash", "number", "timestamp", "gasLimit", "baseFeePerGas")
_LOG = ("address", "topics", "data", "blockNumber", "blockHash", "transactionHash", "logIndex")

Ask = Callable[[RPCEndpoint, Any], RPCResponse]


def open_council(urls: Sequence[str], patience_seconds: float, agreement: int = 0) -> Council:
    """Raises RpcUrlError. agreement: 0 for the default."""
    providers = [open_provider(url, 0.0) for url in urls]
    return Council(urls, [provider.make_request for provider in providers], patience_seconds, agreement)


class Council(JSONBaseProvider):
    def __init__(self, urls: Sequence[str], nodes: Sequence[Ask], patience_seconds: float, agreement: int = 0) -> None:
        """nodes: each asks one node once, and raises ChainUnreachable."""
        super().__init__()
        self.urls, self.patience_seconds = tuple(urls), patience_seconds
        self.agreement = agreement or (len(urls) + 1) // 2
        self._nodes = list(nodes)
        self._rests = [(0.0, 0.0)] * len(nodes)  # (monotonic time to wait for, length)
        self._guard = threading.Lock()
        self._pool = ThreadPoolExecutor(8 * len(nodes), "node")

    def make_request(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        """Raises ChainUnreachable, Disagreement."""
        started, attempts, pause = time.monotonic(), 0, 0.1
        while True:
            attempts += 1
            try:
                return self._decide(method, params)
            except _Undecided as error:
                seconds = time.monotonic() - started
                if seconds + pause > self.patience_seconds:
                    kind = Disagreement if error.answers else ChainUnreachable
                    raise kind(", ".join(self.urls), attempts, seconds, str(error)) from error
            time.sleep(pause)
            pause = min(2 * pause, 2.0)

    def _decide(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        params = self._at_agreed_block(method, params)
        if method == _SEND:
            return self._first_success(method, params)
        if method in _QUANTITIES and not _is_pinned(method, params):
            return self._reached(method, params)
        if method == _LOGS and self.agreement == 1:
            return self._all_logs(method, params)
        return self._same(method, params)

    def _at_agreed_block(self, method: str, params: Any) -> Any:
        place = _BLOCK_AT.get(method)
        if place is None or len(params) <= place or params[place] != "latest":
            return params
        height = self._reached(RPCEndpoint(_HEIGHT), [])["result"]
        return [*params[:place], height, *params[place + 1 :]]

    def _first_success(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        """To everybody; one that takes it is enough."""
        answers = self._ask(method, params, lambda _: False)
        if not answers:
            raise _Undecided("no node answers", 0)
        return next((answer for answer in answers if "error" not in answer), answers[0])

    def _reached(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        """The highest number that `agreement` nodes reach or exceed; a refusal if so many refuse."""
        answers = self._ask(method, params, lambda _: False)
        numbers = [(number, answer) for answer in answers if (number := _quantity(answer)) is not None]
        if len(numbers) >= self.agreement:
            numbers.sort(key=lambda pair: pair[0], reverse=True)
            return numbers[self.agreement - 1][1]
        refused = [answer for answer in answers if "error" in answer]
        if len(refused) >= self.agreement:
            return refused[0]
        raise _Undecided(f"{method}: {len(answers)} of {len(self._nodes)} nodes answer", len(answers))

    def _all_logs(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        """What any node tells, where one is enough: the fastest may lag or deny, and what it left out were lost."""
        answers = self._ask(method, params, lambda _: False)
        if not answers:
            raise _Undecided(f"{method}: no node answers", 0)
        told = [answer for answer in answers if isinstance(answer.get("result"), list)]
        logs = {_gist(method, {**answer, "result": [log]}): log for answer in told for log in answer["result"]}
        return {**told[0], "result": list(logs.values())} if told else answers[0]

    def _same(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        """What `agreement` nodes say alike."""

        def settled(answers: list[RPCResponse]) -> bool:
            return _alike(method, answers, self.agreement) is not None

        answers = self._ask(method, params, settled)
        found = _alike(method, answers, self.agreement)
        if found is not None:
            return found
        if method in _FOUND and len(answers) >= self.agreement:
            return next((answer for answer in answers if answer.get("result", 0) is None), answers[0])
        said = len({_gist(method, answer) for answer in answers})
        raise _Undecided(
            f"{method}: expected {self.agreement} nodes that agree, {len(answers)} gave {said} different answers",
            len(answers),
        )

    def _ask(self, method: RPCEndpoint, params: Any, enough: Callable[[list[RPCResponse]], bool]) -> list[RPCResponse]:
        """Answers of the nodes, until they are `enough`."""
        now = time.monotonic()
        with self._guard:
            awake = [i for i, (until, _) in enumerate(self._rests) if until <= now]
            if len(awake) < self.agreement:  # too few otherwise: whoever rests is asked all the same
                awake = list(range(len(self._nodes)))
        asked: dict[Future[RPCResponse], int] = {self._pool.submit(self._nodes[i], method, params): i for i in awake}
        answers: list[RPCResponse] = []
        waiting, end = set(asked), now + NODE_SECONDS
        while waiting and not enough(answers):
            if len(answers) >= self.agreement:
                end = min(end, time.monotonic() + _STRAGGLER_SECONDS)
            done, waiting = wait(waiting, max(0.0, end - time.monotonic()), FIRST_COMPLETED)
            if not done:
                break
            for future in done:
                failure = future.exception()
                if failure is None:
                    answers.append(future.result())
                elif not isinstance(failure, ChainUnreachable):
                    raise failure
                self._rest(asked[future], failure is not None)
        if time.monotonic() >= now + NODE_SECONDS:
            for future in waiting:
                self._rest(asked[future], True)
        return answers

    def _rest(self, node: int, failed: bool) -> None:
        least, most = REST_SECONDS
        with self._guard:
            length = min(max(2 * self._rests[node][1], least), most) if failed else 0.0
            self._rests[node] = (time.monotonic() + length, length)


class _Undecided(Exception):
    """No answer this time. answers: of how many nodes."""

    def __init__(self, reason: str, answers: int) -> None:
        super().__init__(reason)
        self.answers = answers


def _is_pinned(method: str, params: Any) -> bool:
    """Whether the question names a block by its number: its answers must be the same, not merely reach a number."""
    place = _BLOCK_AT.get(method)
    return place is not None and len(params) > place and str(params[place]).startswith("0x")


def _alike(method: str, answers: Sequence[RPCResponse], agreement: int) -> RPCResponse | None:
    """An answer that so many give."""
    groups: dict[str, list[RPCResponse]] = {}
    for answer in answers:
        if method in _FOUND and answer.get("result", 0) is None:
            continue
        groups.setdefault(_gist(method, answer), []).append(answer)
    return next((group[0] for group in groups.values() if len(group) >= agreement), None)


def _gist(method: str, answer: RPCResponse) -> str:
    """What two answers must have in common: clients differ in the fields that they add."""
    if "error" in answer:
        error: Any = answer["error"]
        told = (error.get("code"), error.get("data")) if isinstance(error, dict) else (error,)
        return json.dumps(["error", *told])
    result: Any = answer.get("result")
    if isinstance(result, list):
        return json.dumps([[log.get(name) for name in _LOG] if isinstance(log, dict) else log for log in result])
    if isinstance(result, dict):
        names = dict(zip(_FOUND, (_RECEIPT, _TRANSACTION), strict=True)).get(method, _BLOCK)
        return json.dumps([result.get(name) for name in names])
    return json.dumps(result)


def _quantity(answer: RPCResponse) -> int | None:
    result = answer.get("result")
    try:
        return int(result, 16) if isinstance(result, str) else None
    except ValueError:
        return None
