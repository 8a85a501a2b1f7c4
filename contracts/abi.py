"""Between Python's frozen dataclasses and ABI bytes: structs, calls, custom errors and logs. Pure.

A struct's fields are matched by name (`firstLayer` <-> `first_layer`), never by place, so a reordered struct fails
loudly.
"""

import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import IntEnum
from functools import cache
from typing import Any

from eth_abi.abi import decode, encode
from eth_abi.exceptions import DecodingError
from eth_utils.address import to_checksum_address
from eth_utils.crypto import keccak

from contracts.build import DEPLOYED, load_abi
from contracts.errors import ChainError

Parameter = Mapping[str, Any]  # one entry of "inputs", "outputs" or "components" in an ABI


def snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", name).lower()


def type_of(parameter: Parameter) -> str:
    """The canonical type, tuples spelled out: `(uint8,bytes32)[]`."""
    kind: str = parameter["type"]
    if kind.startswith("tuple"):
        return "(" + ",".join(type_of(part) for part in parameter["components"]) + ")" + kind[len("tuple") :]
    return kind


def to_abi(parameter: Parameter, value: Any) -> Any:
    """A dataclass (or list of them, or a plain value) as eth_abi wants it. Where bytes are wanted, its own `encode`."""
    kind: str = parameter["type"]
    if kind.endswith("[]"):
        element = {**parameter, "type": kind[:-2]}
        return [to_abi(element, item) for item in value]
    if kind == "tuple":
        return tuple(to_abi(part, getattr(value, snake(part["name"]))) for part in parameter["components"])
    if kind == "address":
        return to_checksum_address(value)
    if kind.startswith("uint") or kind.startswith("int"):
        return int(value)
    if kind == "bytes" and is_dataclass(value):
        return typing.cast(Any, value).encode()
    return value


def from_abi(parameter: Parameter, value: Any, hint: Any) -> Any:
    """The inverse of to_abi; `hint` is the Python type that is wanted."""
    kind: str = parameter["type"]
    if kind.endswith("[]"):
        element = {**parameter, "type": kind[:-2]}
        inner = (typing.get_args(hint) or (Any,))[0]
        return tuple(from_abi(element, item, inner) for item in value)
    if kind == "tuple":
        hints = _hints(hint)
        parts = {
            snake(part["name"]): from_abi(part, item, hints[snake(part["name"])])
            for part, item in zip(parameter["components"], value, strict=True)
        }
        return hint(**parts)
    if kind == "address":
        return to_checksum_address(value)
    if isinstance(hint, type) and issubclass(hint, IntEnum):
        return hint(value)
    if kind == "bytes" and is_dataclass(hint):
        return typing.cast(Any, hint).decode(value)
    return value


@cache
def _hints(cls: Any) -> dict[str, Any]:
    if not is_dataclass(cls):
        raise TypeError(f"expected a dataclass to hold a struct, got {cls!r}")
    return typing.get_type_hints(cls)


@dataclass(frozen=True)
class Function:
    contract: str
    name: str
    selector: bytes
    inputs: tuple[Parameter, ...]
    outputs: tuple[Parameter, ...]

    @property
    def label(self) -> str:
        return f"{self.contract}.{self.name}"

    def encode(self, arguments: Sequence[Any]) -> bytes:
        if len(arguments) != len(self.inputs):
            raise TypeError(f"{self.label}: expected {len(self.inputs)} arguments, got {len(arguments)}")
        values = [to_abi(parameter, value) for parameter, value in zip(self.inputs, arguments, strict=True)]
        return self.selector + encode([type_of(parameter) for parameter in self.inputs], values)

    def decode(self, data: bytes, hints: Sequence[Any]) -> tuple[Any, ...]:
        values = decode([type_of(parameter) for parameter in self.outputs], data)
        return tuple(from_abi(p, v, hint) for p, v, hint in zip(self.outputs, values, hints, strict=True))


