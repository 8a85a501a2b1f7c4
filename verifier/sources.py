"""What a canonical case reads: the tensors that were served, the weights, the profile and the place that is judged.

Protocols, so that a worker's own trace and one that a challenger downloads piece by piece are judged by the same code.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from verifier.linear import Bits
from verifier.program import Program, WeightLayout
from verifier.referee.codec import Opening


class ServedTensors(Protocol):
    """One request's tensors at one stage: a verifier.trace.RequestTrace, or one that downloads what is asked for."""

    @property
    def positions(self) -> int: ...
    @property
    def first_layer(self) -> int: ...
    @property
    def end_layer(self) -> int: ...
    @property
    def tensors_root(self) -> bytes: ...
    @property
    def arrays(self) -> Mapping[str, Bits]:
        """Raw bits [positions, width] by "<layer>.<tensor>", and "out"."""
        ...

    def open_row(self, key: str, position: int, first_col: int, end_col: int) -> Opening: ...
    def open_column(self, key: str, first_position: int, end_position: int, col: int) -> Opening: ...


class ModelWeights(Protocol):
    """What a Case reads of verifier.weights.Weights."""

    @property
    def program(self) -> Program: ...
    @property
    def layout(self) -> WeightLayout: ...
    def raw(self, name: str) -> Bits: ...
    def leaf(self, index: int) -> bytes: ...
    def prove(self, first: int, n: int) -> Sequence[bytes]: ...


class ProfileCells(Protocol):
    """What a Case reads of verifier.tolerance.Profile."""

    def leaf(self, index: int) -> bytes: ...
    def values(self, index: int) -> tuple[int, int, int]: ...
    def prove(self, index: int) -> Sequence[bytes]: ...


class Judged(Protocol):
    """The part of verifier.game.Segment that a Case needs."""

    @property
    def kind(self) -> int: ...
    @property
    def layer(self) -> int: ...
    @property
    def position(self) -> int: ...
    @property
    def unit(self) -> int: ...
