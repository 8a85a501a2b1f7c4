"""JSON-RPC over WebSocket: as over HTTP, whatever becomes of the connection."""

import gc
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from web3.types import RPCEndpoint
from websockets.sync.server import Server, ServerConnection, serve

from contracts import providers
from contracts.client import Chain, ChainError, ChainUnreachable, RpcUrlError, check_rpc_url
from contracts.errors import AnswerTooLarge
from contracts.events import WorkerRegistered
from contracts.providers import PatientProvider, PatientSocket, open_provider
from contracts.records import Worker
from contracts.transport import Transport
from deploy.devnet import Devnet, free_port
from deploy.keys import dev_account

Handler = Callable[[ServerConnection], None]


def over_socket(url: str) -> str:
    return url.replace("http://", "ws://")


@contextmanager
def node(handler: Handler, **options: Any) -> Iterator[str]:
    """A WebSocket server that is not a good node."""
    with serve(handler, "127.0.0.1", 0, **options) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{port_of(server)}"
        finally:
            server.shutdown()
            thread.join()


def port_of(server: Server) -> int:
    return int(server.socket.getsockname()[1])


def answer(question: str | bytes, result: Any) -> str:
    return json.dumps({"jsonrpc": "2.0", "id": json.loads(question)["id"], "result": result})


# ---- a real node


def test_everything_works_as_over_http(world: Any) -> None:
    chain = Chain(over_socket(world.devnet.url), world.addresses, dev_account(5), patience_seconds=5)
    assert isinstance(chain.transport.web3.provider, PatientSocket)
    before = chain.token.balance(chain.account)
    first = chain.block_number() + 1
    chain.token.mint(chain.account, 7)
    assert chain.token.balance(chain.account) == before + 7
    chain.workers.register(Worker(chain.account, b"\x01" * 32, "http://127.0.0.1:1"))
    [event] = [event for event in chain.events(first) if isinstance(event, WorkerRegistered)]
    assert event.account == chain.account
    with pytest.raises(ChainError) as poor:
        chain.token.transfer(dev_account(1).address, 10**30)
    assert poor.value.name == "ERC20InsufficientBalance"
    assert chain.token.balance(chain.account) == before + 7  # the same connection serves on after an error


def test_threads_have_a_connection_each_and_few_are_kept(world: Any) -> None:
    chain = Chain(over_socket(world.devnet.url), world.addresses, dev_account(6), patience_seconds=30)
    start = chain.token.balance(chain.account)
    failed: list[Exception] = []

    def mint() -> None:
        try:
            for _ in range(3):
                chain.token.mint(chain.account, 1)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=mint) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert chain.token.balance(chain.account) == start + 24
    provider = chain.transport.web3.provider
    assert isinstance(provider, PatientSocket) and 1 <= len(provider._idle) <= providers.IDLE_CONNECTIONS


def test_a_node_that_restarts_is_found_again(tmp_path: Path) -> None:
    devnet = Devnet(state=tmp_path / "chain.json")
    devnet.start()
    try:
        transport = Transport(over_socket(devnet.url), None, patience_seconds=60)
        devnet.mine(3)
        assert transport.web3.eth.block_number == 3
        devnet.stop()
        with pytest.raises(ChainUnreachable, match=r"no answer from the chain at ws://.* after \d+ attempts") as gone:
            _ = Transport(over_socket(devnet.url), None, patience_seconds=0.5).chain_id
        assert gone.value.attempts >= 2
        answers: list[int] = []
        waiting = threading.Thread(target=lambda: answers.append(transport.web3.eth.block_number))
        waiting.start()  # over the connection that is no more
        devnet.start()
        waiting.join()
        assert answers == [3]
    finally:
        devnet.stop()


# ---- a bad one


def test_a_connection_dropped_in_the_middle_of_a_question_is_replaced() -> None:
    asked: list[str] = []

    def drops(connection: ServerConnection) -> None:
        for question in connection:
            asked.append(str(question))
            if len(asked) in (1, 3, 4):
                connection.socket.shutdown(socket.SHUT_RDWR)
                return
            connection.send(answer(question, "0x2a"))

    with node(drops) as url:
        web3 = Transport(url, None, patience_seconds=20).web3
        assert web3.eth.chain_id == 42
        assert len(asked) == 2
        assert web3.eth.block_number == 42
        assert len(asked) == 5


def test_what_is_no_answer_to_the_question_is_passed_over_or_asked_again() -> None:
    asked: list[str] = []

    def stammers(connection: ServerConnection) -> None:
        for question in connection:
            asked.append(str(question))
            match len(asked):
                case 1:
                    connection.send("<html>")
                case 2:
                    connection.send("[1]")
                case 3:
                    connection.send("[" * 200_000)
                case _:
                    connection.send('{"jsonrpc": "2.0", "method": "eth_subscription", "params": {}}')
                    connection.send('{"jsonrpc": "2.0", "id": 12345, "result": "0x1"}')
                    connection.send(answer(question, "0x2a"))

    with node(stammers) as url:
        assert Transport(url, None, patience_seconds=20).chain_id == 42
    assert len(asked) == 4


def test_an_error_without_an_id_is_the_answer() -> None:
    def refuses(connection: ServerConnection) -> None:
        for _ in connection:
            connection.send('{"jsonrpc": "2.0", "id": null, "error": {"code": -32700, "message": "parse error"}}')

    with node(refuses) as url:
        made = open_provider(url, 5).make_request(RPCEndpoint("eth_chainId"), [])
    assert made["error"] == {"code": -32700, "message": "parse error"}


def test_a_silent_node_is_left_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_ANSWER_SECONDS", 1)
    released = threading.Event()

    def waits(connection: ServerConnection) -> None:
        connection.recv()
        released.wait(20)

    with node(waits) as url:
        with pytest.raises(ChainUnreachable, match="no answer within 1 s"):
            _ = Transport(url, None, patience_seconds=0.5).chain_id
        released.set()


