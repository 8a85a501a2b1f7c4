"""Served tensors: every opening verifies, incremental hashing gives the same roots, files come back whole."""

from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifier.program import Kind, ModelShape, build_program, shape_from_config
from verifier.referee import tree
from verifier.referee.codec import BLOCK, Cell, Instruction, Model, Opening, Source, Tensor, encode_vector, slices
from verifier.referee.errors import IndexOutOfRange, RefereeError
from verifier.referee.ops import Op
from verifier.referee.referee import Read, chunk_count, element_count, reads_of, step
from verifier.safetensors_file import Bits, MalformedFile
from verifier.trace import RequestTrace, TensorHasher, WrongTrace, tensor_key, tensor_keys, tensor_width

WIDTHS = [64, 80, 96, 100, 128]


def shape_of(kv_width: int = 64, hidden: int = 320, dtype: str = "bfloat16", layers: int = 3) -> ModelShape:
    return shape_from_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": hidden,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": kv_width,
            "vocab_size": 10,
            "max_position_embeddings": 64,
            "dtype": dtype,
        }
    )


def random_arrays(shape: ModelShape, first: int, end: int, positions: int) -> dict[str, Bits]:
    random = np.random.default_rng(positions)
    size = {key: (positions, tensor_width(shape, key)) for key in tensor_keys(shape, first, end)}
    if shape.served_dtype.size == 2:
        return {key: random.integers(0, 1 << 16, n, dtype=np.uint16) for key, n in size.items()}
    return {key: random.integers(0, 1 << 32, n, dtype=np.uint32) for key, n in size.items()}


def random_trace(shape: ModelShape, first: int, end: int, positions: int) -> RequestTrace:
    return RequestTrace(shape, first, end, random_arrays(shape, first, end, positions))


def leaf_bytes(array: Bits, key: str) -> list[bytes]:
    """Leaves as docs/canonical.md words them, one element at a time."""
    positions, width = array.shape
    if key.endswith("v"):
        return [
            b"".join(
                array[t, c].tobytes() for t in range(t0, min(t0 + 8, positions)) for c in range(c0, min(c0 + 32, width))
            )
            for t0 in range(0, positions, 8)
            for c0 in range(0, width, 32)
        ]
    return [array[t, c : c + 256].tobytes() for t in range(positions) for c in range(0, width, 256)]


@given(st.integers(1, 40), st.sampled_from(WIDTHS), st.sampled_from(["bfloat16", "float32"]))
@settings(deadline=None, max_examples=15)
def test_roots_are_those_of_the_law(positions: int, width: int, dtype: str) -> None:
    trace = random_trace(shape_of(width, dtype=dtype), 1, 3, positions)
    roots = []
    for key in trace.keys:
        roots.append(tree.root([tree.leaf(data) for data in leaf_bytes(trace.arrays[key], key)]))
        assert trace.tensor_root(key) == roots[-1]
    assert trace.tensors_root == tree.root([tree.leaf(root) for root in roots])


def test_the_root_of_one_position_worked_by_hand() -> None:
    shape = shape_of(2, hidden=2, layers=1)
    arrays = {
        key: np.full((1, tensor_width(shape, key)), i, dtype=np.uint16)
        for i, key in enumerate(tensor_keys(shape, 0, 1))
    }
    roots = [sha256(b"\x00" + bytes([i, 0] * (4 if i == 1 else 2))).digest() for i in range(7)]
    leaves = [sha256(b"\x00" + root).digest() for root in roots]

    def node(left: bytes, right: bytes) -> bytes:
        return sha256(b"\x01" + left + right).digest()

    left = node(node(leaves[0], leaves[1]), node(leaves[2], leaves[3]))
    assert RequestTrace(shape, 0, 1, arrays).tensors_root == node(left, node(node(leaves[4], leaves[5]), leaves[6]))


def test_tensors_come_in_the_order_of_the_law() -> None:
    shape = shape_of()
    assert tensor_keys(shape, 0, 1) == ["0.h", "0.q", "0.k", "0.v", "0.attn_out", "0.mlp_out"]
    assert tensor_keys(shape, 2, 3)[-2:] == ["2.mlp_out", "out"]


def opened(trace: RequestTrace, cell: Cell, read: Read, steps: dict[int, bytes]) -> Opening:
    """The opening of one read; other sources than SERVED and STEP are not asked for here."""
    operand = read.operand
    if operand.source == Source.STEP:
        data = steps[operand.id]
        size = 16 if operand.layer_stride else 8
        head, end = read.first * size // 512, (read.first + read.count - 1) * size // 512 + 1
        hashes = [tree.leaf(part) for part in slices(data, 512)]
        return Opening(data[512 * head : 512 * end], tuple(tree.Tree(hashes).prove(head, end - head)))
    key = tensor_key(cell.layer, Tensor(operand.id))
    first = read.first + cell.unit * operand.unit_stride
    if read.rows > 1:
        return trace.open_column(key, read.row, read.row + read.rows, first)
    return trace.open_row(key, read.row, first, first + read.count)


