"""A model's weights as the law sees them: a Hugging Face folder, memory-mapped, with the tree that commits to it.

The folder comes from strangers: nothing in it is run, every size is checked, and the first reading refuses weights that
the law cannot hold.
"""

import os
import struct
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from verifier import vectors
from verifier.linear import Ints
from verifier.program import Program, TensorPlace, WeightLayout, build_program, profile_cells, shape_from_config
from verifier.referee.codec import BLOCK, Model
from verifier.referee.floats import WEIGHT_LIMIT_BITS, Dtype
from verifier.safetensors_file import Bits, MalformedFile, SafetensorsFile, parse_object
from verifier.sha256 import HASH_BYTES, Bytes, HashTree, climb, prove_range, row_leaf_hashes
from verifier.shape import ModelShape

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_JSON_BYTES = 64 << 20  # the index of a 405B model has 0.1 MB
TILE_BYTES = 8 << 20  # what one thread reads, checks and hashes at a time
KEPT_LEVEL = 8
# The lowest level that is kept: 32 bytes for each 128 KiB of 16-bit weights, 35 MB at 70B; a proof hashes the 256
# leaves below it again.
CACHE_MAGIC = b"plumb weights 1\n"
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)

_Result = TypeVar("_Result")


class ModelFolderError(ValueError):
    """A folder that holds no model of the law. The message names the file or tensor.

    ModelFolderError
      MissingShard    a file that the folder or its index promises is not there
      MissingTensor   no file holds a tensor that the layout needs
      WrongShape      a tensor of another shape or dtype than config.json implies
      InvalidWeight   NaN, Inf or |w| >= 2^8
    """


class MissingShard(ModelFolderError):
    """A file that the folder or its index promises is not there."""


class MissingTensor(ModelFolderError):
    """No file holds a tensor that the layout needs."""


class WrongShape(ModelFolderError):
    """A tensor of another shape or dtype than config.json implies."""


class InvalidWeight(ModelFolderError):
    """NaN, Inf or |w| >= 2^8: the law reads it as 0, so no honest server could match it."""


