"""A local chain: anvil, started and stopped by this process."""

import platform
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO

import httpx

from deploy.keys import DEV_PHRASE

_ROOT = Path(__file__).resolve().parent.parent
_ARCHITECTURES = {"x86_64": "amd64", "AMD64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
_START_SECONDS = 60.0
_STOP_SECONDS = 5.0
_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # never used; without it httpx reads all root certificates each time


class DevnetError(Exception):
    """The local chain is not installed or did not come up; says what it printed."""


def foundry_binary(tool: str) -> Path:
    """The platform's own `anvil` or `forge`.

    Rationale: node_modules/.bin/forge and .bin/anvil are wrappers that exit 0 whatever happens, and killing the wrapper
    orphans the node.
    """
    system = {"Linux": "linux", "Darwin": "darwin"}.get(platform.system())
    architecture = _ARCHITECTURES.get(platform.machine())
    if system is None or architecture is None:
        raise DevnetError(
            f"no {tool} for {platform.system()} {platform.machine()}: expected Linux or macOS on amd64 or arm64"
        )
    path = _ROOT / "node_modules" / "@foundry-rs" / f"{tool}-{system}-{architecture}" / "bin" / tool
    if not path.exists():
        raise DevnetError(f"{tool} is not installed at {path.relative_to(_ROOT)}: run `make setup`")
    return path


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Devnet:
    """`with Devnet() as devnet:

    Chain(devnet.url, ...)`. Ends with its context, and with this process even if that is killed.
    """

    def __init__(
        self,
        block_seconds: int | None = None,
        accounts: int = 20,
        port: int | None = None,
        state: Path | None = None,
        log: Path | None = None,
        gas_limit: int | None = None,
        timestamp: int | None = None,
        code_size_limit: int | None = None,
    ) -> None:
        """block_seconds:

        a block each so often; None: a block a transaction. `state` keeps the chain across runs. Accounts 0.. of
        deploy/keys.py hold ether. code_size_limit: bytes of a contract, EIP-170's by default.
        """
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [
            str(foundry_binary("anvil")),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--accounts", str(accounts), "--mnemonic", DEV_PHRASE),
            *("--hardfork", "prague"),
        ]
        if block_seconds is not None:
            self._command += ["--block-time", str(block_seconds)]
        if state is not None:
            self._command += ["--state", str(state), "--state-interval", "1"]
        if gas_limit is not None:
            self._command += ["--gas-limit", str(gas_limit)]
        if timestamp is not None:
            self._command += ["--timestamp", str(timestamp)]
        if code_size_limit is not None:
            self._command += ["--code-size-limit", str(code_size_limit)]
        self._log_path = log
        self._log: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process_id(self) -> int:
        if self._process is None:
            raise DevnetError("the local chain is not running")
        return self._process.pid

    def start(self) -> "Devnet":
        """Returns when the node answers; raises DevnetError with its output if it does not.

        On Linux the node also ends with the *thread* that started it: start it from one that lasts.
        """
        if self._process is not None:
            raise DevnetError(f"the local chain already runs at {self.url}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                raise DevnetError(f"port {self.port} is taken by another process")
        if self._log_path is not None:
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
            self._log = self._log_path.open("wb")
        self._process = subprocess.Popen(
            _tied_to_parent(self._command),
            stdin=subprocess.DEVNULL,
            stdout=self._log or subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                status = self._process.poll()
                self.stop()
                raise DevnetError(f"anvil did not come up at {self.url} (exit status {status}); output: {self._tail()}")
            time.sleep(0.02)
        return self

    def stop(self) -> None:
        """Ends this object's own process, and nothing else; doing it twice is fine."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGTERM)  # lets it write its state
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._log is not None:
            self._log.close()
            self._log = None

    def kill(self) -> None:
        """SIGKILL: what a power cut would do. `start` brings the chain back if it has a `state`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self.stop()

    def mine(self, blocks: int = 1) -> None:
        self._rpc("anvil_mine", [hex(blocks)])

    def pass_seconds(self, seconds: int) -> None:
        """Moves the chain's clock forward and makes a block there."""
        self._rpc("evm_increaseTime", [seconds])
        self._rpc("anvil_mine", ["0x1"])

    def give_ether(self, account: str, wei: int) -> None:
        """Sets an account's balance."""
        self._rpc("anvil_setBalance", [account, hex(wei)])

    def _answers(self) -> bool:
        try:
            self._rpc("eth_chainId", [])
        except httpx.HTTPError:
            return False
        return True

    def _rpc(self, method: str, parameters: list[object]) -> object:
        request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": parameters}
        answer = (
            httpx.post(self.url, json=request, timeout=10.0, trust_env=False, verify=_NO_TLS).raise_for_status().json()
        )
        if "error" in answer:
            raise DevnetError(f"{method}: {answer['error']}")
        return answer["result"]

    def _tail(self) -> str:
        if self._log_path is None:
            return "not kept (give Devnet a log)"
        return self._log_path.read_text(encoding="utf-8", errors="replace")[-2000:]

    def __enter__(self) -> "Devnet":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _tied_to_parent(command: list[str]) -> list[str]:
    """On Linux the kernel ends the child when this process dies: `setpriv --pdeathsig`, from util-linux.

    Elsewhere a parent that is killed leaves the node running; a parent that ends by itself does not.
    """
    setpriv = shutil.which("setpriv") if sys.platform == "linux" else None
    return [setpriv, "--pdeathsig", "KILL", *command] if setpriv else command
