"""verifier.referee.tree: range proofs, children lists and the shape of trees."""

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier.referee.errors import IndexOutOfRange, ProofLength
from verifier.referee.tree import Tree, depth, fold, leaf, node, nodes_at, root, root_of_range, root_of_range_used

LEAVES = [leaf(bytes([i])) for i in range(70)]


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int, int]:
    """(leaves, first, length) of a range within a tree."""
    n = draw(st.integers(1, 70))
    first = draw(st.integers(0, n - 1))
    return n, first, draw(st.integers(1, n - first))


@given(ranges())
def test_a_range_proof_gives_the_root_and_uses_every_sibling(case: tuple[int, int, int]) -> None:
    n, first, length = case
    tree = Tree(LEAVES[:n])
    siblings = tree.prove(first, length)
    hashes = LEAVES[first : first + length]
    assert root_of_range(hashes, first, n, siblings) == tree.root == root(LEAVES[:n])
    with pytest.raises(ProofLength):
        root_of_range(hashes, first, n, [*siblings, LEAVES[0]])
    for i in range(len(siblings)):
        with pytest.raises(ProofLength):
            root_of_range(hashes, first, n, siblings[:i])
        changed = [*siblings[:i], leaf(b"other"), *siblings[i + 1 :]]
        assert root_of_range(hashes, first, n, changed) != tree.root


@given(ranges())
def test_a_proof_that_goes_on_says_what_it_used(case: tuple[int, int, int]) -> None:
    n, first, length = case
    tree = Tree(LEAVES[:n])
    siblings = tree.prove(first, length)
    hashes = LEAVES[first : first + length]
    assert root_of_range_used(hashes, first, n, [*siblings, LEAVES[0]]) == (tree.root, len(siblings))


@given(ranges(), st.data())
def test_children_pair_up_to_their_parent(case: tuple[int, int, int], data: st.DataObject) -> None:
    tree = Tree(LEAVES[: case[0]])
    top = data.draw(st.integers(0, tree.depth))
    level = data.draw(st.integers(0, top))
    p = data.draw(st.integers(0, len(tree.nodes(top)) - 1))
    assert fold(tree.children(level, top, p)) == tree.nodes(top)[p]


@given(st.integers(1, 70))
def test_levels_have_the_sizes_of_the_law(n: int) -> None:
    tree = Tree(LEAVES[:n])
    assert tree.depth == depth(n)
    assert [len(tree.nodes(k)) for k in range(tree.depth + 1)] == [nodes_at(n, k) for k in range(depth(n) + 1)]
    assert nodes_at(n, depth(n)) == 1


def test_a_tree_of_five_by_hand() -> None:
    a, b, c, d, e = LEAVES[:5]
    assert a == sha256(b"\x00\x00").digest()
    left = node(node(a, b), node(c, d))
    assert root(LEAVES[:5]) == sha256(b"\x01" + left + e).digest()
    assert Tree(LEAVES[:5]).prove(1, 2) == [a, d, e]
    assert Tree(LEAVES[:5]).prove(4) == [left]


@pytest.mark.parametrize(("length", "first", "count"), [(0, 0, 3), (1, 3, 3), (2, 2, 3), (4, 0, 3), (1, 0, 0)])
def test_a_range_outside_the_level_is_refused(length: int, first: int, count: int) -> None:
    with pytest.raises(IndexOutOfRange):
        root_of_range(LEAVES[:length], first, count, [])


def test_what_a_tree_does_not_hold_is_refused() -> None:
    tree = Tree(LEAVES[:5])
    for first, n in ((0, 0), (5, 1), (4, 2), (-1, 1)):
        with pytest.raises(IndexOutOfRange):
            tree.prove(first, n)
    for level, top, p in ((2, 1, 0), (0, 1, 3), (0, 9, 0), (0, 1, -1)):
        with pytest.raises(IndexOutOfRange):
            tree.children(level, top, p)
    with pytest.raises(IndexOutOfRange):
        Tree([])
    with pytest.raises(IndexOutOfRange):
        fold([])
