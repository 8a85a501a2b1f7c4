"""One layer of a model at its real size: random bfloat16 weights and served tensors, and the real trees above them.

What the judged segment reads is written to one safetensors file, tile by tile, and read back memory-mapped. All other
leaves of the weights tree, and all other tensors of the trace, are hashes of nothing: every proof has the length that
it has in the whole model.
"""

import json
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from verifier.program import Kind, ModelShape, Program, TensorPlace, WeightLayout, build_program, shape_from_config
from verifier.referee.codec import BLOCK, Source, Tensor
from verifier.referee.tree import nodes_at
from verifier.safetensors_file import Bits, SafetensorsFile
from verifier.sha256 import HASH_BYTES, climb, prove_range, row_leaf_hashes
from verifier.trace import RequestTrace, tensor_key, tensor_keys, tensor_width

COMMON = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "tie_word_embeddings": False}
LLAMA_3 = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-3-8b": {
        **COMMON,
        **LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3-70b": {
        **COMMON,
        **LLAMA_3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    # As deploy/demo/train.py makes it.
    "demo": {
        **COMMON,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "max_position_embeddings": 16384,
    },
}
STAGES = 2  # of the pipeline: a stage of few layers would make the proofs of its tensors shorter
_TILE_BYTES = 8 << 20
_WHOLE_LEVEL = 8  # subtrees of this height that lie in one tensor are hashed in one go
_WEIGHT_EXPONENT, _SERVED_EXPONENT = 118, 125  # bfloat16: magnitudes from 2^-9 to 2^-5, and from 1/4 to 4


def shape_named(name: str) -> ModelShape:
    """One of SHAPES. Raises ValueError."""
    if name not in SHAPES:
        raise ValueError(f"expected a shape of {', '.join(SHAPES)}, got {name!r}")
    return shape_from_config(SHAPES[name])


def random_bits(random: np.random.Generator, rows: int, cols: int, exponent: int) -> Bits:
    """bfloat16 bits [rows, cols]: any sign and mantissa, four exponents."""
    raw = np.frombuffer(random.bytes(2 * rows * cols), dtype="<u2").reshape(rows, cols)
    field = ((raw >> 7) & 3) + np.uint16(exponent)
    return ((raw & 0x807F) | field << 7).astype(np.uint16)


class LayerWeights:
    """The weights that one segment kind of layer `layer` reads: a verifier.sources.ModelWeights."""

    def __init__(self, shape: ModelShape, kind: Kind, layer: int, folder: Path, seed: int = 1) -> None:
        """Writes folder/weights.safetensors, in tiles of 8 MiB."""
        self.shape = shape
        self.layout = WeightLayout(shape)
        self.program: Program = build_program(shape)
        operands = [
            o for i in self.program.segments.get(kind, ()) for o in (i.x, i.y, i.z) if o.source == Source.WEIGHT
        ]
        bases = sorted({operand.base + layer * operand.layer_stride for operand in operands})
        self._places = [self.layout.locate(base)[0] for base in bases]
        path = folder / "weights.safetensors"
        _write(path, self._places, np.random.default_rng(seed))
        file = SafetensorsFile(path)
        self._bits = {place.name: file.floats(place.name)[1] for place in self._places}

    @property
    def leaves(self) -> int:
        return self.layout.leaves

    @cached_property
    def root(self) -> bytes:
        level = (self.leaves - 1).bit_length()
        return self._node(level, 0)

    def raw(self, name: str) -> Bits:
        return self._bits[self.layout.place(name).name]

    def leaf(self, index: int) -> bytes:
        place, row, chunk = self.layout.locate(index)
        return self._bits[place.name][row, chunk * BLOCK : (chunk + 1) * BLOCK].tobytes()

    def prove(self, first: int, n: int = 1) -> tuple[bytes, ...]:
        return prove_range(self.leaves, first, n, self._node)

    @cached_property
    def _kept(self) -> dict[tuple[int, int], bytes]:
        return {}

    def _node(self, level: int, index: int) -> bytes:
        first, end = index << level, min((index + 1) << level, self.leaves)
        if level < _WHOLE_LEVEL:
            return self._made(level, index, first, end)
        if (level, index) not in self._kept:
            self._kept[level, index] = self._made(level, index, first, end)
        return self._kept[level, index]

    def _made(self, level: int, index: int, first: int, end: int) -> bytes:
        touching = [p for p in self._places if p.base < end and first < p.base + p.leaves]
        if not touching:
            return sha256(f"plumb bench {level} {index}".encode()).digest()
        place = touching[0]
        if level <= _WHOLE_LEVEL and place.base <= first and end <= place.base + place.leaves:
            return bytes(climb(self._leaf_hashes(place, first, end), level)[0])
        left = self._node(level - 1, 2 * index)
        if 2 * index + 1 >= nodes_at(self.leaves, level - 1):
            return left
        return sha256(b"\x01" + left + self._node(level - 1, 2 * index + 1)).digest()

    def _leaf_hashes(self, place: TensorPlace, first: int, end: int) -> Any:
        a_row = place.leaves // place.rows
        row, skip = divmod(first - place.base, a_row)
        stop = -(-(end - place.base) // a_row)
        return row_leaf_hashes(self._bits[place.name][row:stop], BLOCK)[skip : skip + end - first].copy()


def _write(path: Path, places: list[TensorPlace], random: np.random.Generator) -> None:
    """A safetensors file of random tensors, tile by tile: vectors keep two dimensions, the layout asks for no more."""
    header: dict[str, Any] = {}
    end = 0
    for place in places:
        size = 2 * place.rows * place.cols
        header[place.name] = {"dtype": "BF16", "shape": [place.rows, place.cols], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for place in places:
            for rows in _tiles(place):
                random_bits(random, rows, place.cols, _WEIGHT_EXPONENT).tofile(file)


def _tiles(place: TensorPlace) -> Iterator[int]:
    step = max(1, _TILE_BYTES // (2 * place.cols))
    for row in range(0, place.rows, step):
        yield min(step, place.rows - row)


def served(program: Program, shape: ModelShape, kind: Kind, layer: int, positions: int, seed: int = 2) -> RequestTrace:
    """The trace of the stage that holds `layer`: random where the segment reads, no more than roots elsewhere."""
    random = np.random.default_rng(seed)
    a_stage = shape.layers // STAGES
    first = layer // a_stage * a_stage
    operands = [o for i in program.segments.get(kind, ()) for o in (i.x, i.y, i.z) if o.source == Source.SERVED]
    read = {tensor_key(layer, Tensor(operand.id)) for operand in operands}
    if kind == Kind.LINK:
        read = {tensor_key(layer, tensor) for tensor in (Tensor.H, Tensor.ATTN_OUT, Tensor.MLP_OUT)}
        read.add(tensor_key(layer + 1, Tensor.H))
    arrays: dict[str, Bits] = {}
    roots: dict[str, bytes] = {}
    for key in tensor_keys(shape, first, first + a_stage):
        width = tensor_width(shape, key)
        if key in read:
            arrays[key] = random_bits(random, positions, width, _SERVED_EXPONENT)
        else:
            arrays[key], roots[key] = _nothing(positions, width), random.bytes(HASH_BYTES)
    return RequestTrace(shape, first, first + a_stage, arrays, roots)


@cache
def _nothing(positions: int, width: int) -> Bits:
    """Zeros that take no memory."""
    return np.broadcast_to(np.zeros(1, dtype="<u2"), (positions, width))
