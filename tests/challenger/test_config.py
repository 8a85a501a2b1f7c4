"""What a configuration file may say."""

from pathlib import Path

import pytest

from challenger.config import ConfigError, load_config

RIGHT = """
rpc_url = "http://127.0.0.1:8545"
addresses = "addresses.json"
keystore = "key.json"
password = "key.password"
models = ["model", "/abs/model"]
data = "data"
"""


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "watch.toml").write_text(RIGHT + "poll_seconds = 2\n")
    config = load_config(tmp_path / "watch.toml")
    assert config.models == (tmp_path / "model", Path("/abs/model"))
    assert config.database_url == f"sqlite:///{tmp_path / 'data' / 'challenger.db'}"
    assert config.poll_seconds == 2 and config.from_block == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (RIGHT + "colour = 1", "unknown keys colour"),
        (
            RIGHT.replace("http://", "ftp://"),
            "rpc_url: expected a URL of a chain, one of http://host, https://host, ws://",
        ),
        (RIGHT.replace("http://", ""), "rpc_url: expected a URL"),
        (RIGHT.replace("127.0.0.1:8545", ""), "rpc_url: expected a URL"),
        (RIGHT.replace("8545", "port"), "rpc_url: expected a URL"),
        ('rpc_url = "x"', "missing keys addresses, keystore"),
        (RIGHT.replace('"data"', "5"), "data: expected str, got 5"),
        (RIGHT + 'from_block = "3"', "from_block: expected int"),
        (RIGHT + "from_block = -1", "from_block: expected at least 0"),
        (RIGHT + "downloads = true", "downloads: expected int"),
        (RIGHT + "downloads = 0", "downloads: expected at least 1"),
        (RIGHT + "poll_seconds = 0", "poll_seconds: expected more than 0"),
        (RIGHT + "poll_seconds = nan", "poll_seconds: expected more than 0"),
        (RIGHT.replace('["model", "/abs/model"]', "[]"), "models: expected"),
        (RIGHT.replace('["model", "/abs/model"]', "[1]"), "models: expected"),
        (RIGHT.replace('["model", "/abs/model"]', '"model"'), "models: expected list"),
        ("]", "cannot read"),
        ("\udcff", "cannot read"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "watch.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=reason):
        load_config(path)


@pytest.mark.parametrize("scheme", ["http", "https", "ws", "wss"])
def test_the_chain_may_be_asked_over_http_or_websocket(tmp_path: Path, scheme: str) -> None:
    (tmp_path / "watch.toml").write_text(RIGHT.replace("http", scheme))
    assert load_config(tmp_path / "watch.toml").rpc_url == f"{scheme}://127.0.0.1:8545"


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.toml")
