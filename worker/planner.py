"""Which device holds which layers: `plumb plan`, from a file of measured devices and links (docs/operating.md).

A microbatch of `rows` goes round the devices in the file's order. With stage times T, hop times L and M microbatches in
flight the ring makes rows / max(slowest, sum(T + L) / M) tokens a second, where the slowest is a stage or a link that
is busy sending; M microbatches need their keys and values in every stage's memory. Pure.

The search is exact: for each M that memory allows, a dynamic programme over (device, layers placed) finds the shortest
way round whose stages keep to a given time, and that time is bisected over the finitely many that a stage can take.
"""

import math
import tomllib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from worker import config
from worker.errors import ConfigError, Unplannable

MARGIN = 1.25  # microbatches beyond those that just fill the ring: stages and links are never as even as measured

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Model:
    """Bytes are those of the served dtype."""

    layers: int
    layer_bytes: float  # weights of one layer
    cache_bytes: float  # keys and values of one position at one layer
    row_bytes: float  # one row of layer inputs on the wire
    embedding_bytes: float = 0.0  # at the first stage besides
    head_bytes: float = 0.0  # at the last stage besides


@dataclass(frozen=True)
class Load:
    rows: int  # sequences of one microbatch
    positions: int  # that a sequence grows to


@dataclass(frozen=True)
class Device:
    """Times are measured over one microbatch."""

    name: str
    layer_seconds: float
    memory_bytes: float
    head_seconds: float = 0.0  # final norm and output head, where this device is the last


@dataclass(frozen=True)
class Hop:
    """Between any two devices."""

    latency_seconds: float  # one way
    bytes_per_second: float = math.inf


@dataclass(frozen=True)
class Link:
    """Between two devices, one way; where there is none, the measurements' `hop` holds."""

    source: str
    target: str
    latency_seconds: float
    bytes_per_second: float = math.inf


@dataclass(frozen=True)
class Measurements:
    """What `plumb plan` reads. Raises ConfigError for what cannot be meant."""

    model: Model
    load: Load
    hop: Hop
    devices: tuple[Device, ...]
    links: tuple[Link, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.devices:
            raise ConfigError("devices: expected one or more, came none")
        names = [device.name for device in self.devices]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"devices: expected each name once, came {name!r} twice")
        for link in self.links:
            for end in (link.source, link.target):
                if end not in names:
                    raise ConfigError(f"links: expected one of {', '.join(names)}, came {end!r}")
        if len({(link.source, link.target) for link in self.links}) != len(self.links):
            raise ConfigError("links: expected a pair of devices once")
        device_numbers = [(f"devices: {d.name}", d, ("layer_seconds", "memory_bytes")) for d in self.devices]
        for where, part, positive in [
            ("model", self.model, ("layers", "layer_bytes", "row_bytes")),
            ("load", self.load, ("rows", "positions")),
            ("hop", self.hop, ("bytes_per_second",)),
            *device_numbers,
            *((f"links: {link.source} to {link.target}", link, ("bytes_per_second",)) for link in self.links),
        ]:
            for key, value in vars(part).items():
                if isinstance(value, str):
                    continue
                if math.isnan(value) or value < 0 or (key in positive and value == 0):
                    least = "a number above 0" if key in positive else "0 or more"
                    raise ConfigError(f"{where}.{key}: expected {least}, came {value}")
                if math.isinf(value) and key != "bytes_per_second":
                    raise ConfigError(f"{where}.{key}: expected a finite number, came {value}")

    def transfer_seconds(self, source: int, target: int) -> float:
        """How long a microbatch keeps the link busy."""
        return self.load.rows * self.model.row_bytes / self._link(source, target).bytes_per_second

    def latency_seconds(self, source: int, target: int) -> float:
        return self._link(source, target).latency_seconds

    def cache_bytes(self, microbatches: int) -> float:
        """Keys and values at one layer of all sequences in flight."""
        return microbatches * self.load.rows * self.load.positions * self.model.cache_bytes

    def _link(self, source: int, target: int) -> Hop | Link:
        ends = self.devices[source].name, self.devices[target].name
        return next((link for link in self.links if (link.source, link.target) == ends), self.hop)


@dataclass(frozen=True)
class Share:
    """Layers first .. end - 1 on one device; seconds of one microbatch: its stage, and its way to the next stage."""

    device: str
    first_layer: int
    end_layer: int
    stage_seconds: float
    hop_seconds: float


@dataclass(frozen=True)
class Plan:
    """`needed`: microbatches that just fill the ring, ceil(sum(T + L) / slowest); `microbatches`: those to run, with a
    margin where memory has room for it.
    """

    shares: tuple[Share, ...]
    slowest_seconds: float
    round_seconds: float
    needed: int
    microbatches: int
    tokens_per_second: float


