"""JSON-RPC to one node, asked patiently: over HTTP, or over WebSocket.

Both ask again, with growing pauses, until their patience is over; then ChainUnreachable. Answers of the node, errors
included, are never retried. SAFETY: a repeated eth_sendRawTransaction carries the same signed bytes, so it can't act
twice; Transport.send looks its hash up when the node calls it known.
"""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import requests
from web3 import HTTPProvider
from web3.providers.base import JSONBaseProvider
from web3.types import RPCEndpoint, RPCResponse
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.frames import CloseCode
from websockets.protocol import State
from websockets.sync.client import ClientConnection, connect

from contracts.errors import AnswerTooLarge, ChainUnreachable, RpcUrlError

SCHEMES = ("http", "https", "ws", "wss")
ANSWER_BYTES = 64 * 2**20  # the logs of one full block are at most a quarter of this; Transport.logs asks for less then
IDLE_CONNECTIONS = 4  # WebSocket connections kept between questions; each costs two threads

_BUSY = (429, 500, 502, 503, 504)  # HTTP answers that mean "later", not "no"
_FIRST_WAIT_SECONDS = 0.1
_LONGEST_WAIT_SECONDS = 5.0
_ANSWER_SECONDS = 30
_OPEN_SECONDS = 10.0
_CLOSE_SECONDS = 1.0


class _Later(Exception):
    """No answer this time; says why."""


class _Never(Exception):
    """There will be no answer at this URL; says why."""


def check_rpc_url(url: str) -> str:
    """The URL itself. Raises RpcUrlError unless it is one that a provider can be opened for."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port or an address that is none
        usable = False
    if not usable:
        raise RpcUrlError(url, SCHEMES)
    return url


def open_provider(url: str, patience_seconds: float) -> JSONBaseProvider:
    """The provider for the URL's scheme; nothing is sent yet. Raises RpcUrlError."""
    over_socket = urlsplit(check_rpc_url(url)).scheme in ("ws", "wss")
    return PatientSocket(url, patience_seconds) if over_socket else PatientProvider(url, patience_seconds)


def _patiently(url: str, patience_seconds: float, ask: Callable[[], RPCResponse]) -> RPCResponse:
    """What `ask` answers, which raises _Later or _Never if it doesn't. Raises ChainUnreachable."""
    started = time.monotonic()
    wait = _FIRST_WAIT_SECONDS
    attempts = 0
    while True:
        attempts += 1
        try:
            answer = ask()
            if isinstance(answer, dict):
                return answer
            reason = f"expected a JSON-RPC answer, got {type(answer).__name__}"
        except _Never as error:
            raise ChainUnreachable(url, attempts, time.monotonic() - started, str(error)) from error
        except _Later as error:
            reason = str(error)
        elapsed = time.monotonic() - started
        if elapsed + wait > patience_seconds:
            raise ChainUnreachable(url, attempts, elapsed, reason)
        time.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT_SECONDS)