class Weights:
    """The weights of one model folder, read-only.

    Tensor names are those of the checkpoint; a tied lm_head.weight is embed_tokens.
    """

    def __init__(self, folder: Path, config: dict[str, Any], files: dict[str, SafetensorsFile], threads: int) -> None:
        """Use Weights.open. files: the file of each tensor name."""
        self.folder, self.config, self._threads = folder, config, threads
        self.shape = shape_from_config(config)
        self.layout = WeightLayout(self.shape)
        # SAFETY: a config of 2^32 layers must not make a list of them.
        if self.shape.layers > len(files):
            raise MissingTensor(f"expected tensors of {self.shape.layers} layers, got {len(files)} tensors")
        self._bits = {place.name: _tensor(place, files, self.shape.weight_dtype) for place in self.layout.tensors}
        self._paths = sorted({file.path for file in files.values()})

    @classmethod
    def open(cls, folder: Path | str, threads: int | None = None) -> "Weights":
        """Opens config.json and model.safetensors, or its index's shards. Raises ModelFolderError, UnsupportedModel.

        threads: for hashing; all cores by default. Reads headers alone; `root` reads and checks the weights.
        """
        folder = Path(folder)
        config = _json(folder / "config.json")
        try:
            files = _files(folder)
        except MalformedFile as error:
            raise ModelFolderError(str(error)) from error
        return cls(folder, config, files, threads or os.cpu_count() or 1)

    @cached_property
    def program(self) -> Program:
        return build_program(self.shape)

    @property
    def leaves(self) -> int:
        return self.layout.leaves

    @property
    def root(self) -> bytes:
        """The weights root. The first use reads and checks every weight, unless the tree is cached.

        Raises InvalidWeight.
        """
        return self._upper.root

    def raw(self, name: str, rows: slice = slice(None)) -> Bits:
        """Raw bits [rows, cols], uint16 or uint32, mapped and read-only; vectors are [1, n]. Raises KeyError."""
        return self._bits[self.layout.place(name).name][rows]

    def fixed(self, name: str, rows: slice = slice(None)) -> Ints:
        """int64 [rows, cols] in QG, invalid weights as 0. Raises KeyError."""
        return vectors.weights(self.raw(name, rows), self.shape.weight_dtype)

    def float64(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """float64 [rows, cols], exact, invalid weights as 0. Raises KeyError."""
        bits, dtype = self.raw(name, rows), self.shape.weight_dtype
        sound = np.where(_magnitude(bits, dtype) < _first_invalid(dtype), bits, bits.dtype.type(0))
        if dtype == Dtype.BFLOAT16:
            return torch.from_numpy((sound.astype(np.uint32) << 16).view(np.float32).astype(np.float64))
        return torch.from_numpy(sound.view(np.float16 if dtype == Dtype.FLOAT16 else np.float32).astype(np.float64))

    def leaf(self, index: int) -> bytes:
        """One leaf's bytes. Raises IndexOutOfRange."""
        place, row, chunk = self.layout.locate(index)
        return self._bits[place.name][row, chunk * BLOCK : (chunk + 1) * BLOCK].tobytes()

    def prove(self, first: int, n: int = 1) -> tuple[bytes, ...]:
        """The siblings of the leaves first .. first + n - 1. Raises IndexOutOfRange, InvalidWeight."""
        return prove_range(self.leaves, first, n, self._node)

    def check(self) -> None:
        """Reads every weight, whatever is cached. Raises InvalidWeight."""
        dtype = self.shape.weight_dtype
        for _ in self._each_tile(lambda place, rows: _check(place, rows, self._bits[place.name][rows], dtype)):
            pass

    def _node(self, level: int, index: int) -> bytes:
        if level >= KEPT_LEVEL:
            return bytes(self._upper.nodes(level - KEPT_LEVEL)[index])
        first, end = index << level, min((index + 1) << level, self.leaves)
        return bytes(climb(self._leaf_hashes(first, end), level)[0])

    def _leaf_hashes(self, first: int, end: int) -> Bytes:
        """Hashes of a few leaves, which may lie in several tensors."""
        parts = []
        while first < end:
            place, row, chunk = self.layout.locate(first)
            stop = min(end, place.base + place.leaves)
            a_row = place.leaves // place.rows
            rows = self._bits[place.name][row : row + -(-(stop - first + chunk) // a_row)]
            parts.append(row_leaf_hashes(rows, BLOCK)[chunk : chunk + stop - first])
            first = stop
        return np.concatenate(parts)

    @cached_property
    def _upper(self) -> HashTree:
        """The tree from KEPT_LEVEL on."""
        path = self.folder / ".plumb" / f"weights-{self._digest().hex()[:32]}.tree"
        kept = _load_level(path, self.leaves)
        if kept is None:
            kept = self._build()
            _save_level(path, self.leaves, kept)
        return HashTree(kept)

    def _digest(self) -> bytes:
        """Says which folder the cached tree belongs to: its layout and every weight file's identity.

        SAFETY: a downloaded folder may bring a forged tree along, with sizes and mtimes to match; but nobody who packs
        a folder can choose the inodes' ctimes where it is unpacked.
        """
        state = sha256(repr(self.layout.tensors).encode() + repr(self.shape).encode())
        for path in self._paths:
            stat = path.stat()
            times = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
            state.update(f"{path.name}\0{times}\n".encode())
        index = self.folder / INDEX_FILE
        state.update(index.read_bytes() if index.is_file() else b"")
        return state.digest()

    def _build(self) -> Bytes:
        """Checks and hashes every weight, streaming; returns the nodes at KEPT_LEVEL."""

        def check_and_hash(place: TensorPlace, rows: slice) -> Bytes:
            bits = self._bits[place.name][rows]
            _check(place, rows, bits, self.shape.weight_dtype)
            return row_leaf_hashes(bits, BLOCK)

        nodes, pending, waiting = [], [], 0
        for hashes in self._each_tile(check_and_hash):
            pending.append(hashes)
            waiting += len(hashes)
            if waiting >> KEPT_LEVEL:
                joined = np.concatenate(pending)
                whole = waiting >> KEPT_LEVEL << KEPT_LEVEL
                nodes.append(climb(joined[:whole], KEPT_LEVEL))
                pending, waiting = [joined[whole:].copy()], waiting - whole
        if waiting:
            nodes.append(climb(np.concatenate(pending), KEPT_LEVEL))
        return np.concatenate(nodes)

    def _each_tile(self, work: Callable[[TensorPlace, slice], _Result]) -> Iterator[_Result]:
        """work(place, rows) of all tiles of TILE_BYTES, in the order of their leaves, a few ahead in other threads."""
        size = self.shape.weight_dtype.size
        with ThreadPoolExecutor(self._threads) as pool:
            running: deque[Future[_Result]] = deque()
            try:
                for place in self.layout.tensors:
                    step = max(1, TILE_BYTES // (place.cols * size))
                    for row in range(0, place.rows, step):
                        running.append(pool.submit(work, place, slice(row, min(row + step, place.rows))))
                        if len(running) > 2 * self._threads:
                            yield running.popleft().result()
                while running:
                    yield running.popleft().result()
            finally:
                for future in running:
                    future.cancel()


class HasRoot(Protocol):
    """What identify needs of a tolerance profile."""

    @property
    def root(self) -> bytes: ...


class HasTree(Protocol):
    """What identify needs of the weights."""

    @property
    def shape(self) -> ModelShape: ...
    @property
    def program(self) -> Program: ...
    @property
    def root(self) -> bytes: ...
    @property
    def leaves(self) -> int: ...


def identify(weights: HasTree, profile: HasRoot) -> Model:
    """The model as the chain knows it. profile: its tolerance profile for this shape. Raises InvalidWeight."""
    shape, program = weights.shape, weights.program
    return Model(
        weights_root=weights.root,
        weights_leaves=weights.leaves,
        program_root=program.tree.root,
        program_leaves=program.tree.count,
        profile_root=profile.root,
        profile_leaves=profile_cells(shape),
        layers=shape.layers,
        hidden=shape.hidden,
        query_width=shape.query_width,
        kv_width=shape.kv_width,
        vocabulary=shape.vocabulary,
        max_positions=shape.max_positions,
        weight_dtype=int(shape.weight_dtype),
        served_dtype=int(shape.served_dtype),
    )


def tokenizer_hash(folder: Path | str) -> bytes:
    """SHA-256 over name and bytes of each tokenizer file that is there, by name. Raises ModelFolderError if none is."""
    state, found = sha256(), False
    for name in TOKENIZER_FILES:
        path = Path(folder) / name
        if path.is_file():
            data, found = path.read_bytes(), True
            state.update(struct.pack(">IQ", len(name), len(data)) + name.encode() + data)
    if not found:
        raise ModelFolderError(f"{folder}: expected one of {', '.join(TOKENIZER_FILES)}, got none")
    return state.digest()


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingShard(f"expected {path}, got no such file")
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ModelFolderError(f"{path.name}: expected at most {MAX_JSON_BYTES} bytes, got {size}")
    try:
        return parse_object(path.read_bytes(), path.name)
    except MalformedFile as error:
        raise ModelFolderError(str(error)) from error


def _files(folder: Path) -> dict[str, SafetensorsFile]:
    """The file of each tensor name. Raises ModelFolderError, MalformedFile."""
    if not (folder / INDEX_FILE).is_file():
        if not (folder / SINGLE_FILE).is_file():
            raise MissingShard(f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, got neither")
        single = SafetensorsFile(folder / SINGLE_FILE)
        return dict.fromkeys(single.entries, single)
    told = _json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(told, dict) or not told:
        raise ModelFolderError(f"{INDEX_FILE}: expected a weight_map, got {str(told)[:80]}")
    opened: dict[str, SafetensorsFile] = {}
    for name, shard in told.items():
        # SAFETY: a shard's name must not lead out of the folder.
        if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\\0"):
            raise ModelFolderError(f"{INDEX_FILE}: expected a file name for {name}, got {str(shard)[:80]!r}")
        if shard not in opened:
            if not (folder / shard).is_file():
                raise MissingShard(f"{INDEX_FILE}: expected {shard} for {name}, got no such file")
            opened[shard] = SafetensorsFile(folder / shard)
    return {name: opened[shard] for name, shard in told.items()}


def _tensor(place: TensorPlace, files: dict[str, SafetensorsFile], dtype: Dtype) -> Bits:
    """A tensor's raw bits [rows, cols], as the layout wants them."""
    file = files.get(place.name)
    if file is None or place.name not in file.entries:
        where = f"{len(files)} others" if file is None else f"a promise of {file.path.name} that it breaks"
        raise MissingTensor(f"expected {place.name}, got {where}")
    try:
        held, bits = file.floats(place.name)
    except MalformedFile as error:
        raise WrongShape(str(error)) from error
    shape = (place.cols,) if _is_vector(place) else (place.rows, place.cols)
    if held != dtype or bits.shape != shape:
        wanted = f"{dtype.name.lower()} {list(shape)}"
        raise WrongShape(f"{place.name}: expected {wanted}, got {held.name.lower()} {list(bits.shape)}")
    return bits.reshape(place.rows, place.cols)


def _is_vector(place: TensorPlace) -> bool:
    """Gains are vectors in a checkpoint, even where a matrix of one row is not."""
    return place.name.removesuffix(".weight").endswith("norm")


def _magnitude(bits: Bits, dtype: Dtype) -> Bits:
    """Bits without the sign: ordered as the absolute values, with Inf and NaN on top."""
    return np.bitwise_and(bits, bits.dtype.type(dtype.sign - 1))


def _first_invalid(dtype: Dtype) -> int:
    """The magnitude of 2^8, the smallest that the law refuses."""
    return (dtype.bias + WEIGHT_LIMIT_BITS) << dtype.mantissa_bits


def _check(place: TensorPlace, rows: slice, bits: Bits, dtype: Dtype) -> None:
    """Raises InvalidWeight for the first weight of a tile, bits [rows, cols], that the law cannot hold."""
    magnitude, limit = _magnitude(bits, dtype), _first_invalid(dtype)
    if magnitude.size and int(magnitude.max()) >= limit:
        row, col = (int(i) for i in np.argwhere(magnitude >= limit)[0])
        index = f"[{col}]" if _is_vector(place) else f"[{rows.start + row}, {col}]"
        found = f"bits 0x{int(bits[row, col]):0{2 * dtype.size}x}"
        raise InvalidWeight(f"{place.name}{index}: expected a number below 2^{WEIGHT_LIMIT_BITS}, got {found}")


def _load_level(path: Path, leaves: int) -> Bytes | None:
    """The nodes [n, 32] at KEPT_LEVEL from a cache file; None unless it is whole and for as many leaves."""
    count = -(-leaves >> KEPT_LEVEL)
    head = CACHE_MAGIC + struct.pack(">Q", leaves)
    size = len(head) + HASH_BYTES * (count + 1)
    try:
        if path.stat().st_size != size:
            return None
        data = path.read_bytes()
    except OSError:
        return None
    body, checksum = data[:-HASH_BYTES], data[-HASH_BYTES:]
    if len(data) != size or not body.startswith(head) or sha256(body).digest() != checksum:
        return None
    return np.frombuffer(body, dtype=np.uint8, offset=len(head)).reshape(count, HASH_BYTES)


def _save_level(path: Path, leaves: int, nodes: Bytes) -> None:
    """Keeps the nodes at KEPT_LEVEL; in a folder that can't be written the tree lives in memory alone."""
    body = CACHE_MAGIC + struct.pack(">Q", leaves) + nodes.tobytes()
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(exist_ok=True)
        part.write_bytes(body + sha256(body).digest())
        part.replace(path)
    except OSError:
        return
