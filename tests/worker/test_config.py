"""One file, no unknown keys."""

from pathlib import Path

import pytest

from worker.config import load
from worker.errors import ConfigError

GOOD = """
model = "model"
data = "data"
first_layer = 0
end_layer = 2
keystore = "key.json"
password_file = "key.password"
tls_certificate = "tls.pem"
tls_key = "tls.key"
http = "127.0.0.1:9001"
url = "http://127.0.0.1:9001"
grpc = "127.0.0.1:9101"

[chain]
rpc = "http://127.0.0.1:8545"

[chain.addresses]
token = "0x1"
models = "0x2"
workers = "0x3"
escrow = "0x4"
disputes = "0x5"
demands = "0x7"
referee = "0x6"

[serving]
stall_seconds = 5
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "stage.toml"
    path.write_text(text)
    return path


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    config = load(written(tmp_path, GOOD))
    assert (
        config.model == tmp_path / "model" and config.serving.stall_seconds == 5.0 and config.chain.poll_seconds == 1.0
    )


def test_the_chain_may_be_asked_over_websocket(tmp_path: Path) -> None:
    config = load(written(tmp_path, GOOD.replace("http://127.0.0.1:8545", "wss://node.example/key")))
    assert config.chain.rpc == "wss://node.example/key"


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('data = "data"', 'datta = "data"', "unknown key datta"),
        ("stall_seconds", "stal_seconds", "unknown key serving.stal_seconds"),
        ("end_layer = 2\n", "", "missing key end_layer"),
        ("end_layer = 2", "end_layer = 0", "expected 0 <= first < end"),
        ("end_layer = 2", 'end_layer = "2"', "end_layer: expected int, came '2'"),
        ("127.0.0.1:9101", "127.0.0.1", "grpc: expected host:port"),
        ("stall_seconds = 5", "swap_positions = 64", "0 < swap_positions <= host_positions, or neither, came 64, 0"),
        ("stall_seconds = 5", "host_positions = 64", "0 < swap_positions <= host_positions, or neither, came 0, 64"),
        ("stall_seconds = 5", "swap_positions = 64\nhost_positions = 9", "<= host_positions, or neither, came 64, 9"),
        ("stall_seconds = 5", "cache_positions = 0", "serving.cache_positions: expected 1 or more, came 0"),
        (
            "stall_seconds = 5",
            'products = "folded"',
            "products: expected one of mapped, packed, widened, came 'folded'",
        ),
        ("[chain]", "[chain", "stage.toml"),
        ("http://127.0.0.1:8545", "tcp://127.0.0.1:8545", r"chain\.rpc: expected a URL .* wss://host, got 'tcp:"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        load(written(tmp_path, GOOD.replace(old, new)))
