"""The Solidity referee on a real EVM: compiled through contracts/solc, deployed on anvil, called in batches."""

import json
import os
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

import httpx
from eth_abi.abi import decode, encode
from eth_utils.crypto import keccak

from contracts.build import ROOT, settings, sources

_REFEREE = "contracts/src/referee"
_HARNESS = "tests/contracts/referee/Harness.sol"
_PANIC = bytes.fromhex("4e487b71")  # Panic(uint256): a division by zero, from a program that is none
_DEPLOY_SECONDS = 120.0
_BATCH = 200  # calls a request: small enough for anvil's limit on a request's bytes at the widest arguments


@dataclass(frozen=True)
class Refusal:
    """A revert, by the name of its custom error."""

    name: str


Answer: TypeAlias = Any  # a decoded value, a tuple of them where the function returns several, or a Refusal


@dataclass(frozen=True)
class Code:
    """A compiled contract."""

    bytecode: str
    abi: list[dict[str, Any]]


def compiled(changes: Mapping[str, str] | None = None) -> dict[str, Code]:
    """Referee and Harness, by name. changes: source path -> text that stands in for the file's."""
    profile = tomllib.loads((ROOT / "foundry.toml").read_text(encoding="utf-8"))
    texts = sources(profile, first=(f"{_REFEREE}/Referee.sol", _HARNESS)) | dict(changes or {})
    chosen = settings(profile) | {"outputSelection": {"*": {"*": ["abi", "evm.bytecode.object"]}}}
    request = {"language": "Solidity", "sources": {k: {"content": v} for k, v in texts.items()}, "settings": chosen}
    output = _kept(request)
    out = {}
    for path in (f"{_REFEREE}/Referee.sol", _HARNESS):
        name = Path(path).stem
        contract = output["contracts"][path][name]
        out[name] = Code(contract["evm"]["bytecode"]["object"], contract["abi"])
    return out


def _kept(request: dict[str, Any]) -> dict[str, Any]:
    """The compiler's answer; what was asked before is read from build/twin."""
    text = json.dumps(request, sort_keys=True)
    kept = ROOT / "build" / "twin" / f"{sha256(text.encode()).hexdigest()}.json"
    if kept.exists():
        before: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return before
    folder = ROOT / ".solcx"
    folder.mkdir(exist_ok=True)
    link = folder / "solc-v0.8.37"
    if not link.exists():
        link.symlink_to(os.path.relpath(ROOT / "contracts" / "solc", folder))
    # py-solc-x reads the variable when it is imported.
    os.environ["SOLCX_BINARY_PATH"] = str(folder)
    import solcx

    output: dict[str, Any] = solcx.compile_standard(request, solc_binary=Path(link))
    kept.parent.mkdir(parents=True, exist_ok=True)
    fresh = kept.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(output), encoding="utf-8")
    fresh.replace(kept)
    return output


class Contract:
    """A deployed contract that is only ever called, never sent to."""

    def __init__(self, evm: "Evm", address: str, abi: list[dict[str, Any]]) -> None:
        self._evm, self._address = evm, address
        self._functions = {entry["name"]: entry for entry in abi if entry["type"] == "function"}
        self._errors = {_selector(entry): entry["name"] for entry in abi if entry["type"] == "error"}

    def call(self, name: str, *args: Any) -> Answer:
        """One call."""
        return self.calls(name, [args])[0]

    def calls(self, name: str, many: Iterable[Sequence[Any]]) -> list[Answer]:
        """The same function with many lists of arguments, in one request a batch."""
        entry = self._functions[name]
        takes, gives = ([_type(p) for p in entry[key]] for key in ("inputs", "outputs"))
        datas = ["0x" + (_selector(entry) + encode(takes, args)).hex() for args in many]
        raw = self._evm.call_many(self._address, datas)
        return [self._answer(gives, done, data) for done, data in raw]

    def _answer(self, gives: list[str], done: bool, data: bytes) -> Answer:
        if done:
            values = decode(gives, data)
            return values[0] if len(values) == 1 else values
        if data[:4] == _PANIC:
            return Refusal("Panic")
        if data[:4] in self._errors:
            return Refusal(self._errors[data[:4]])
        raise AssertionError(
            f"expected a value or one of {sorted(self._errors.values())}, got revert data {data.hex()}"
        )


class Evm:
    """An anvil node behind its URL."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=120.0, trust_env=False)
        self._sender = self._rpc("eth_accounts")[0]

    def close(self) -> None:
        self._http.close()

    def deploy(self, code: Code) -> Contract:
        """A contract without constructor arguments."""
        transaction = {"from": self._sender, "data": "0x" + code.bytecode, "gas": hex(20_000_000)}
        sent = self._rpc("eth_sendTransaction", transaction)
        deadline = time.monotonic() + _DEPLOY_SECONDS
        while (receipt := self._rpc("eth_getTransactionReceipt", sent)) is None:
            assert time.monotonic() < deadline, "the node made no block"
            time.sleep(0.01)
        assert receipt["status"] == "0x1", f"expected a deployment, got {receipt}"
        return Contract(self, receipt["contractAddress"], code.abi)

    def call_many(self, address: str, datas: Sequence[str]) -> list[tuple[bool, bytes]]:
        """(whether it returned, what it returned or reverted with) of each call."""
        out: list[tuple[bool, bytes]] = []
        for start in range(0, len(datas), _BATCH):
            requests = [
                {"jsonrpc": "2.0", "id": i, "method": "eth_call", "params": [{"to": address, "data": data}, "latest"]}
                for i, data in enumerate(datas[start : start + _BATCH])
            ]
            answers = self._http.post("/", json=requests).raise_for_status().json()
            for answer in sorted(answers, key=lambda each: int(each["id"])):
                if "result" in answer:
                    out.append((True, bytes.fromhex(answer["result"][2:])))
                elif isinstance(answer["error"].get("data"), str):
                    out.append((False, bytes.fromhex(answer["error"]["data"][2:])))
                else:
                    raise AssertionError(f"expected a result or revert data, got {answer}")
        return out

    def _rpc(self, method: str, *params: Any) -> Any:
        request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": list(params)}
        answer = self._http.post("/", json=request).raise_for_status().json()
        assert "result" in answer, f"{method}: {answer}"
        return answer["result"]


def _type(parameter: dict[str, Any]) -> str:
    """The canonical type of an ABI parameter, tuples spelt out."""
    kind: str = parameter["type"]
    if not kind.startswith("tuple"):
        return kind
    inner = ",".join(_type(part) for part in parameter["components"])
    return f"({inner}){kind.removeprefix('tuple')}"


def _selector(entry: dict[str, Any]) -> bytes:
    return keccak(text=f"{entry['name']}({','.join(_type(p) for p in entry['inputs'])})")[:4]
