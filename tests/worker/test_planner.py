"""Plans against brute force, and measurements that cannot be meant."""

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from worker.errors import ConfigError, Unplannable
from worker.planner import Device, Hop, Link, Load, Measurements, Model, load, plan, text

GIVEN = """
[model]
layers = 12
layer_bytes = 1e9
cache_bytes = 4096
row_bytes = 8192

[load]
rows = 8
positions = 1000

[hop]
latency_seconds = 0.02

[[devices]]
name = "slow"
layer_seconds = 0.004
memory_bytes = 24e9

[[devices]]
name = "fast"
layer_seconds = 0.002
memory_bytes = 24e9
"""


def given(*devices: Device, layers: int = 12, links: tuple[Link, ...] = (), **model: float) -> Measurements:
    return Measurements(Model(layers, 1.0, 0.0, 1.0, **model), Load(4, 10), Hop(0.01), devices, links)


def compositions(layers: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (layers,)
        return
    for first in range(layers + 1):
        for rest in compositions(layers - first, parts - 1):
            yield (first, *rest)


def rate(measured: Measurements, counts: tuple[int, ...], microbatches: int) -> float:
    """Tokens a second straight from the formula; 0 where memory does not hold it."""
    model, batch = measured.model, measured.load
    used = [i for i, count in enumerate(counts) if count]
    slowest = total = 0.0
    for place, i in enumerate(used):
        device = measured.devices[i]
        kept = microbatches * batch.rows * batch.positions * model.cache_bytes
        need = counts[i] * (model.layer_bytes + kept)
        need += (model.embedding_bytes if place == 0 else 0) + (model.head_bytes if i == used[-1] else 0)
        if need > device.memory_bytes:
            return 0.0
        stage = counts[i] * device.layer_seconds + (device.head_seconds if i == used[-1] else 0)
        slowest, total = max(slowest, stage), total + stage
        if len(used) > 1:
            names = device.name, measured.devices[used[(place + 1) % len(used)]].name
            ways = [link for link in measured.links if (link.source, link.target) == names]
            hop = ways[0] if ways else measured.hop
            total += hop.latency_seconds
            if i != used[-1]:
                transfer = batch.rows * model.row_bytes / hop.bytes_per_second
                slowest, total = max(slowest, transfer), total + transfer
    return batch.rows / max(slowest, total / microbatches)


def test_within_one_percent_of_brute_force_on_200_random_instances() -> None:
    dice = random.Random(7)
    solved = 0
    for _ in range(200):
        n, layers = dice.randint(1, 4), dice.randint(1, 8)
        devices = tuple(
            Device(f"d{i}", dice.uniform(1, 9), dice.uniform(3, 60), dice.choice([0.0, dice.uniform(0, 5)]))
            for i in range(n)
        )
        links = tuple(
            Link(a.name, b.name, dice.uniform(0, 20), dice.choice([math.inf, dice.uniform(0.2, 9)]))
            for a in devices
            for b in devices
            if a != b and dice.random() < 0.5
        )
        model = Model(layers, dice.uniform(1, 5), dice.choice([0.0, dice.uniform(0, 0.3)]), 1.0, 2.0, 3.0)
        load_ = Load(dice.randint(1, 4), 1)
        measured = Measurements(model, load_, Hop(dice.uniform(0, 30), dice.uniform(0.5, 5)), devices, links)
        best = max(rate(measured, c, m) for c in compositions(layers, n) for m in range(1, 140))
        if best == 0:
            with pytest.raises(Unplannable):
                plan(measured)
            continue
        solved += 1
        found = plan(measured)
        counts = tuple(
            sum(share.end_layer - share.first_layer for share in found.shares if share.device == device.name)
            for device in devices
        )
        assert rate(measured, counts, found.microbatches) == pytest.approx(found.tokens_per_second)
        assert found.tokens_per_second >= 0.99 * best
    assert solved > 100


def test_a_device_twice_as_fast_gets_twice_the_layers() -> None:
    found = plan(given(Device("slow", 0.004, 100.0), Device("fast", 0.002, 100.0)))
    assert [(share.first_layer, share.end_layer) for share in found.shares] == [(0, 4), (4, 12)]


def test_the_ring_is_filled_with_a_margin() -> None:
    """Two stages of 24 ms, two hops of 10 ms: 68 / 24 round up to 3, half as many again to 5."""
    found = plan(given(Device("a", 0.004, 100.0), Device("b", 0.004, 100.0)), margin=1.5)
    assert (found.needed, found.microbatches) == (3, 5)
    assert found.tokens_per_second == pytest.approx(4 / 0.024)


def test_memory_bounds_a_stage_and_the_microbatches() -> None:
    small = given(Device("a", 0.001, 3.5), Device("b", 0.009, 100.0), layers=5)
    assert [share.end_layer - share.first_layer for share in plan(small).shares] == [3, 2]
    model = replace(small.model, cache_bytes=0.01)  # 0.4 a layer and microbatch
    cached = replace(small, model=model, devices=(Device("a", 0.004, 5.5), Device("b", 0.004, 5.5)), hop=Hop(0.5))
    found = plan(cached)
    assert found.needed > found.microbatches == 2
    with pytest.raises(Unplannable, match=r"expected memory for 5 layers .* the devices hold 4 layers together"):
        plan(replace(cached, devices=(Device("a", 0.004, 4.3), Device("b", 0.004, 2.0))))


def test_the_head_weighs_on_the_last_stage() -> None:
    found = plan(given(Device("a", 0.01, 100.0), Device("b", 0.01, 100.0, head_seconds=0.04), layers=8))
    assert [share.end_layer - share.first_layer for share in found.shares] == [6, 2]


def test_a_file_is_planned(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(GIVEN)
    shown = text(plan(load(path)))
    assert "slow  layers   0 ..   3" in shown
    assert "fast  layers   4 ..  11" in shown


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("layers = 12", "layers = 0", r"model\.layers: expected a number above 0, came 0"),
        ("layers = 12", 'layers = "all"', r"model\.layers: expected int, came 'all'"),
        ("layer_seconds = 0.002", "layer_seconds = -1.0", r"devices: fast\.layer_seconds: expected .* came -1.0"),
        ("layer_seconds = 0.002", "layer_seconds = nan", r"devices: fast\.layer_seconds: .* came nan"),
        ("layer_seconds = 0.002", "", r"missing key devices\[1\]\.layer_seconds"),
        ("memory_bytes = 24e9", "memory_bytes = inf", r"devices: slow\.memory_bytes: expected a finite number"),
        ('name = "fast"', 'name = "slow"', r"expected each name once, came 'slow' twice"),
        ("rows = 8", "rows = 8\nspeed = 1", r"unknown key load\.speed"),
        ("latency_seconds = 0.02", "latency_seconds = -0.1", r"hop\.latency_seconds: expected 0 or more"),
        ("[model]", "[model", "devices.toml: "),
        ("[hop]", '[[links]]\nsource = "a"\ntarget = "fast"\nlatency_seconds = 1\n[hop]', "expected one of slow, fast"),
    ],
)
def test_measurements_that_cannot_be_meant_are_refused(tmp_path: Path, old: str, new: str, what: str) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(GIVEN.replace(old, new))
    with pytest.raises(ConfigError, match=what):
        load(path)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.toml")
