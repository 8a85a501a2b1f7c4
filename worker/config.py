"""The one configuration of a worker process, read once from TOML; unknown keys are refused."""

import dataclasses
import tomllib
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from contracts.client import RpcUrlError, check_rpc_url
from worker.errors import ConfigError

T = TypeVar("T")

RETAIN = ("store", "regenerate")
PRODUCTS = ("mapped", "packed", "widened")


@dataclass(frozen=True)
class Contracts:
    """Addresses of one deployment, 0x-prefixed."""

    token: str
    models: str
    workers: str
    escrow: str
    disputes: str
    demands: str
    referee: str


@dataclass(frozen=True)
class ChainConfig:
    rpc: str  # http(s):// or ws(s)://
    addresses: Contracts
    start_block: int = 0  # events before this block concern nobody here
    poll_seconds: float = 1.0

    def __post_init__(self) -> None:
        try:
            check_rpc_url(self.rpc)
        except RpcUrlError as error:
            raise ConfigError(f"chain.rpc: {error}") from error


@dataclass(frozen=True)
class Policy:
    """What this worker accepts. Prices and rates in base units of the token."""

    min_prompt_price: int = 0
    min_token_price: int = 0
    min_gas_rate: int = 0  # the chain pays this worker's moves in games at the job's rate
    min_share_bps: int = 0
    max_requests: int = 4096
    max_prompt_tokens: int = 4_000_000
    max_output_tokens: int = 1_000_000
    max_window_seconds: int = 7 * 86_400  # these four: for how long a job may hold stake, or a place here
    max_accept_seconds: int = 3600
    max_serving_seconds: int = 7 * 86_400
    max_clock_seconds: int = 86_400  # of clock, and of grace
    max_lock_times: int = 4  # the least lock that the contract takes for such a job
    min_clock_seconds: int = 5
    min_grace_seconds: int = 1
    min_serving_seconds: int = 5  # from acceptance to commitBy
    replaceable: bool = False  # whether we sign moves of jobs to spares: leaving, staying, coming (worker.consent)


@dataclass(frozen=True)
class Bounds:
    """A stage's room for one job: positions of keys and values, and the rows of a microbatch."""

    main: int  # of the device's pool
    buffer: int = 0  # of one microbatch's guests
    host: int = 0  # of all guests; both 0: no guests
    rows: int = 2**20

    def __post_init__(self) -> None:
        least = min(self.main, self.rows)
        if least < 1 or not 0 <= self.buffer <= self.host or (self.host > 0) != (self.buffer > 0):
            came = f"{self.main}, {self.buffer}, {self.host}, {self.rows}"
            raise ValueError(f"expected main and rows >= 1 and 0 < buffer <= host, or no guests; came {came}")