def served_steps(shape: ModelShape) -> list[tuple[Kind, Instruction]]:
    """The instructions that read nothing but served tensors, and WSUM, which reads v by columns."""
    steps = [(kind, i) for kind, steps in build_program(shape).segments.items() for i in steps]
    sources = (Source.NONE, Source.SERVED)
    return [(k, i) for k, i in steps if i.op == Op.WSUM or all(o.source in sources for o in (i.x, i.y, i.z))]


def model_of(shape: ModelShape) -> Model:
    sizes = (shape.layers, shape.hidden, shape.query_width, shape.kv_width, shape.vocabulary, shape.max_positions)
    return Model(bytes(32), 1, bytes(32), 1, bytes(32), 1, *sizes, shape.weight_dtype, shape.served_dtype)


@given(st.integers(1, 40), st.sampled_from(WIDTHS), st.sampled_from(["bfloat16", "float16", "float32"]), st.data())
@settings(deadline=None, max_examples=30)
def test_every_opening_satisfies_the_referee_until_a_byte_flips(
    positions: int, width: int, dtype: str, data: st.DataObject
) -> None:
    shape = shape_of(width, dtype=dtype)
    trace, after = random_trace(shape, 0, 2, positions), random_trace(shape, 2, 3, positions)
    kind, instruction = data.draw(st.sampled_from(served_steps(shape)))
    layer = 2 if kind in (Kind.TOKEN, Kind.SAMPLE) else data.draw(st.integers(0, 1))
    position, unit = data.draw(st.integers(0, positions - 1)), 0
    if kind in (Kind.ATTEND, Kind.MLP):
        unit = data.draw(st.integers(0, shape.blocks - 1))
    here = (trace, after)[layer == 2]
    cell = Cell(layer, position, unit, 0, here.trace)
    steps = {instruction.x.id: encode_vector([0] * (2 * BLOCK), False)}
    element = data.draw(st.integers(0, element_count(instruction, position, unit) - 1))
    chunk = data.draw(st.integers(0, chunk_count(instruction, position) - 1))
    model = model_of(shape)
    reads = reads_of(model, cell, instruction, element, chunk)
    openings = [opened(here, cell, read, steps) for read in reads]
    roots = [tree.root([tree.leaf(part) for part in slices(steps[instruction.x.id], 512)])]
    step(model, cell, roots, instruction, element, chunk, openings)
    if openings:
        which = data.draw(st.integers(0, len(openings) - 1))
        broken = bytearray(openings[which].data)
        broken[data.draw(st.integers(0, len(broken) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        openings[which] = Opening(bytes(broken), openings[which].siblings)
        with pytest.raises(RefereeError):
            step(model, cell, roots, instruction, element, chunk, openings)


@given(st.integers(1, 40), st.sampled_from(WIDTHS), st.sampled_from(["bfloat16", "float32"]), st.data())
@settings(deadline=None, max_examples=40)
def test_any_range_of_a_row_or_column_proves(positions: int, width: int, dtype: str, data: st.DataObject) -> None:
    trace = random_trace(shape_of(width, dtype=dtype), 2, 3, positions)
    key = data.draw(st.sampled_from(trace.keys))
    array = trace.arrays[key]
    position = data.draw(st.integers(0, positions - 1))
    first = data.draw(st.integers(0, array.shape[1] - 1))
    end = data.draw(st.integers(first + 1, array.shape[1]))
    opening = trace.open_row(key, position, first, end)
    per = 32 if key == "2.v" else 256
    a_row = -(-array.shape[1] // per)
    row = position // 8 if key == "2.v" else position
    head = row * a_row + first // per
    leaves = leaf_bytes(array, key)
    held = leaves[head : row * a_row + (end - 1) // per + 1]
    assert opening.data == b"".join(held)
    hashes = [tree.leaf(part) for part in held]
    top, used = tree.root_of_range_used(hashes, head, len(leaves), opening.siblings)
    index = trace.keys.index(key)
    rest = opening.siblings[used:]
    assert tree.root_of_range([tree.leaf(top)], index, len(trace.keys), rest) == trace.tensors_root
    if key == "2.v":
        low, high = position // 8 * 8, min(position // 8 * 8 + 8, positions)
        tile = trace.open_column(key, low, high, first)
        assert tile.data == leaves[row * a_row + first // 32]
    else:
        assert trace.block_leaf(key, position, first // 256) == leaves[row * a_row + first // 256]


@given(st.lists(st.integers(0, 37), min_size=1, max_size=9), st.sampled_from([1, 15, 32, 100, 256, 300]), st.booleans())
@settings(deadline=None)
def test_rows_in_any_chunks_hash_alike(chunks: list[int], width: int, tiled: bool) -> None:
    rows = np.random.default_rng(1).integers(0, 1 << 16, (sum(chunks) + 1, width), dtype=np.uint16)
    hasher, at = TensorHasher(width, 2, tiled), 0
    for n in [*chunks, 1]:
        passing = rows[at : at + n].copy()
        hasher.append(passing)
        passing[:] = 0  # the recorder reuses its buffers
        at += n
    assert hasher.rows == len(rows)
    expected = tree.root([tree.leaf(data) for data in leaf_bytes(rows, "v" if tiled else "h")])
    assert hasher.finish() == expected


def test_a_hasher_takes_only_rows_that_fit_and_none_behind_the_last() -> None:
    hasher = TensorHasher(4, 2)
    with pytest.raises(WrongTrace, match="one position"):
        TensorHasher(4, 2).finish()
    for rows in (np.zeros((1, 5), np.uint16), np.zeros((1, 4), np.uint32), np.zeros(4, np.uint16)):
        with pytest.raises(WrongTrace, match="expected uint16"):
            hasher.append(rows)
    hasher.append(np.zeros((3, 4), np.uint16))
    assert hasher.finish() == hasher.finish()
    with pytest.raises(WrongTrace, match="no rows behind"):
        hasher.append(np.zeros((1, 4), np.uint16))


def test_known_roots_are_used_and_agree_with_the_hasher() -> None:
    shape = shape_of()
    arrays, roots = random_arrays(shape, 0, 3, 21), {}
    for key, array in arrays.items():
        hasher = TensorHasher(array.shape[1], 2, tiled=key.endswith(".v"))
        hasher.append(array)
        roots[key] = hasher.finish()
    assert RequestTrace(shape, 0, 3, arrays, roots).tensors_root == RequestTrace(shape, 0, 3, arrays).tensors_root


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_saved_trace_comes_back(tmp_path: Path, dtype: str) -> None:
    shape = shape_of(dtype=dtype)
    trace = random_trace(shape, 1, 3, 19)
    trace.save(tmp_path / "7.safetensors")
    loaded = RequestTrace.load(tmp_path / "7.safetensors", shape)
    assert (loaded.first_layer, loaded.end_layer, loaded.trace) == (1, 3, trace.trace)
    assert list(tmp_path.iterdir()) == [tmp_path / "7.safetensors"]
    from safetensors import safe_open

    with safe_open(tmp_path / "7.safetensors", "pt") as file:
        assert str(file.get_tensor("1.k").dtype) == f"torch.{dtype}"


def test_a_trace_of_another_model_is_refused(tmp_path: Path) -> None:
    random_trace(shape_of(), 0, 3, 2).save(tmp_path / "t")
    with pytest.raises(WrongTrace, match="expected FLOAT16"):
        RequestTrace.load(tmp_path / "t", shape_of(dtype="float16"))
    with pytest.raises(WrongTrace, match=r"0\.q: expected 160 columns, got \[2, 128\]"):
        RequestTrace.load(tmp_path / "t", shape_of(80))
    whole = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(whole.replace(b'"end_layer":"3"', b'"end_layer":"x"'))
    with pytest.raises(MalformedFile, match="end_layer"):
        RequestTrace.load(tmp_path / "t", shape_of())
    (tmp_path / "t").write_bytes(whole[:-1])
    with pytest.raises(MalformedFile, match="within"):
        RequestTrace.load(tmp_path / "t", shape_of())


def test_missing_extra_empty_and_uneven_tensors_are_refused() -> None:
    shape = shape_of()
    arrays = random_arrays(shape, 0, 1, 2)
    with pytest.raises(WrongTrace, match="missing"):
        RequestTrace(shape, 0, 1, {key: a for key, a in arrays.items() if key != "0.q"})
    with pytest.raises(WrongTrace, match="besides"):
        RequestTrace(shape, 0, 1, {**arrays, "out": arrays["0.h"]})
    with pytest.raises(WrongTrace, match=r"0\.mlp_out"):
        RequestTrace(shape, 0, 1, {**arrays, "0.mlp_out": arrays["0.mlp_out"][:1]})
    with pytest.raises(WrongTrace):
        RequestTrace(shape, 0, 1, {key: a[:0] for key, a in arrays.items()})
    for first, end in ((1, 1), (-1, 1), (2, 4)):
        with pytest.raises(WrongTrace, match="layers within 3"):
            RequestTrace(shape, first, end, arrays)


def test_what_a_tensor_does_not_hold_is_refused() -> None:
    trace = random_trace(shape_of(), 0, 1, 20)
    for position, first, end in ((20, 0, 1), (-1, 0, 1), (0, 0, 321), (0, 5, 5), (0, -1, 1)):
        with pytest.raises(IndexOutOfRange):
            trace.open_row("0.h", position, first, end)
    for first, end, column in ((7, 9, 0), (16, 21, 0), (0, 1, 64)):
        with pytest.raises(IndexOutOfRange):
            trace.open_column("0.v", first, end, column)
    with pytest.raises(ValueError, match="expected v"):
        trace.open_column("0.k", 0, 1, 0)
    with pytest.raises(IndexOutOfRange):
        trace.block_leaf("0.h", 0, 2)
    with pytest.raises(ValueError, match="row tensor"):
        trace.block_leaf("0.v", 0, 0)