def load(path: Path) -> Measurements:
    """Raises ConfigError naming the key."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    return config.parse(Measurements, table, path.resolve().parent)


def plan(measured: Measurements, margin: float = MARGIN) -> Plan:
    """The fastest contiguous assignment in the file's order; devices that would slow it are left out.

    margin: 1 or more, of microbatches over those needed. Raises Unplannable where the devices' memory does not hold
    the model and one microbatch.
    """
    best: Plan | None = None
    most = _useful_microbatches(measured)
    rooms = _rooms(measured, 1)
    for microbatches in range(1, most + 1):
        held, rooms = rooms, _rooms(measured, microbatches + 1)
        if np.array_equal(held, rooms) and microbatches < most:
            continue  # one more in flight in the same memory is never slower
        found = _fastest(measured, held, microbatches)
        if found is None:
            break
        candidate = _described(measured, found.counts, microbatches, margin)
        if best is None or candidate.tokens_per_second > best.tokens_per_second:
            best = candidate
        if found.filled:
            break
    if best is None:
        raise Unplannable(_shortage(measured))
    return best


def text(found: Plan) -> str:
    """A plan for people."""
    wide = max(len(share.device) for share in found.shares)
    lines = [
        f"{share.device:{wide}}  layers {share.first_layer:3} .. {share.end_layer - 1:3}  "
        f"stage {1e3 * share.stage_seconds:9.3f} ms  to the next {1e3 * share.hop_seconds:9.3f} ms"
        for share in found.shares
    ]
    return "\n".join(
        [
            *lines,
            f"slowest {1e3 * found.slowest_seconds:.3f} ms, once round {1e3 * found.round_seconds:.3f} ms",
            f"microbatches {found.microbatches} (the ring is full from {found.needed} on)",
            f"tokens per second {found.tokens_per_second:.1f}",
        ]
    )


@dataclass(frozen=True)
class _Found:
    """Layers by device, 0: left out. filled: no M makes the ring faster, its slowest part is as fast as can be."""

    counts: tuple[int, ...]
    filled: bool


def _useful_microbatches(measured: Measurements) -> int:
    """No assignment needs more: each stage holds one, each hop what a stage makes meanwhile."""
    n = len(measured.devices)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    longest = max((measured.latency_seconds(*ends) + measured.transfer_seconds(*ends) for ends in pairs), default=0.0)
    return n + math.ceil(n * longest / min(device.layer_seconds for device in measured.devices))


def _rooms(measured: Measurements, microbatches: int) -> npt.NDArray[np.int64]:
    """[devices, 2, 2]: how many layers a device's memory holds; indices: whether it is the first, the last."""
    model = measured.model
    each = model.layer_bytes + measured.cache_bytes(microbatches)
    memory = np.array([device.memory_bytes for device in measured.devices])[:, None, None]
    besides = np.add.outer([0.0, model.embedding_bytes], [0.0, model.head_bytes])
    return np.clip(np.floor((memory - besides) / each), 0, model.layers).astype(np.int64)


def _fastest(measured: Measurements, rooms: npt.NDArray[np.int64], microbatches: int) -> _Found | None:
    """Minimises max(slowest, round / microbatches) within `rooms`."""
    devices, layers = measured.devices, measured.model.layers
    stages = {c * d.layer_seconds + head for d in devices for c in range(1, layers + 1) for head in (0, d.head_seconds)}
    n = len(devices)
    links = {measured.transfer_seconds(i, j) for i in range(n) for j in range(i + 1, n)}
    times = sorted(stages | links)
    ways: dict[int, tuple[float, tuple[int, ...]] | None] = {}

    def way(index: int) -> tuple[float, tuple[int, ...]] | None:
        if index not in ways:
            ways[index] = _shortest(measured, rooms, times[index])
        return ways[index]

    def full(index: int) -> bool:
        found = way(index)
        return found is not None and found[0] / microbatches <= times[index]

    indices = range(len(times))
    possible = bisect_left(indices, True, key=lambda index: way(index) is not None)
    if possible == len(times):
        return None
    filled = bisect_left(indices, True, lo=possible, key=full)
    # A longer time allows a shorter way round: the best is where the two cross, on one side or the other.
    beside = [index for index in (filled - 1, filled) if possible <= index < len(times)]
    found = [(max(times[index], taken[0] / microbatches), taken[1]) for index in beside if (taken := way(index))]
    return _Found(min(found)[1], filled == possible)


def _shortest(
    measured: Measurements, rooms: npt.NDArray[np.int64], most_seconds: float
) -> tuple[float, tuple[int, ...]] | None:
    """(seconds once round, layers by device) of the shortest way whose stages and links take no more than `most`."""
    n = len(measured.devices)
    found = [way for first in range(n) if (way := _shortest_from(measured, rooms, most_seconds, first)) is not None]
    return min(found, default=None)


