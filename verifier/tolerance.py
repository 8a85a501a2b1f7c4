"""How far an honest machine's floats may lie from the standard result: the profile that a model's id commits to.

A profile has one cell a judged piece (head or block, by layer and tensor) and the token margin (docs/canonical.md,
"Tolerance profile"). `verifier.calibration` measures one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from verifier.program import Kind, ModelShape, profile_cells, profile_index
from verifier.referee.codec import ProfileCell
from verifier.referee.tree import Tree, leaf

FILE_NAME = "tolerance.json"
FORMAT = "plumb-tolerance-1"
MIN_FLOOR = 1 << 10  # Q30: 1e-6, a thousand times the rounding of the standard result itself
_U32, _U64 = 1 << 32, 1 << 64


class InvalidProfile(ValueError):
    """A profile that is malformed, or not of this model. The message says what was expected and what came."""


@dataclass(frozen=True)
class Profile:
    """All cells in the order of their tree; the last one is the token margin."""

    shape: ModelShape
    cells: tuple[ProfileCell, ...]

    def __post_init__(self) -> None:
        """Raises InvalidProfile."""
        expected = profile_cells(self.shape)
        if len(self.cells) != expected:
            raise InvalidProfile(f"expected {expected} cells, got {len(self.cells)}")
        for index, cell in enumerate(self.cells):
            ok = 0 <= cell.num < _U32 and 0 < cell.den < _U32 and MIN_FLOOR <= cell.floor < _U64
            if not ok:
                raise InvalidProfile(f"expected u32 num, den > 0 and a floor from {MIN_FLOOR}, got {cell} at {index}")
        if (self.cells[-1].num, self.cells[-1].den) != (1, 1):
            raise InvalidProfile(f"expected num = den = 1 in the token margin's cell, got {self.cells[-1]}")

    @property
    def margin(self) -> int:
        """By how much a competitor's logit may exceed the served token's, Q30."""
        return self.cells[-1].floor

    def cell(self, kind: Kind, layer: int, unit: int) -> ProfileCell:
        """The tolerance of one head or block. Raises ValueError for a kind without tolerance."""
        return self.cells[profile_index(self.shape, kind, layer, unit)]

    @cached_property
    def tree(self) -> Tree:
        return Tree([leaf(cell.encode()) for cell in self.cells])

    @property
    def root(self) -> bytes:
        return self.tree.root

    @property
    def leaves(self) -> int:
        return len(self.cells)

    def leaf(self, index: int) -> bytes:
        """The 16 bytes of a cell."""
        return self.cells[index].encode()

    def values(self, index: int) -> tuple[int, int, int]:
        """num, den, floor of a cell."""
        cell = self.cells[index]
        return cell.num, cell.den, cell.floor

    def prove(self, index: int) -> tuple[bytes, ...]:
        """Siblings of a cell."""
        return tuple(self.tree.prove(index))

    def save(self, folder: Path) -> Path:
        """Writes `<folder>/tolerance.json`; returns its path. Raises OSError."""
        path = folder / FILE_NAME
        cells = [[cell.num, cell.den, cell.floor] for cell in self.cells]
        told = {"format": FORMAT, "root": self.root.hex(), "layout": _layout(self.shape), "cells": cells}
        path.write_text(json.dumps(told) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: Path, shape: ModelShape) -> "Profile":
        """Reads what save wrote. Raises OSError, InvalidProfile: none, malformed, of another model, or altered."""
        path = folder / FILE_NAME
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InvalidProfile(f"{path}: there is none: see `plumb model calibrate`") from None
        except ValueError as error:
            raise InvalidProfile(f"{path}: expected JSON, got {error}") from None
        keys = {"format", "root", "layout", "cells"}
        if not isinstance(told, dict) or set(told) != keys:
            raise InvalidProfile(f"{path}: expected the keys {sorted(keys)}, got {_keys(told)}")
        if told["format"] != FORMAT:
            raise InvalidProfile(f"{path}: expected format {FORMAT}, got {told['format']!r}")
        if told["layout"] != _layout(shape):
            raise InvalidProfile(f"{path}: expected a profile of {_layout(shape)}, got {told['layout']}")
        profile = cls(shape, tuple(_cells(path, told["cells"])))
        if profile.root.hex() != told["root"]:
            raise InvalidProfile(f"{path}: expected root {told['root']}, got {profile.root.hex()}")
        return profile


def uniform_profile(shape: ModelShape, num: int, den: int, floor: int, margin: int) -> Profile:
    """The same tolerance everywhere: for trials, before a model is calibrated. floor and margin in Q30."""
    cells = [ProfileCell(num, den, floor)] * (profile_cells(shape) - 1)
    return Profile(shape, (*cells, ProfileCell(1, 1, margin)))


def _layout(shape: ModelShape) -> dict[str, int]:
    """What decides which cell is whose."""
    counts = {"layers": shape.layers, "heads": shape.heads, "kv_heads": shape.kv_heads, "blocks": shape.blocks}
    return counts | {"served_dtype": int(shape.served_dtype)}


def _keys(told: Any) -> object:
    return sorted(told) if isinstance(told, dict) else type(told).__name__


def _cells(path: Path, told: Any) -> Sequence[ProfileCell]:
    if not isinstance(told, list):
        raise InvalidProfile(f"{path}: expected a list of cells, got {type(told).__name__}")
    for index, cell in enumerate(told):
        if not (isinstance(cell, list) and len(cell) == 3 and all(type(value) is int for value in cell)):
            raise InvalidProfile(f"{path}: expected three integers at cell {index}, got {cell!r}")
    return [ProfileCell(*cell) for cell in told]
