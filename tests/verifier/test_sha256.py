"""Bulk hashing equals hashlib and the referee's trees, and never leaves its arrays."""

import os
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifier import sha256_lanes, sha256_pairs
from verifier.referee import tree
from verifier.referee.errors import IndexOutOfRange
from verifier.sha256 import HashTree, climb, hash_strided, leaf_hashes, parents, prove_range, roots, row_leaf_hashes
from verifier.sha256_lanes import LANES
from verifier.sha256_program import INITIAL_STATE, ROUND_CONSTANTS, SIGNATURE


def random_bytes(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, n, dtype=np.uint8)


def test_the_derived_constants_are_those_of_fips_180_4() -> None:
    assert INITIAL_STATE[0] == 0x6A09E667 and INITIAL_STATE[7] == 0x5BE0CD19
    assert (ROUND_CONSTANTS[0], ROUND_CONSTANTS[1], ROUND_CONSTANTS[63]) == (0x428A2F98, 0x71374491, 0xC67178F2)


@pytest.mark.parametrize("count", [1, 7, 8, LANES, LANES + 1, 3 * LANES + 5])
@pytest.mark.parametrize("length", [0, 1, 53, 54, 55, 56, 63, 64, 118, 119, 200, 512, 1024])
def test_strided_messages_equal_hashlib(count: int, length: int) -> None:
    source = random_bytes(7 + count * (length + 3))
    out = np.full((2 * count + 1, 32), 0xAA, dtype=np.uint8)
    hash_strided(source, 7, length + 3, count, length, 1, out, 1, 2)
    for i in range(count):
        message = b"\x01" + source[7 + i * (length + 3) :][:length].tobytes()
        assert bytes(out[1 + 2 * i]) == sha256(message).digest()
        assert bytes(out[2 * i]) == b"\xaa" * 32


@pytest.mark.parametrize("program", [sha256_lanes, *([sha256_pairs] if sha256_pairs.AVAILABLE else [])])
@pytest.mark.parametrize("length", [0, 53, 54, 55, 63, 64, 118, 119, 512, 1024])
def test_every_compiled_program_equals_hashlib(program: Any, length: int) -> None:
    for count in (1, 2, 3, LANES, 2 * LANES + 1):
        source, out = random_bytes(5 + count * (length + 1)), np.zeros((3 * count, 32), dtype=np.uint8)
        program.hash_strided(source, 5, length + 1, count, length, 0, out.reshape(-1).view(np.uint32), 1, 2)
        for i in range(count):
            message = b"\x00" + source[5 + i * (length + 1) :][:length].tobytes()
            assert bytes(out[1 + 2 * i]) == sha256(message).digest()


@pytest.mark.skipif(not sha256_pairs.AVAILABLE, reason="no SHA instructions here")
def test_no_wide_register_is_in_use_among_sha_instructions() -> None:
    """What an Intel processor makes pay for it is told in verifier.sha256_pairs; another shows nothing."""
    program: Any = numba.njit(SIGNATURE, nogil=True)(sha256_pairs._hash_strided)
    lines = next(iter(program.inspect_asm().values())).splitlines()
    first, last = (
        next(i for i in order if "sha256rnds2" in lines[i])
        for order in (range(len(lines)), reversed(range(len(lines))))
    )
    wide = re.compile(r"%[yz]mm|vzeroupper")
    assert not [line for line in lines[first:last] if wide.search(line)]
    before = [line.strip() for line in lines[:first] if wide.search(line)]
    assert not before or before[-1] == "vzeroupper"


