"""JSON from strangers: what parses is exactly what was meant, the rest is refused by WireError alone."""

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.wire import WireError, parse_nodes, parse_outputs, parse_requests, request_json
from verifier.commit import Output, Request, TraceNode

IDS = st.lists(st.integers(0, 2**32 - 1), max_size=4).map(tuple)
U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "requests",
                    "outputs",
                    "prompt",
                    "limit",
                    "tokens",
                    "start",
                    "count",
                    "code",
                    "positions",
                    "tensors_root",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.lists(st.builds(Request, IDS, U32, IDS, U64, U64, U64, U64), min_size=1, max_size=3))
def test_requests_come_back(requests: list[Request]) -> None:
    body = json.dumps({"requests": [request_json(request) for request in requests]}).encode()
    assert parse_requests(body) == tuple(requests)


@given(st.lists(st.builds(Output, U64, U32, U32, IDS), min_size=1, max_size=3))
def test_outputs_come_back(outputs: list[Output]) -> None:
    told = [{**vars(output), "tokens": list(output.tokens)} for output in outputs]
    assert parse_outputs(json.dumps({"outputs": told}).encode()) == tuple(outputs)


@given(st.lists(st.builds(TraceNode, U32, st.binary(min_size=32, max_size=32)), min_size=1, max_size=3))
def test_nodes_come_back(nodes: list[TraceNode]) -> None:
    told = [{"positions": node.positions, "tensors_root": node.tensors_root.hex(), "roots": {}} for node in nodes]
    assert parse_nodes(json.dumps({"requests": told}).encode()) == tuple(nodes)


@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_nothing_else_than_wire_error_escapes(body: bytes) -> None:
    parses: tuple[Any, ...] = (parse_requests, parse_outputs, parse_nodes)
    for parse in parses:
        try:
            parse(body)
        except WireError:
            pass


@pytest.mark.parametrize("change", [{"limit": True}, {"limit": 1.0}, {"prompt": [True]}, {"more": 1}, {"seed": -1}])
def test_requests_of_other_types(change: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        parse_requests(json.dumps({"requests": [{"prompt": [1], "limit": 1, **change}]}).encode())


@pytest.mark.parametrize(
    ("parse", "key", "entry"),
    [
        (parse_requests, "requests", {"prompt": [1], "limit": 1}),
        (parse_outputs, "outputs", {"start": 0, "count": 1, "code": 1, "tokens": [1]}),
    ],
)
def test_a_batch_stands_alone_and_holds_something(parse: Any, key: str, entry: dict[str, Any]) -> None:
    assert len(parse(json.dumps({key: [entry]}).encode())) == 1
    bodies: list[Any] = [{key: [entry], "more": 1}, {key: []}, {key: entry}, [entry]]
    for body in bodies:
        with pytest.raises(WireError, match="with an entry or more and nothing else"):
            parse(json.dumps(body).encode())


def test_deep_json_kills_no_process() -> None:
    """eth-account's py_ecc raises Python's recursion limit; contracts/ takes it back."""
    code = (
        "import eth_account, contracts.client\n"
        "from contracts.wire import parse_requests, WireError\n"
        "try: parse_requests(b'[' * 1_000_000)\n"
        "except WireError: print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr
