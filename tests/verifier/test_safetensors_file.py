"""Safetensors files of strangers: malformed ones raise MalformedFile and nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifier.referee.floats import Dtype
from verifier.safetensors_file import MAX_HEADER_BYTES, MalformedFile, SafetensorsFile, write


def file_of(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return path


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> bytes:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"", None),
        (b"{}", 1 << 63),
        (b"{}", MAX_HEADER_BYTES + 1),
        (b"{}", 11),
        (b"[]", None),
        (b'{"a": 1}', None),
        (b'{"__metadata__": {"a": 1}}', None),
        (b'{"__metadata__": 1}', None),
        (b"\xff\xff", None),
        (entry(offsets=[0, 8]), None),
        (entry(offsets=[4, 0]), None),
        (entry(offsets=[-4, 0]), None),
        (entry(offsets=[0, 4, 4]), None),
        (entry(offsets=[0, 4.0]), None),
        (entry(offsets=[False, 4]), None),
        (entry(shape=[2]), None),
        (entry(shape=[-1]), None),
        (entry(shape=[1 << 40, 1 << 40]), None),
        (entry(shape=[1] * 9), None),
        (entry(shape=1), None),
        (entry(dtype=4), None),
        (entry()[:-1] + b"," + entry()[1:], None),
        (b'{"a":' * 100_000, None),
        (b'{"a": ' + b"9" * 5000 + b"}", None),
    ],
)
def test_malformed_safetensors_headers_are_refused(tmp_path: Path, header: bytes, length: int | None) -> None:
    with pytest.raises(MalformedFile):
        SafetensorsFile(file_of(tmp_path / "f", header, b"\0" * 4, length))


def test_a_short_file_is_refused(tmp_path: Path) -> None:
    for size in (0, 7):
        (tmp_path / "f").write_bytes(b"\0" * size)
        with pytest.raises(MalformedFile):
            SafetensorsFile(tmp_path / "f")


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=200)
def test_no_file_whatever_raises_anything_else(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(data)
    try:
        SafetensorsFile(path)
    except MalformedFile:
        pass


def test_a_header_of_odd_length_still_reads(tmp_path: Path) -> None:
    header = entry()
    for pad in range(4):
        path = file_of(tmp_path / "f", header + b" " * pad, np.float32(1.5).tobytes())
        dtype, bits = SafetensorsFile(path).floats("a")
        assert dtype == Dtype.FLOAT32 and bits.flags.aligned
        assert bits.view(np.float32)[0] == 1.5


def test_what_is_written_reads_back_and_an_unwritable_place_raises(tmp_path: Path) -> None:
    rows = np.arange(6, dtype=np.uint16).reshape(2, 3)
    write(tmp_path / "f", Dtype.FLOAT16, {"b": rows, "a": rows[:, ::2]}, {"note": "text"})
    file = SafetensorsFile(tmp_path / "f")
    assert file.metadata == {"note": "text"}
    assert file.floats("b")[0] == Dtype.FLOAT16
    assert np.array_equal(file.floats("b")[1], rows) and np.array_equal(file.floats("a")[1], rows[:, ::2])
    with pytest.raises(OSError, match="nowhere"):
        write(tmp_path / "nowhere" / "f", Dtype.FLOAT16, {"a": rows}, {})
