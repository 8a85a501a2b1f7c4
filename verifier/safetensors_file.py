"""Safetensors files of strangers: a bounded header, every offset checked, the data memory-mapped and never copied.

Format: header length u64 (little-endian), header JSON {name: {dtype, shape, data_offsets}}, data. Floats stay raw bits.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import RawIOBase
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from verifier.referee.floats import Dtype

Bits = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_ROWS = 10**9  # of a GrowingFile
FLOATS = {"BF16": Dtype.BFLOAT16, "F16": Dtype.FLOAT16, "F32": Dtype.FLOAT32}
NAMES = {dtype: name for name, dtype in FLOATS.items()}


class MalformedFile(ValueError):
    """A file that is not what it says. The message names the file, what was expected and what came."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype as the header says it, its shape, its bytes begin .. end - 1 within the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A file opened for reading. entries: by name; metadata: the header's free text."""

    def __init__(self, path: Path) -> None:
        """Raises MalformedFile; OSError where there is no such file."""
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                limit = max(0, min(size - 8, MAX_HEADER_BYTES))
                raise MalformedFile(f"{path.name}: expected a header of at most {limit} bytes, got {length}")
            header = parse_object(file.read(length), path.name)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise MalformedFile(f"{path.name}: expected __metadata__ to hold text, got {str(metadata)[:80]}")
        self.metadata: dict[str, str] = metadata
        self.entries = {name: _entry(path.name, name, told, 8 + length, size) for name, told in header.items()}
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")

    def floats(self, name: str) -> tuple[Dtype, Bits]:
        """A float tensor's dtype and raw bits in its own shape, read-only.

        Raises KeyError, MalformedFile for other dtypes.
        """
        entry = self.entries[name]
        if entry.dtype not in FLOATS:
            raise MalformedFile(f"{self.path.name}: expected {name} in {', '.join(FLOATS)}, got {entry.dtype}")
        dtype = FLOATS[entry.dtype]
        raw = self._bytes[entry.begin : entry.end]
        # Rationale: a header of odd length puts elements at odd addresses. numpy reads them all the same; numba and
        # torch would not.
        if entry.begin % dtype.size:
            raw = raw.copy()
        bits: Bits = raw.view(f"<u{dtype.size}").view(np.ndarray).reshape(entry.shape)
        return dtype, bits


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object in which no key comes twice. Raises MalformedFile."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError("a key comes twice")
        return out

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise MalformedFile(f"{where}: expected a JSON object, got {text[:40]!r} ({error})") from error
    if not isinstance(value, dict):
        raise MalformedFile(f"{where}: expected a JSON object, got a {type(value).__name__}")
    return value


def _entry(where: str, name: str, told: object, base: int, size: int) -> Entry:
    """One header entry, checked against the file's size."""
    fields = told if isinstance(told, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    sound = isinstance(dtype, str) and _naturals(shape) and _naturals(offsets) and len(offsets) == 2  # type: ignore[arg-type]
    if not sound:
        raise MalformedFile(f"{where}: expected dtype, shape and two data_offsets for {name}, got {str(told)[:120]}")
    assert isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)
    begin, end = offsets
    if not begin <= end <= size - base:
        raise MalformedFile(f"{where}: expected {name} within {size - base} bytes of data, got {begin} .. {end}")
    if dtype in FLOATS and end - begin != prod(shape) * FLOATS[dtype].size:
        needed = prod(shape) * FLOATS[dtype].size
        raise MalformedFile(f"{where}: expected {needed} bytes for {name} {dtype} {shape}, got {end - begin}")
    return Entry(dtype, tuple(shape), base + begin, base + end)


def _naturals(value: object) -> bool:
    """Whether a JSON value is a short list of integers that fit 48 bits, none negative."""
    if not isinstance(value, list) or len(value) > 8:
        return False
    return all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 48 for n in value)


def write(path: Path, dtype: Dtype, tensors: Mapping[str, Bits], metadata: Mapping[str, str]) -> None:
    """Writes raw bits of one float dtype, whole or not at all: a reader never sees half a file. Raises OSError."""
    header = _header(dtype, {name: bits.shape for name, bits in tensors.items()}, metadata)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(header)
            for bits in tensors.values():
                np.ascontiguousarray(bits).tofile(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


BEGUN = 2**16  # bytes that are worth a request to the disk


class GrowingFile:
    """A file of matrices with as many rows each, the first one's written as they come. Nobody sees it before `publish`;
    between two calls none is open. Each method raises OSError.
    """

    def __init__(self, path: Path, dtype: Dtype, columns: Mapping[str, int], metadata: Mapping[str, str]) -> None:
        """columns: of each matrix, in their order. What another left unfinished for `path` is overwritten."""
        self.count = 0  # of rows
        self._part = path.with_name(f"{path.name}.part")
        self._path, self._dtype, self._columns, self._metadata = path, dtype, dict(columns), metadata
        # Rationale: the header comes first and tells how many rows there are, so room is kept for the largest number.
        self._room = len(self._header(MAX_ROWS))
        self._part.write_bytes(bytes(self._room))

    def add(self, rows: Bits) -> None:
        """Raw bits [n, columns] of the first matrix, contiguous."""
        with self._part.open("r+b", buffering=0) as file:
            _write_behind(file, rows)
        self.count += len(rows)

    def first(self, count: int) -> Bits:
        """The first `count` rows of the first matrix, of those that came."""
        columns = next(iter(self._columns.values()))
        bits = np.fromfile(self._part, f"<u{self._dtype.size}", count * columns, offset=self._room)
        return bits.reshape(count, columns)

    def finish(self, others: Iterable[Bits]) -> None:
        """others: the matrices behind the first, whole."""
        header = self._header(self.count)
        with self._part.open("r+b", buffering=0) as file:
            for bits in others:
                _write_behind(file, bits)
            file.seek(0)
            file.write((self._room - 8).to_bytes(8, "little") + header[8:].ljust(self._room - 8))

    def publish(self) -> None:
        """Puts the file in its place, once the disk has its content."""
        with self._part.open("rb") as file:
            os.fsync(file.fileno())
        self._part.replace(self._path)

    def _header(self, rows: int) -> bytes:
        return _header(self._dtype, {name: (rows, wide) for name, wide in self._columns.items()}, self._metadata)


def _write_behind(file: RawIOBase, rows: Bits) -> None:
    """At the file's end. The disk begins with them at once, so that `publish` finds little left to wait for."""
    first = file.seek(0, os.SEEK_END)
    data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
    while data:
        data = data[file.write(data) :]
    if rows.nbytes >= BEGUN and hasattr(os, "posix_fadvise"):
        # Linux writes what is said not to be needed, without being waited for, and keeps it until that is done.
        os.posix_fadvise(file.fileno(), first, rows.nbytes, os.POSIX_FADV_DONTNEED)


def _header(dtype: Dtype, shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]) -> bytes:
    """With its length in front; data begin at a multiple of 8."""
    told: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + prod(shape) * dtype.size
        told[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
