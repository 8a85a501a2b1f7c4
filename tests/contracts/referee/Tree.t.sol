// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Tree} from "../../../contracts/src/referee/Tree.sol";
import {Base} from "../Base.t.sol";

contract TreeTest is Base {
    function test_RevertsOnARangeBeyondTheLevel() public {
        vm.expectRevert(abi.encodeWithSelector(Tree.IndexOutOfRange.selector, 3, 2, 4));
        this.root(new bytes32[](2), 3, 4, new bytes32[](0));
        vm.expectRevert(abi.encodeWithSelector(Tree.IndexOutOfRange.selector, type(uint256).max, 2, 4));
        this.root(new bytes32[](2), type(uint256).max, 4, new bytes32[](0));
        vm.expectRevert(abi.encodeWithSelector(Tree.IndexOutOfRange.selector, 0, 0, 4));
        this.root(new bytes32[](0), 0, 4, new bytes32[](0));
    }

    function test_RevertsOnAWrongNumberOfSiblings() public {
        vm.expectRevert(abi.encodeWithSelector(Tree.ProofLength.selector, 2, 1));
        this.root(new bytes32[](1), 0, 4, new bytes32[](1));
        vm.expectRevert(abi.encodeWithSelector(Tree.ProofLength.selector, 2, 3));
        this.root(new bytes32[](1), 0, 4, new bytes32[](3));
    }

    function root(bytes32[] memory hashes, uint256 first, uint256 count, bytes32[] memory siblings)
        external
        pure
        returns (bytes32)
    {
        return Tree.rootOfRange(hashes, first, count, siblings);
    }

    function testFuzz_EveryRangeProvesTheRootOfRfc6962(uint8 count_, uint8 first_, uint8 length_, bytes32 seed)
        public
        pure
    {
        uint256 count = bound(uint256(count_), 1, 40);
        uint256 first = bound(uint256(first_), 0, count - 1);
        uint256 length = bound(uint256(length_), 1, count - first);
        bytes32[] memory all = _hashes(count, seed);
        bytes32 expected = _rfc6962(all, 0, count);
        bytes32[] memory siblings = _siblings(all, first, length);
        assertEq(Tree.rootOfRange(_slice(all, first, length), first, count, siblings), expected, "root");
    }

    function testFuzz_AForeignSiblingProvesAnotherRoot(uint8 count_, uint8 first_, uint8 which, bytes32 seed)
        public
        pure
    {
        uint256 count = bound(uint256(count_), 2, 40);
        uint256 first = bound(uint256(first_), 0, count - 1);
        bytes32[] memory all = _hashes(count, seed);
        bytes32[] memory siblings = _siblings(all, first, 1);
        siblings[which % siblings.length] = keccak256(abi.encode(seed));
        bytes32 proved = Tree.rootOfRange(_slice(all, first, 1), first, count, siblings);
        assertTrue(proved != _rfc6962(all, 0, count), "root");
    }

    function testFuzz_FoldIsTheRootOfAllLeaves(uint8 count, bytes32 seed) public pure {
        bytes32[] memory all = _hashes(bound(uint256(count), 1, 70), seed);
        bytes32 expected = _rfc6962(all, 0, all.length);
        assertEq(Tree.fold(all), expected, "fold");
    }

    function testFuzz_LevelsShrinkToOneNode(uint40 count_) public pure {
        uint256 count = bound(uint256(count_), 1, type(uint40).max);
        uint256 depth = Tree.depth(count);
        assertEq(Tree.nodes(count, 0), count, "leaves");
        assertEq(Tree.nodes(count, depth), 1, "root");
        if (depth > 0) assertTrue(Tree.nodes(count, depth - 1) == 2, "two below the root");
        for (uint256 level = 0; level < depth; ++level) {
            assertEq(Tree.nodes(count, level + 1), (Tree.nodes(count, level) + 1) / 2, "halved");
        }
    }

    function testFuzz_LeavesCutTheDataWithoutChangingIt(bytes memory data, uint8 size_) public pure {
        uint256 size = bound(uint256(size_), 1, 255);
        bytes32 before = keccak256(data);
        bytes32[] memory hashes = Tree.leaves(data, size);
        assertEq(keccak256(data), before, "data");
        assertEq(hashes.length, (data.length + size - 1) / size, "leaves");
        for (uint256 i = 0; i < hashes.length; ++i) {
            uint256 rest = data.length - i * size;
            bytes memory part = new bytes(rest < size ? rest : size);
            for (uint256 j = 0; j < part.length; ++j) {
                part[j] = data[i * size + j];
            }
            assertEq(hashes[i], Tree.leaf(part), "leaf");
        }
    }

    /// @dev MTH of RFC 6962, by its own recursive definition: split at the largest power of two below the length.
    function _rfc6962(bytes32[] memory all, uint256 from, uint256 to) private pure returns (bytes32) {
        if (to - from == 1) return all[from];
        uint256 half = 1;
        while (half * 2 < to - from) half *= 2;
        return sha256(abi.encodePacked(uint8(1), _rfc6962(all, from, from + half), _rfc6962(all, from + half, to)));
    }

    function _siblings(bytes32[] memory all, uint256 first, uint256 length)
        private
        pure
        returns (bytes32[] memory out)
    {
        bytes32[] memory level = _slice(all, 0, all.length);
        uint256 end = first + length;
        bytes32[] memory found = new bytes32[](32);
        uint256 used = 0;
        while (level.length > 1) {
            if (first % 2 == 1) found[used++] = level[first - 1];
            if (end % 2 == 1 && end < level.length) found[used++] = level[end];
            bytes32[] memory above = new bytes32[]((level.length + 1) / 2);
            for (uint256 i = 0; i < above.length; ++i) {
                bool alone = 2 * i + 1 == level.length;
                above[i] = alone ? level[2 * i] : sha256(abi.encodePacked(uint8(1), level[2 * i], level[2 * i + 1]));
            }
            (level, first, end) = (above, first / 2, (end + 1) / 2);
        }
        return _slice(found, 0, used);
    }

    function _slice(bytes32[] memory all, uint256 first, uint256 length) private pure returns (bytes32[] memory part) {
        part = new bytes32[](length);
        for (uint256 i = 0; i < length; ++i) {
            part[i] = all[first + i];
        }
    }

    function _hashes(uint256 count, bytes32 seed) private pure returns (bytes32[] memory all) {
        all = new bytes32[](count);
        for (uint256 i = 0; i < count; ++i) {
            all[i] = keccak256(abi.encode(seed, i));
        }
    }
}
