"""A stage that repeats its own results bit for bit, whatever else is in the microbatch.

Libraries choose how to add up by the shapes they are given. So here every shape follows from a row's position in its
request alone: layers run over ROWS rows, the rest padding, and each row attends alone, over its pages
(worker.paged_attention), be it of a prompt or not. Where that can't be, it attends within a band of PAGE positions -
the others of the band are padding if they are not there - to all positions up to the band's end, those behind it
masked. What is left is that a row's result does not depend on its place among the ROWS and the padding's on the
others': nobody promises that, so worker.retain looks.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from verifier.safetensors_file import Bits
from worker import paged_attention
from worker.batch import Batch, Piece
from worker.cache import PAGE, Cache
from worker.stage import Captured, Forward, Stage, from_bits, to_bits

ROWS = 32  # of every product: as many as decode together on a small machine
BAND = PAGE  # positions that attend together; the cache's pages hold all of a band


@dataclass(frozen=True)
class Bands:
    """Bands that end at one position: their rows in the microbatch, [n, BAND], ROWS where there is none, and the slots
    of all positions up to that end, [n, end].
    """

    rows: torch.Tensor
    slots: torch.Tensor
    seen: torch.Tensor  # [BAND, end]


class BandedForward(Forward):
    """One forward of ROWS rows."""

    bands: list[Bands]

    def plan(self) -> None:
        self.bands, self.pages = [], None
        if self.stage.paged:
            alone = [Piece(p.request, t, 1) for p in self.batch.pieces for t in range(p.first, p.end)]
            self.pages = self.cache.pages_of(alone)
        else:
            self._plan_bands()

    def _plan_bands(self) -> None:
        by_end: dict[int, list[tuple[npt.NDArray[np.int64], int]]] = defaultdict(list)
        for piece, span in self.batch.spans():
            for start in range(piece.first // BAND * BAND, piece.end, BAND):
                rows = np.arange(start, start + BAND) - piece.first + span.start
                rows[(rows < span.start) | (rows >= span.stop)] = ROWS
                by_end[start + BAND].append((rows, piece.request))
        device = self.stage.device
        self.bands = [
            Bands(
                torch.from_numpy(np.stack([rows for rows, _ in held])).to(device),
                torch.cat([self.cache.slots(Piece(request, 0, end)) for _, request in held]),
                torch.ones(BAND, end, dtype=torch.bool, device=device).tril(end - BAND),
            )
            for end, held in sorted(by_end.items())
        ]


class RepeatableStage(Stage):
    """As Stage; slower by what padding costs. `regenerate` computes a request's trace again."""

    forward_class = BandedForward

    def forward(self, hidden: torch.Tensor, batch: Batch, cache: Cache) -> tuple[torch.Tensor, Captured]:
        outs: list[torch.Tensor] = []
        parts: list[Captured] = []
        first = 0
        for tile in _cut(batch):
            rows = nn.functional.pad(hidden[first : first + tile.rows], (0, 0, 0, ROWS - tile.rows))
            out, captured = super().forward(rows, tile, cache)
            outs.append(out[: tile.rows])
            parts.append({key: tensor[: tile.rows] for key, tensor in captured.items()})
            first += tile.rows
        with torch.inference_mode():
            return torch.cat(outs), {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def regenerate(self, inputs: Bits) -> dict[str, Bits]:
        """[positions, hidden], what came of a request to the first own layer -> its trace, by key."""
        _, captured = self.forward(
            from_bits(np.array(inputs), self.dtype), Batch((Piece(0, 0, len(inputs)),)), self.cache()
        )
        return {key: to_bits(tensor) for key, tensor in captured.items()}

    def attend(
        self, context: Forward, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        assert isinstance(context, BandedForward)
        query = self.observe_heads(context, f"{layer}.q", query)
        key = self.observe_heads(context, f"{layer}.k", key)
        value = self.observe_heads(context, f"{layer}.v", value)
        taken, shared = context.batch.rows, self.heads // self.kv_heads
        context.cache.write(
            layer, context.slots, key[0, :, :taken].transpose(0, 1), value[0, :, :taken].transpose(0, 1)
        )
        if context.pages is not None:
            asked = query[0, :, :taken].transpose(0, 1)
            part = paged_attention.attend(asked, *context.cache.pools(layer), context.pages, scale)
            return nn.functional.pad(part, (0, 0, 0, 0, 0, ROWS - taken))[None]
        flat = nn.functional.pad(query[0].transpose(0, 1), (0, 0, 0, 0, 0, 1))  # [ROWS + 1, heads, head size]
        attended = torch.zeros_like(flat)
        for bands in context.bands:
            keys, values = context.cache.read(layer, bands.slots)
            n = len(bands.rows)
            asked = flat[bands.rows].view(n, BAND, self.kv_heads, shared, self.head_size).permute(0, 2, 3, 1, 4)
            # The heads that share keys are rows over the same keys.
            part = nn.functional.scaled_dot_product_attention(
                asked.reshape(n, self.kv_heads, shared * BAND, self.head_size),
                keys,
                values,
                attn_mask=bands.seen.repeat(shared, 1),
                scale=scale,
            )
            part = part.view(n, self.kv_heads, shared, BAND, self.head_size).permute(0, 3, 1, 2, 4)
            attended[bands.rows] = part.reshape(n, BAND, self.heads, self.head_size)
        return attended[None, :ROWS]


def _cut(batch: Batch) -> list[Batch]:
    """Into batches of ROWS rows; the last may have fewer."""
    tiles: list[list[Piece]] = [[]]
    room = ROWS
    for piece in batch.pieces:
        first = piece.first
        while first < piece.end:
            if not room:
                tiles.append([])
                room = ROWS
            count = min(room, piece.end - first)
            tiles[-1].append(Piece(piece.request, first, count))
            first, room = first + count, room - count
    return [Batch(tuple(pieces)) for pieces in tiles]
