"""Screening a product without computing it: its distance from what was served, seen in a few random directions.

A matrix of the model turns rows X into D = X W^T, of which a worker served S. Whoever knows X and S can compare D R and
S R for a random R with few columns, and D R = X (W^T R) costs a product with few columns (Freivalds 1977). R is drawn
after the commitment, in secret, so nobody could have fitted S to it; one R a head or block, as the law judges these.

With k directions of independent normal numbers, the squared distance that is seen is the true one times
chi-square_k / k, whatever the error looks like. So a piece at rho times its tolerance is passed over with probability
P(chi-square_k < k (DOUBT / rho)^2): with the constants below 0.087 at 1, 0.0095 at 1.25, 0.0011 at 1.5, 0.000024 at 2.
What is not passed over is computed in full. (Sizes are taken from S in place of D, which hides no more of the ratio
than the tolerance, 0.05 at most: |S| <= |D| + |S - D|.)
"""

from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import numpy.typing as npt
import torch

from verifier.linear import Bits
from verifier.program import Kind
from verifier.referee.floats import WEIGHT_LIMIT_BITS
from verifier.reference import Reference, values

Squares = npt.NDArray[np.float64]

DIRECTIONS = 16
# Half as many would cost a fifth less of what is not the MLP's, and doubt five times as many honest pieces.
DOUBT = 0.75


@dataclass(frozen=True)
class Sketch:
    """seed: secret until the audit is over, and younger than the commitment that is audited."""

    seed: bytes

    def directions(self, kind: Kind, layer: int, columns: int, precision: torch.dtype) -> torch.Tensor:
        """R of a kind's heads or blocks at a layer: [columns, DIRECTIONS]."""
        drawn = sha256(self.seed + bytes([int(kind)]) + layer.to_bytes(4, "big")).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(drawn[:8], "big"))
        return torch.randn((columns, DIRECTIONS), generator=generator, dtype=torch.float64).to(precision)


def pressed(reference: Reference, name: str, directions: torch.Tensor) -> torch.Tensor:
    """W^T R of a tensor's heads or blocks, one beneath the other: [units * DIRECTIONS, n]."""
    bits, columns = reference.weights.raw(name), len(directions)
    dtype, parts = reference.shape.weight_dtype, []
    for first in range(0, len(bits), columns):
        tile: Bits = bits[first : first + columns]
        parts.append(directions[: len(tile)].T @ values(tile, dtype, WEIGHT_LIMIT_BITS, directions.dtype))
    return torch.cat(parts)


def seen_distances(made: torch.Tensor, served: torch.Tensor, directions: torch.Tensor) -> Squares:
    """The squared distance of each head or block, as the directions show it: [T, units].

    made: X (W^T R), [T, units * DIRECTIONS]; served: [T, width], RoPE undone. Overwrites `made`.
    """
    columns = len(directions)
    for unit, first in enumerate(range(0, served.shape[1], columns)):
        part = served[:, first : first + columns]
        made[:, unit * DIRECTIONS : (unit + 1) * DIRECTIONS].addmm_(part, directions[: part.shape[1]], alpha=-1.0)
    seen = torch.linalg.vector_norm(made.reshape(len(made), -1, DIRECTIONS), dim=2).double()
    squares: Squares = seen.square_().div_(DIRECTIONS).numpy()
    return squares
