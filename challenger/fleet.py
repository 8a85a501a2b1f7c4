"""Audits spread over a Ray cluster: its machines do the units of challenger/units.py, by request and layer.

Every machine needs this program (`pip install .[fleet]`) and the model's folder at the same path. One whose folder is
another model refuses to work; where one is lost the others go on. Units carry the tensors that they judge, and are cut
the same wherever they are done: what is found is the same. Ray trusts its cluster, so the cluster must be one's own.
"""

from __future__ import annotations

import importlib
import logging
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from challenger.config import ConfigError
from challenger.judge import Judge
from challenger.units import Piece, Rows, Seen, Unit, examine

log = logging.getLogger("plumb.challenger.fleet")

LOCAL = "local"  # in place of an address: a cluster on this machine, which ends with this process
CONNECT_SECONDS = 10.0
AHEAD = 2  # units that wait for each hand: it never idles, and little is copied too early


class Hand:
    """One processor of the cluster."""

    def __init__(self, folder: str, model: bytes) -> None:
        """Raises ConfigError for a folder that is another model."""
        torch.set_num_threads(1)
        self._judge = Judge(Path(folder))
        if self._judge.id != model:
            raise ConfigError(f"{folder}: expected model 0x{model.hex()}, this machine has 0x{self._judge.id.hex()}")

    def examine(self, unit: Unit) -> Seen:
        return examine(self._judge.screener, unit)


class Fleet:
    """The hands that judge one model."""

    def __init__(self, judge: Judge, address: str) -> None:
        """address: of the cluster's head ("host:6379", "ray://host:10001", "auto"), or "local". Raises ConfigError."""
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise ConfigError("ray: expected it to be installed: pip install .[fleet]") from error
        self._ray, self._judge = ray, judge
        try:
            if not ray.is_initialized():
                _knock(ray, address)
                where: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {"address": address}
                ray.init(log_to_driver=False, **where)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            raise ConfigError(f"ray: no cluster at {address}: {error}") from error
        count = max(1, int(ray.cluster_resources().get("CPU", 1)))
        hand = ray.remote(Hand)
        self._hands = [hand.remote(str(judge.folder.resolve()), judge.id) for _ in range(count)]

    def work(self, units: Iterator[Unit]) -> Iterable[Seen]:
        """What each unit shows, in any order. A hand that is lost, with its machine or because that has another model,
        is not asked again, and its units are done here. Raises what examining raised.
        """
        running: dict[Any, tuple[Any, Unit]] = {}
        free = [hand for hand in self._hands for _ in range(AHEAD)]
        for unit in units:
            while running and not free:
                yield self._next(running, free)
            if free:
                hand = free.pop()
                running[hand.examine.remote(_portable(unit))] = hand, unit
            else:
                yield examine(self._judge.screener, unit)
        while running:
            yield self._next(running, free)

    def _next(self, running: dict[Any, tuple[Any, Unit]], free: list[Any]) -> Seen:
        done, _ = self._ray.wait(list(running), num_returns=1)
        hand, unit = running.pop(done[0])
        try:
            seen: Seen = self._ray.get(done[0])
        except self._ray.exceptions.RayActorError as error:
            if hand in self._hands:
                self._hands.remove(hand)
                log.error("ray: a hand is lost, %d are left: %s", len(self._hands), error)
            free[:] = [other for other in free if other is not hand]
            return examine(self._judge.screener, unit)
        if hand in self._hands:
            free.append(hand)
        return seen


def _knock(ray: Any, address: str) -> None:
    """Raises OSError where nobody listens at "host:port" or "ray://host:port": Ray would ask for minutes."""
    told = urlsplit(address if "://" in address else f"//{address}")
    if told.hostname is None or told.port is None:
        return  # a word of Ray's
    here = told.hostname in ("localhost", "127.0.0.1", "::1")
    host = ray.util.get_node_ip_address() if here else told.hostname  # where Ray asks then
    socket.create_connection((host, told.port), CONNECT_SECONDS).close()


def _portable(unit: Unit) -> Unit:
    """With tensors in memory instead of mapped files."""

    def rows(held: Rows) -> Rows:
        arrays = {key: np.array(array) for key, array in held.arrays.items()}
        return Rows(arrays, held.first_layer, held.end_layer, held.positions)

    def piece(p: Piece) -> Piece:
        after = (p.after[0], rows(p.after[1])) if p.after else None
        return Piece(p.stage, rows(p.rows), p.r, p.first, p.end, after, p.fed, p.request, p.tokens, p.mlp)

    return Unit(unit.layer, tuple(piece(p) for p in unit.pieces), unit.sketch)