class PatientProvider(HTTPProvider):
    """Over HTTP."""

    def __init__(self, url: str, patience_seconds: float) -> None:
        super().__init__(url, request_kwargs={"timeout": _ANSWER_SECONDS}, exception_retry_configuration=None)
        self.url = url
        self.patience_seconds = patience_seconds

    def make_request(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        return _patiently(self.url, self.patience_seconds, lambda: self._ask(method, params))

    def _ask(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        try:
            return super().make_request(method, params)
        except requests.HTTPError as error:
            if error.response is None or error.response.status_code not in _BUSY:
                raise _Never(str(error)) from error
            raise _Later(f"HTTP {error.response.status_code}") from error
        # ValueError: an answer that is no JSON; RecursionError: one that is nested too deep
        except (requests.ConnectionError, requests.Timeout, ValueError, RecursionError) as error:
            raise _Later(_short(error)) from error


class PatientSocket(JSONBaseProvider):
    """Over WebSocket, for any number of threads: each question has a connection for itself until it is answered.

    A connection that was dropped, or that fails a question, is replaced; one that is silent is dropped by keepalive.
    """

    def __init__(self, url: str, patience_seconds: float, answer_bytes: int = ANSWER_BYTES) -> None:
        """answer_bytes: most that one answer may hold; more raises AnswerTooLarge."""
        super().__init__()
        self.url = url
        self.patience_seconds = patience_seconds
        self.answer_bytes = answer_bytes
        self._guard = threading.Lock()
        self._idle: list[ClientConnection] = []

    def close(self) -> None:
        """Ends the connections that wait for a question; the next question opens one again."""
        with self._guard:
            idle, self._idle = self._idle, []
        _close(idle)

    def make_request(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        return _patiently(self.url, self.patience_seconds, lambda: self._ask(method, params))

    def _ask(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        question = self.encode_rpc_request(method, params)
        id = self.decode_rpc_response(question)["id"]
        connection = self._take()
        try:
            connection.send(question, text=True)
            answer = self._answer_to(id, connection)
        except BaseException as error:
            self._drop(connection)
            if isinstance(error, ConnectionClosed) and error.sent and error.sent.code == CloseCode.MESSAGE_TOO_BIG:
                raise AnswerTooLarge(method, self.answer_bytes) from error
            if isinstance(error, ConnectionClosed) and error.rcvd and error.rcvd.code == CloseCode.MESSAGE_TOO_BIG:
                raise _Never(f"{method}: the node refuses a question of {len(question)} bytes") from error
            if isinstance(error, TimeoutError):
                raise _Later(f"no answer within {_ANSWER_SECONDS} s") from error
            if isinstance(error, WebSocketException | OSError | ValueError | RecursionError):
                raise _Later(_short(error)) from error
            raise
        self._keep(connection)
        return answer

    def _answer_to(self, id: object, connection: ClientConnection) -> RPCResponse:
        """Raises TimeoutError, ConnectionClosed, ValueError for what is no JSON."""
        deadline = time.monotonic() + _ANSWER_SECONDS
        while True:
            answer = self.decode_rpc_response(connection.recv(deadline - time.monotonic(), decode=False))
            # An error without an id is about a question that the node could not read, and only ours is open here.
            if not isinstance(answer, dict) or answer.get("id") == id:
                return answer
            if "error" in answer and answer.get("id") is None:
                return answer

    def _take(self) -> ClientConnection:
        """A connection that nobody else uses. Raises _Later, _Never."""
        while True:
            with self._guard:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return self._open()
            if connection.state is State.OPEN:
                return connection
            _close([connection])

    def _open(self) -> ClientConnection:
        try:
            connection = connect(
                self.url,
                legacy=True,
                max_size=self.answer_bytes,
                open_timeout=_OPEN_SECONDS,
                close_timeout=_CLOSE_SECONDS,
            )
        except InvalidStatus as error:
            reason = f"HTTP {error.response.status_code}"
            raise (_Later if error.response.status_code in _BUSY else _Never)(reason) from error
        except InvalidURI as error:
            raise _Never(str(error)) from error
        except (WebSocketException, OSError, EOFError, ValueError) as error:
            raise _Later(_short(error)) from error
        # SAFETY: a node that reads no more blocks `send` inside the connection's lock, where neither keepalive nor
        # close can reach it.
        timeout = struct.pack("ll", _ANSWER_SECONDS, 0)
        with contextlib.suppress(OSError):  # it may be closed already
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        return connection

    def _keep(self, connection: ClientConnection) -> None:
        with self._guard:
            if len(self._idle) < IDLE_CONNECTIONS:
                self._idle.append(connection)
                return
        _close([connection])

    def _drop(self, connection: ClientConnection) -> None:
        """The idle ones too: what broke one breaks the others, and each would cost a question its patience."""
        _close([connection])
        self.close()


def _close(connections: list[ClientConnection]) -> None:
    while connections:
        with contextlib.suppress(WebSocketException, OSError):
            connections.pop().close()


def _short(error: BaseException) -> str:
    """The innermost reason: requests wraps urllib3 wraps the system's."""
    inner = error.args[0] if error.args else error
    reason = getattr(inner, "reason", inner)
    return f"{type(error).__name__}: {reason}"