@cache
def functions(contract: str) -> dict[str, Function]:
    """By name. The project's contracts have no overloads."""
    found: dict[str, Function] = {}
    for entry in load_abi(contract):
        if entry["type"] != "function":
            continue
        if entry["name"] in found:
            raise TypeError(f"{contract}.{entry['name']} is overloaded")
        found[entry["name"]] = Function(
            contract, entry["name"], keccak(text=signature(entry))[:4], tuple(entry["inputs"]), tuple(entry["outputs"])
        )
    return found


def signature(entry: Mapping[str, Any]) -> str:
    return f"{entry['name']}({','.join(type_of(parameter) for parameter in entry['inputs'])})"


@cache
def struct(name: str) -> Parameter:
    """The ABI shape of a struct of the interfaces, wherever an ABI mentions it."""

    def search(parameters: Sequence[Parameter]) -> Parameter | None:
        for parameter in parameters:
            if parameter.get("internalType", "").removesuffix("[]") == f"struct {name}":
                return {**parameter, "type": "tuple"}
            if found := search(parameter.get("components", ())):
                return found
        return None

    for contract in DEPLOYED:
        for entry in load_abi(contract):
            if found := search([*entry.get("inputs", ()), *entry.get("outputs", ())]):
                return found
    raise LookupError(f"no ABI mentions struct {name}")


def encode_struct(name: str, value: Any) -> bytes:
    """`abi.encode(value)` of Solidity."""
    return encode([type_of(struct(name))], [to_abi(struct(name), value)])


# ---- errors

_BUILT_IN = (
    {"type": "error", "name": "Error", "inputs": [{"name": "message", "type": "string"}]},
    {"type": "error", "name": "Panic", "inputs": [{"name": "code", "type": "uint256"}]},
)


@cache
def _errors() -> dict[bytes, Mapping[str, Any]]:
    table: dict[bytes, Mapping[str, Any]] = {keccak(text=signature(entry))[:4]: entry for entry in _BUILT_IN}
    for contract in DEPLOYED:
        for entry in load_abi(contract):
            if entry["type"] == "error":
                table[keccak(text=signature(entry))[:4]] = entry
    return table


def decode_error(data: bytes, call: str) -> ChainError:
    """Revert data -> ChainError. Data that no ABI explains becomes `Unknown`, never an exception of another type."""
    entry = _errors().get(data[:4])
    if entry is None:
        return ChainError("Unknown", {"data": data}, call)
    try:
        values = decode([type_of(parameter) for parameter in entry["inputs"]], data[4:])
    except DecodingError:
        return ChainError("Unknown", {"data": data}, call)
    named = {
        parameter["name"]: to_checksum_address(value) if parameter["type"] == "address" else value
        for parameter, value in zip(entry["inputs"], values, strict=True)
    }
    return ChainError(entry["name"], named, call)


# ---- events


@cache
def event_topics(contract: str) -> dict[bytes, Mapping[str, Any]]:
    return {keccak(text=signature(entry)): entry for entry in load_abi(contract) if entry["type"] == "event"}


def decode_event(entry: Mapping[str, Any], cls: type[Any], topics: Sequence[bytes], data: bytes, **where: Any) -> Any:
    """A log -> the event's dataclass; `where` fills the fields that say where it happened."""
    indexed = [parameter for parameter in entry["inputs"] if parameter["indexed"]]
    plain = [parameter for parameter in entry["inputs"] if not parameter["indexed"]]
    values = {
        parameter["name"]: decode([type_of(parameter)], topic)[0]
        for parameter, topic in zip(indexed, topics[1:], strict=True)
    }
    decoded = decode([type_of(parameter) for parameter in plain], data)
    values.update({parameter["name"]: value for parameter, value in zip(plain, decoded, strict=True)})
    hints = _hints(typing.cast(Any, cls))
    named = {
        snake(parameter["name"]): from_abi(parameter, values[parameter["name"]], hints[snake(parameter["name"])])
        for parameter in entry["inputs"]
    }
    unknown = {field.name for field in fields(cls)} - named.keys() - where.keys()
    if unknown:
        raise TypeError(f"event {entry['name']} of the ABI lacks {', '.join(sorted(unknown))}")
    return cls(**named, **where)
