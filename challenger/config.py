"""The one frozen configuration of a watchtower process."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from challenger.logs import LOG_FORMATS
from challenger.strategy import parse_strategy
from contracts.client import RpcUrlError, check_rpc_url


class ConfigError(ValueError):
    """A configuration file that cannot be used; says which key and what was expected."""


@dataclass(frozen=True)
class Config:
    """What a watchtower needs to know.

    rpc_url: the chain, http(s):// or ws(s)://; several nodes of it are asked as contracts/council.py says. addresses:
    JSON file of the deployment. keystore, password: V3 keystore and a file with its password. models: folders of the
    models that this watchtower can judge. data: folder for what it downloads. database: SQLAlchemy URL (default: SQLite
    under `data`). poll_seconds: pause between two looks at the chain. from_block: where to start on an empty database.
    max_stage_bytes: most that one stage of one job may hold, for `tokens` at a time; larger ones stay unjudged.
    downloads: jobs that are downloaded at the same time. demand_budget: most that demands for the withheld data of one
    job may cost, in base units of the token; 0: nothing is ever demanded. strategy: what is audited of a job
    (challenger/strategy.py); audit_seconds: what `auto` may spend on one. metrics_port: for Prometheus at metrics_host;
    0: none. log_format: text or json. ray: address of a cluster that audits are spread over.
    """

    rpc_url: str | tuple[str, ...]
    addresses: Path
    keystore: Path
    password: Path
    models: tuple[Path, ...]
    data: Path
    database: str = ""
    poll_seconds: float = 1.0
    from_block: int = 0
    max_stage_bytes: int = 64 * 2**30
    downloads: int = 8
    demand_budget: int = 0
    strategy: str = "full"
    audit_seconds: float = 600.0
    metrics_port: int = 0
    metrics_host: str = "127.0.0.1"
    log_format: str = "text"
    ray: str = ""

    def __post_init__(self) -> None:
        if not self.rpc_urls:
            raise ConfigError("rpc_url: expected one URL or more, got none")
        try:
            for url in self.rpc_urls:
                check_rpc_url(url)
        except RpcUrlError as error:
            raise ConfigError(f"rpc_url: {error}") from error
        try:
            parse_strategy(self.strategy)
        except ValueError as error:
            raise ConfigError(f"strategy: {error}") from error
        if not 0 < self.audit_seconds < float("inf"):
            raise ConfigError(f"audit_seconds: expected more than 0, got {self.audit_seconds}")
        if not 0 <= self.metrics_port < 65536:
            raise ConfigError(f"metrics_port: expected 0 .. 65535, got {self.metrics_port}")
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(f"log_format: expected one of {', '.join(LOG_FORMATS)}, got {self.log_format!r}")
        for name, least in (("from_block", 0), ("max_stage_bytes", 1), ("downloads", 1), ("demand_budget", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not 0 < self.poll_seconds <= 3600:
            raise ConfigError(f"poll_seconds: expected more than 0 and at most 3600, got {self.poll_seconds}")

    @property
    def rpc_urls(self) -> tuple[str, ...]:
        return (self.rpc_url,) if isinstance(self.rpc_url, str) else tuple(self.rpc_url)

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.data / 'challenger.db'}"


_PATHS = ("addresses", "keystore", "password", "data")
_REQUIRED = ("rpc_url", "addresses", "keystore", "password", "models", "data")
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("database", "strategy", "metrics_host", "log_format", "ray", *_PATHS), (str,)),
    **dict.fromkeys(("from_block", "max_stage_bytes", "downloads", "demand_budget", "metrics_port"), (int,)),
    "rpc_url": (list, str),
    "models": (list,),
    **dict.fromkeys(("poll_seconds", "audit_seconds"), (int, float)),
}


def load_config(path: Path) -> Config:
    """Reads a TOML file; relative paths are relative to it.

    Raises ConfigError on a missing, unknown or mistyped key.
    """
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # TOML and Unicode
        raise ConfigError(f"cannot read {path}: {error}") from error
    known = {field.name for field in fields(Config)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"{path}: unknown keys {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    missing = [key for key in _REQUIRED if key not in values]
    if missing:
        raise ConfigError(f"{path}: missing keys {', '.join(missing)}")
    for key, value in values.items():
        if type(value) not in _TYPES[key]:
            raise ConfigError(f"{path}: {key}: expected {_TYPES[key][-1].__name__}, got {value!r}")
    if not values["models"] or not all(isinstance(folder, str) for folder in values["models"]):
        raise ConfigError(f"{path}: models: expected a list of folders, one or more")
    urls = values["rpc_url"]
    if isinstance(urls, list):
        if not all(isinstance(url, str) for url in urls):
            raise ConfigError(f"{path}: rpc_url: expected a URL or a list of URLs")
        values["rpc_url"] = tuple(urls)
    folder = path.resolve().parent
    for key in _PATHS:
        values[key] = folder / values[key]
    values["models"] = tuple(folder / model for model in values["models"])
    return Config(**values)