@dataclass(frozen=True)
class Serving:
    device: str = "cpu"
    products: str = "mapped"  # how rows are multiplied by weights, one of PRODUCTS (worker.products)
    threads: int = 0  # of torch; 0 leaves its own choice
    max_jobs: int = 8  # signed for or served at a time: each has a cache and a queue of its own
    max_rows: int = 512  # rows of one microbatch
    microbatches: int = 0  # in flight; 0: as many as fill the ring (worker.pace)
    share_prefixes: bool = True  # what prompts of a job begin with alike is computed once (worker.prefix)
    cache_positions: int = 65_536  # of a job's requests whose keys and values stay on the device
    swap_positions: int = 0  # of one microbatch's requests that live on the host; 0: none do (worker.swap)
    host_positions: int = 0  # of all of these together
    recorder_bytes: int = 256 * 2**20  # of tensors that wait for the recorder before serving waits for it
    retain: str = "store"  # traces; or "regenerate": compute them again when they are asked for (worker.retain)
    regenerate_checked: float = 1.0  # the share of requests whose trace is computed again before it is dropped
    regenerated_bytes: int = 512 * 2**20  # of traces kept after they were computed again
    beat_seconds: float = 1.0  # between two heartbeats to the successor
    silence_seconds: float = 5.0  # without anything of the predecessor, after which the attempt is given up
    slow_seconds: float = 30.0  # that a stage may hold a microbatch, with those before it, until it is computed
    stall_seconds: float = 60.0  # without a token, or with a message that isn't taken, after which it is given up too
    attempts: int = 3
    claim_seconds: float = 5.0  # how long a stage leaves its claim to stage 0 before it posts it alone
    compress: bool = False  # rows to the successor, without loss: for links slower than the stages (worker.packing)
    max_message_bytes: int = 64 * 2**20
    max_body_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        for name in ("max_jobs", "max_rows", "cache_positions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"serving.{name}: expected 1 or more, came {getattr(self, name)}")
        if not 0 <= self.swap_positions <= self.host_positions or (self.swap_positions == 0) != (
            self.host_positions == 0
        ):
            raise ConfigError(
                "serving.swap_positions, serving.host_positions: expected 0 < swap_positions <= host_positions, or "
                f"neither, came {self.swap_positions}, {self.host_positions}"
            )
        if self.products not in PRODUCTS:
            raise ConfigError(f"serving.products: expected one of {', '.join(PRODUCTS)}, came {self.products!r}")
        if self.retain not in RETAIN:
            raise ConfigError(f"serving.retain: expected one of {', '.join(RETAIN)}, came {self.retain!r}")
        if not 0 <= self.regenerate_checked <= 1:
            raise ConfigError(f"serving.regenerate_checked: expected 0 .. 1, came {self.regenerate_checked}")

    @property
    def bounds(self) -> Bounds:
        return Bounds(self.cache_positions, self.swap_positions, self.host_positions, self.max_rows)


@dataclass(frozen=True)
class WorkerConfig:
    """One stage: layers first_layer .. end_layer-1 of the model in `model`, state under `data`."""

    model: Path
    data: Path
    first_layer: int
    end_layer: int
    keystore: Path  # encrypted V3 keystore of the signer, which also sends the transactions
    password_file: Path
    tls_certificate: Path
    tls_key: Path
    http: str  # host:port to listen on
    url: str  # as registered on chain
    grpc: str  # host:port to listen on
    chain: ChainConfig
    grpc_public: str = ""  # host:port that peers dial; `grpc` if empty
    account: str = ""  # the staked account, if it is not the signer itself
    peer_hosts: tuple[str, ...] = ()  # if given, the only hosts whose URLs on chain are ever fetched
    policy: Policy = field(default_factory=Policy)
    serving: Serving = field(default_factory=Serving)

    def __post_init__(self) -> None:
        if not 0 <= self.first_layer < self.end_layer:
            raise ConfigError(
                f"first_layer, end_layer: expected 0 <= first < end, came {self.first_layer}, {self.end_layer}"
            )
        for name in ("http", "grpc"):
            split_address(getattr(self, name), name)


def split_address(address: str, name: str) -> tuple[str, int]:
    """(host, port) of "host:port". Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65_535:
        raise ConfigError(f"{name}: expected host:port, came {address!r}")
    return host, int(port)


def load(path: Path) -> WorkerConfig:
    """Reads `path`; relative paths in it are relative to its folder. Raises ConfigError naming the key."""
    try:
        table = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    return parse(WorkerConfig, table, path.resolve().parent)


def parse(kind: type[T], table: Any, folder: Path, prefix: str = "") -> T:
    """A dataclass of a TOML table; relative paths start at `folder`. Raises ConfigError naming the key."""
    if not isinstance(table, dict):
        raise ConfigError(f"{prefix or 'file'}: expected a table, came {type(table).__name__}")
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            raise ConfigError(f"unknown key {prefix}{key}; known: {', '.join(sorted(fields))}")
    values: dict[str, Any] = {}
    for name, spec in fields.items():
        if name in table:
            values[name] = _value(hints[name], table[name], prefix + name, folder)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise ConfigError(f"missing key {prefix}{name}")
    return kind(**values)


def _value(hint: Any, value: Any, name: str, folder: Path) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return parse(hint, value, folder, name + ".")
    if hint is Path and isinstance(value, str):
        return (folder / value).resolve()
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if get_origin(hint) is tuple and isinstance(value, list) and dataclasses.is_dataclass(part := get_args(hint)[0]):
        return tuple(parse(part, table, folder, f"{name}[{place}].") for place, table in enumerate(value))  # type: ignore[arg-type]
    if get_origin(hint) is tuple and isinstance(value, list) and all(isinstance(v, get_args(hint)[0]) for v in value):
        return tuple(value)
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) and type(value) is hint:
        return value
    raise ConfigError(f"{name}: expected {getattr(hint, '__name__', hint)}, came {value!r}")