def test_a_node_that_reads_nothing_blocks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The question is larger than what the system buffers on the way."""
    monkeypatch.setattr(providers, "_ANSWER_SECONDS", 1)
    held: list[socket.socket] = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def shakes_hands() -> None:
            from websockets.http11 import Request
            from websockets.server import ServerProtocol

            there, _ = listener.accept()
            protocol = ServerProtocol()
            while not protocol.handshake_exc and protocol.state.name != "OPEN":
                protocol.receive_data(there.recv(65536))
                for event in protocol.events_received():
                    if isinstance(event, Request):
                        protocol.send_response(protocol.accept(event))
                for data in protocol.data_to_send():
                    there.sendall(data)
            held.append(there)

        thread = threading.Thread(target=shakes_hands)
        thread.start()
        url = f"ws://127.0.0.1:{listener.getsockname()[1]}"
        provider = PatientSocket(url, patience_seconds=0.1)
        with pytest.raises(ChainUnreachable, match="after 1 attempts"):
            provider.make_request(RPCEndpoint("eth_sendRawTransaction"), ["0x" + "00" * 2**25])
        thread.join()
        held[0].close()


@pytest.mark.parametrize(
    ("status", "again"), [(HTTPStatus.SERVICE_UNAVAILABLE, True), (HTTPStatus.UNAUTHORIZED, False)]
)
def test_only_a_busy_node_is_asked_to_shake_hands_again(status: HTTPStatus, again: bool) -> None:
    def refuse(connection: ServerConnection, _: Any) -> Any:
        return connection.respond(status, "no\n")

    with node(lambda _: None, process_request=refuse) as url:
        with pytest.raises(ChainUnreachable, match=f"HTTP {int(status)}") as gone:
            _ = Transport(url, None, patience_seconds=2).chain_id
    assert (gone.value.attempts > 1) is again


# ---- answers without end


def test_an_answer_that_is_too_large_is_not_read() -> None:
    asked: list[str] = []

    def floods(connection: ServerConnection) -> None:
        for question in connection:
            asked.append(str(question))
            connection.send(answer(question, "0" * 2000))

    with (
        node(floods) as url,
        pytest.raises(AnswerTooLarge, match="eth_chainId: expected an answer of at most 1000 bytes"),
    ):
        PatientSocket(url, 5, answer_bytes=1000).make_request(RPCEndpoint("eth_chainId"), [])
    assert len(asked) == 1  # it would not get smaller


def test_logs_are_asked_for_in_as_few_blocks_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks fit into an answer, or the node takes ranges of at most two."""
    monkeypatch.setattr(providers, "ANSWER_BYTES", 3000)
    ranges: list[tuple[int, int]] = []

    def logs(most: int) -> Handler:
        def answers(connection: ServerConnection) -> None:
            for question in connection:
                asked = json.loads(question)["params"][0]
                first, last = int(asked["fromBlock"], 16), int(asked["toBlock"], 16)
                ranges.append((first, last))
                if last - first + 1 > most:
                    error = {"code": -32005, "message": "query exceeds max results"}
                    connection.send(json.dumps({"jsonrpc": "2.0", "id": json.loads(question)["id"], "error": error}))
                    continue
                rows = [
                    {"blockNumber": hex(block), "logIndex": "0x0", "data": "0x" + "00" * 400, "topics": []}
                    for block in range(first, last + 1)
                ]
                connection.send(answer(question, rows))

        return answers

    for most, expected in (
        (99, [(0, 9), (0, 4), (0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]),  # 10 and 5 rows are more than 3000 bytes
        (1, [(0, 9), (0, 4), (0, 1), *((block, block) for block in range(10))]),
    ):
        ranges.clear()
        with node(logs(most)) as url:
            transport = Transport(url, None, patience_seconds=5)
            provider = transport.web3.provider
            assert isinstance(provider, PatientSocket)
            provider.answer_bytes = providers.ANSWER_BYTES
            found = list(transport.logs(["0x" + "11" * 20], 0, 9, 10))
        assert [log["blockNumber"] for log in found] == list(range(10))
        assert ranges == expected
    with node(logs(0)) as url, pytest.raises(ChainError, match=r"eth_getLogs: Rpc\(message=.*query exceeds"):
        list(Transport(url, None, patience_seconds=5).logs(["0x" + "11" * 20], 0, 9, 10))


# ---- connections and URLs


def test_connections_end_with_their_transport() -> None:
    gone = threading.Event()

    def answers(connection: ServerConnection) -> None:
        for question in connection:
            connection.send(answer(question, "0x2a"))
        gone.set()

    with node(answers) as url:
        transport = Transport(url, None, patience_seconds=5)
        assert transport.chain_id == 42
        del transport
        for _ in range(100):
            gc.collect()
            if gone.wait(0.1):
                break
        assert gone.is_set()


@pytest.mark.parametrize(
    "url", ["", "localhost:8545", "ftp://host", "ws://", "http://:8545", "ws://host:port", "http://[::1", "file:///x"]
)
def test_other_urls_are_refused_at_once(url: str) -> None:
    with pytest.raises(
        RpcUrlError, match="expected a URL of a chain, one of http://host, https://host, ws://host, wss"
    ):
        Transport(url, None)


def test_the_scheme_chooses_the_road() -> None:
    port = free_port()
    for scheme, kind in (
        ("http", PatientProvider),
        ("https", PatientProvider),
        ("ws", PatientSocket),
        ("WSS", PatientSocket),
    ):
        url = f"{scheme}://127.0.0.1:{port}"
        assert type(open_provider(check_rpc_url(url), 1)) is kind