@pytest.mark.parametrize("settings", [{}, {"NUMBA_CPU_NAME": "generic"}])
def test_what_numba_is_told_to_compile_for_decides(settings: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import numpy as np; from verifier.sha256 import leaf_hashes; print(bytes(leaf_hashes(b'a' * 160, 10)).hex())"
    )
    env = os.environ | settings | {"NUMBA_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert bytes.fromhex(ran.stdout) == sha256(b"\x00" + b"a" * 10).digest() * 16


def test_read_only_and_unaligned_sources_hash_alike() -> None:
    source = random_bytes(4096)
    frozen = source.tobytes()
    assert np.array_equal(leaf_hashes(frozen[1:], 100), leaf_hashes(source[1:], 100))


def test_what_would_leave_the_arrays_is_refused() -> None:
    source, out = random_bytes(100), np.zeros((10, 32), dtype=np.uint8)
    for first, stride, count, length, out_first in ((0, 10, 11, 10, 0), (-1, 10, 10, 10, 0), (1, 10, 10, 10, 0)):
        with pytest.raises(IndexOutOfRange):
            hash_strided(source, first, stride, count, length, 0, out, out_first)
    with pytest.raises(IndexOutOfRange):
        hash_strided(source, 0, 10, 10, 10, 0, out, 1)
    with pytest.raises(IndexOutOfRange):
        hash_strided(source, 0, 10, 10, -10, 0, out)
    with pytest.raises(ValueError, match="contiguous"):
        hash_strided(source[::2], 0, 1, 10, 1, 0, out)
    with pytest.raises(ValueError, match="1 byte or more"):
        leaf_hashes(b"abc", 0)


@given(st.binary(max_size=700), st.integers(1, 70))
def test_leaves_equal_the_referees(data: bytes, leaf_bytes: int) -> None:
    expected = [tree.leaf(data[i : i + leaf_bytes]) for i in range(0, len(data), leaf_bytes)]
    assert [bytes(h) for h in leaf_hashes(data, leaf_bytes)] == expected


@given(st.integers(1, 20), st.integers(1, 70), st.integers(1, 64))
def test_row_leaves_never_cross_rows(count: int, width: int, leaf_elements: int) -> None:
    rows = random_bytes(2 * count * width).view(np.uint16).reshape(count, width)
    expected = [tree.leaf(row[c : c + leaf_elements].tobytes()) for row in rows for c in range(0, width, leaf_elements)]
    assert [bytes(h) for h in row_leaf_hashes(rows, leaf_elements)] == expected


@given(st.integers(1, 90), st.data())
@settings(deadline=None)
def test_trees_and_proofs_equal_the_referees(count: int, data: st.DataObject) -> None:
    hashes = [tree.leaf(bytes([i])) for i in range(count)]
    ours, theirs = HashTree(np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, 32)), tree.Tree(hashes)
    assert (ours.root, ours.depth, ours.count) == (theirs.root, theirs.depth, theirs.count)
    for level in range(ours.depth + 1):
        assert [bytes(h) for h in ours.nodes(level)] == theirs.nodes(level)
    first = data.draw(st.integers(0, count - 1))
    n = data.draw(st.integers(1, count - first))
    siblings = ours.prove(first, n)
    assert list(siblings) == theirs.prove(first, n)
    assert tree.root_of_range(hashes[first : first + n], first, count, siblings) == ours.root


@given(st.integers(1, 1100), st.integers(0, 10))
@settings(deadline=None, max_examples=30)
def test_climbing_is_pairing_up(count: int, levels: int) -> None:
    hashes = leaf_hashes(random_bytes(4 * count), 4)
    expected = [bytes(h) for h in hashes]
    for _ in range(levels):
        expected = tree.pair(expected)
    assert [bytes(h) for h in climb(hashes, levels)] == expected


def test_a_tree_of_two_worked_by_hand() -> None:
    left, right = sha256(b"\x00a").digest(), sha256(b"\x00bc").digest()
    two = HashTree.of([b"a", b"bc"])
    assert two.root == sha256(b"\x01" + left + right).digest()
    assert two.prove(0) == (right,) and two.prove(1) == (left,) and two.prove(0, 2) == ()
    assert bytes(parents(np.frombuffer(left, dtype=np.uint8).reshape(1, 32))[0]) == left


@pytest.mark.parametrize(("first", "n"), [(0, 0), (-1, 1), (3, 1), (2, 2)])
def test_ranges_outside_the_tree_are_refused(first: int, n: int) -> None:
    with pytest.raises(IndexOutOfRange):
        prove_range(3, first, n, lambda level, index: b"")


def test_no_tree_without_leaves() -> None:
    with pytest.raises(IndexOutOfRange):
        HashTree.of([])


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 33])
@pytest.mark.parametrize("trees", [1, 2, 9])
def test_trees_of_one_size_climb_together(trees: int, count: int) -> None:
    leaves = random_bytes(trees * count * 32).reshape(trees, count, 32)
    assert [bytes(root) for root in roots(leaves)] == [HashTree(tree_leaves).root for tree_leaves in leaves]