def _shortest_from(
    measured: Measurements, rooms: npt.NDArray[np.int64], most_seconds: float, first: int
) -> tuple[float, tuple[int, ...]] | None:
    """As _shortest, with this device as the first stage."""
    devices, layers = measured.devices, measured.model.layers
    taken = np.arange(layers + 1)
    behind = taken[:, None] - taken  # [layers placed, layers placed before] -> layers on the device itself
    best: tuple[float, tuple[int, ...]] | None = None
    costs: dict[int, Floats] = {}  # device -> [layers placed] seconds up to the end of its stage
    sources: dict[int, npt.NDArray[np.int64]] = {}  # device -> [layers placed before it] the device before it
    origins: dict[int, npt.NDArray[np.int64]] = {}  # device -> [layers placed] those placed before it
    for j in range(first, len(devices)):
        device = devices[j]
        if j == first:
            arrival = np.where(taken == 0, 0.0, np.inf)
            sources[j] = np.zeros(layers + 1, np.int64)
        else:
            ways = np.full((len(devices), layers + 1), np.inf)
            for i, cost in costs.items():
                transfer = measured.transfer_seconds(i, j)
                if transfer <= most_seconds:
                    ways[i] = cost + transfer + measured.latency_seconds(i, j)
            sources[j] = ways.argmin(0)
            arrival = ways.min(0)

        def stage(last: bool, j: int = j, device: Device = device) -> Floats:
            """[layers placed, layers placed before]: seconds of the stage in between, infinite where it can't be."""
            seconds = behind * device.layer_seconds + (device.head_seconds if last else 0.0)
            fits = (behind > 0) & (behind <= rooms[j, int(j == first), int(last)]) & (seconds <= most_seconds)
            return np.where(fits, seconds, np.inf)

        ends = arrival + stage(last=True)[layers]
        before = int(ends.argmin())
        total = float(ends[before]) + (measured.latency_seconds(j, first) if j != first else 0.0)
        if math.isfinite(total) and (best is None or total < best[0]):
            counts = [0] * len(devices)
            at, placed, held = j, layers, before
            counts[at] = placed - held
            while held:
                at, placed = int(sources[at][held]), held
                held = int(origins[at][placed])
                counts[at] = placed - held
            best = total, tuple(counts)
        through = arrival + stage(last=False)
        costs[j] = through.min(1)
        origins[j] = through.argmin(1)
    return best


def _described(measured: Measurements, counts: Sequence[int], microbatches: int, margin: float) -> Plan:
    """What an assignment makes with `microbatches`, and how many more its memory has room for."""
    devices = measured.devices
    used = [i for i, count in enumerate(counts) if count]
    shares, first = [], 0
    for place, i in enumerate(used):
        following = used[(place + 1) % len(used)]
        is_last = place == len(used) - 1
        seconds = counts[i] * devices[i].layer_seconds + (devices[i].head_seconds if is_last else 0.0)
        hop = 0.0 if len(used) == 1 else measured.latency_seconds(i, following)
        hop += 0.0 if is_last else measured.transfer_seconds(i, following)  # the last one's tokens weigh nothing
        shares.append(Share(devices[i].name, first, first + counts[i], seconds, hop))
        first += counts[i]
    links = [measured.transfer_seconds(i, j) for i, j in pairwise(used)]
    slowest = max([share.stage_seconds for share in shares] + links)
    round_seconds = sum(share.stage_seconds + share.hop_seconds for share in shares)
    needed = math.ceil(round_seconds / slowest - 1e-9)
    chosen = microbatches
    if needed <= microbatches:
        chosen = needed
        while chosen < math.ceil(margin * needed) and _fits(measured, counts, chosen + 1):
            chosen += 1
    rate = measured.load.rows / max(slowest, round_seconds / chosen)
    return Plan(tuple(shares), slowest, round_seconds, needed, chosen, rate)


def _fits(measured: Measurements, counts: Sequence[int], microbatches: int) -> bool:
    used = [i for i, count in enumerate(counts) if count]
    rooms = _rooms(measured, microbatches)
    return all(counts[i] <= rooms[i, int(i == used[0]), int(i == used[-1])] for i in used)


def _shortage(measured: Measurements) -> str:
    model, rooms = measured.model, _rooms(measured, 1)
    held = int(rooms[:, 0, 0].sum())
    each = model.layer_bytes + measured.cache_bytes(1)
    return (
        f"expected memory for {model.layers} layers of {each / 1e6:.1f} MB with the cache of one microbatch, "
        f"embedding and head besides; the devices hold {held} layers together"
    )
