"""The JSON that parties exchange over HTTP (docs/protocol.md, "Between parties"), parsed strictly: senders are
strangers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from verifier.commit import Output, Request, TraceNode

_SAMPLING = {"temperature", "top_k", "top_p", "seed"}
_REQUEST_KEYS = {"prompt", "limit", "stops", *_SAMPLING}
_OUTPUT_KEYS = {"start", "count", "code", "tokens"}
_U32, _U64 = 1 << 32, 1 << 64


class WireError(ValueError):
    """JSON of another form than expected; says where and what."""


def request_json(request: Request) -> dict[str, Any]:
    return {**vars(request), "prompt": list(request.prompt), "stops": list(request.stops)}


def parse_requests(body: bytes) -> tuple[Request, ...]:
    """`{"requests": [{"prompt": [ids], "limit": n, ...}]}`; what is left out has its greedy default. Raises
    WireError.
    """
    requests = []
    for place, item in _items(body, "requests", alone=True):
        if not {"prompt", "limit"} <= set(item) <= _REQUEST_KEYS:
            raise WireError(f"{place}: expected prompt, limit and at most {sorted(_REQUEST_KEYS)}")
        prompt, stops = (_numbers(place, key, item.get(key, []), _U32) for key in ("prompt", "stops"))
        limit = _number(place, "limit", item["limit"], _U32)
        others = {key: _number(place, key, item[key], _U64) for key in _SAMPLING & set(item)}
        requests.append(Request(prompt, limit, stops, **others))
    return tuple(requests)


def parse_outputs(body: bytes) -> tuple[Output, ...]:
    """`{"outputs": [{"start", "count", "code", "tokens": [ids]}]}`, lawful or not. Raises WireError."""
    outputs = []
    for place, item in _items(body, "outputs", alone=True):
        if set(item) != _OUTPUT_KEYS:
            raise WireError(f"{place}: expected {sorted(_OUTPUT_KEYS)}, got {sorted(item)}")
        tokens = _numbers(place, "tokens", item["tokens"], _U32)
        start = _number(place, "start", item["start"], _U64)
        count, code = (_number(place, key, item[key], _U32) for key in ("count", "code"))
        outputs.append(Output(start, count, code, tokens))
    return tuple(outputs)


def parse_nodes(body: bytes) -> tuple[TraceNode, ...]:
    """`{"requests": [{"positions", "tensors_root", ...}]}` of a stage's trace. Raises WireError."""
    nodes = []
    for place, item in _items(body, "requests"):
        root = item.get("tensors_root")
        if not isinstance(root, str) or len(root) != 64 or set(root) - set("0123456789abcdef"):
            raise WireError(f"{place}: tensors_root: expected 32 bytes in hex")
        nodes.append(TraceNode(_number(place, "positions", item.get("positions"), _U32), bytes.fromhex(root)))
    return tuple(nodes)


def _items(body: bytes, key: str, alone: bool = False) -> Iterable[tuple[str, dict[str, Any]]]:
    """alone: no other key may stand beside `key`."""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError(f"expected JSON: {error}") from error
    items = parsed.get(key) if isinstance(parsed, dict) else None
    if not isinstance(items, list) or not items or (alone and len(parsed) > 1):
        raise WireError(f'expected {{"{key}": [...]}} with an entry or more{" and nothing else" if alone else ""}')
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise WireError(f"{key}[{index}]: expected an object, got {type(item).__name__}")
        yield f"{key}[{index}]", item


def _number(place: str, key: str, value: Any, end: int) -> int:
    if type(value) is not int or not 0 <= value < end:
        raise WireError(f"{place}: {key}: expected a whole number below {end}")
    return value


def _numbers(place: str, key: str, values: Any, end: int) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise WireError(f"{place}: {key}: expected a list of whole numbers")
    return tuple(_number(place, key, value, end) for value in values)
