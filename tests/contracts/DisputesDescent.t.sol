// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Descent} from "../../contracts/src/game/Descent.sol";
import {Records} from "../../contracts/src/game/Records.sol";
import {Tree} from "../../contracts/src/referee/Tree.sol";
import {Base} from "./Base.t.sol";

/// @title Every honest list has a place: shapes cover what is beneath them, without gap or overlap, down to one leaf or chunk
contract DisputesDescentTest is Base {
    function _levels(uint256 leaves) private pure {
        uint256 depth = Tree.depth(leaves);
        uint256 lists;
        for (uint256 above = depth; above > 0; ++lists) {
            uint256 level = Descent.nextLevel(depth, above);
            assertTrue(level < above && above - level <= 6, "a list goes down one to six levels");
            assertEq(Descent.parentLevel(depth, level), above, "the level above");
            uint256 nodes = Tree.nodes(leaves, above);
            uint256 first = Descent.children(leaves, level, above, 0);
            uint256 last = Descent.children(leaves, level, above, nodes - 1);
            assertTrue(last > 0 && last <= 64, "the last node has children");
            assertEq(
                nodes == 1 ? last : ((nodes - 1) << (above - level)) + last, Tree.nodes(leaves, level), "all nodes"
            );
            assertTrue(nodes == 1 || first == 1 << (above - level), "the first node is full");
            above = level;
        }
        assertEq(lists, (depth + 5) / 6, "one list for each six levels");
    }

    function test_levels_of_small_trees() external pure {
        for (uint256 leaves = 2; leaves < 300; ++leaves) {
            _levels(leaves);
        }
    }

    function testFuzz_levels(uint256 leaves) external pure {
        _levels(bound(leaves, 2, 1 << 58));
    }

    function _sums(uint256 first, uint256 end) private pure {
        while (end - first > 1) {
            uint256 entries = Descent.sums(end - first);
            assertTrue(entries > 1 && entries <= 32, "two to thirty-two entries");
            uint256 from = first;
            uint256 to;
            for (uint256 i = 0; i < entries; ++i) {
                (uint256 start, uint256 stop) = Descent.sumRange(first, end, i);
                assertEq(start, from, "no gap");
                assertTrue(stop > start, "none empty");
                (from, to) = (stop, stop);
            }
            assertEq(to, end, "all chunks");
            (first, end) = Descent.sumRange(first, end, end % entries);
        }
    }

    function test_sums_at_the_edges() external pure {
        uint256[9] memory counts = [uint256(2), 31, 32, 33, 63, 512, 1024, 1025, 32_769];
        for (uint256 i = 0; i < counts.length; ++i) {
            _sums(0, counts[i]);
        }
    }

    function testFuzz_sums(uint256 first, uint256 count) external pure {
        first = bound(first, 0, type(uint32).max - 1);
        _sums(first, first + bound(count, 1, type(uint32).max - first));
    }

    function test_leaf_bytes() external pure {
        assertEq(Descent.leafBytes(1, false, 0), 8, "one narrow element");
        assertEq(Descent.leafBytes(1, true, 0), 16, "one wide element");
        assertEq(Descent.leafBytes(64, false, 0), 512, "one full leaf");
        assertEq(Descent.leafBytes(128, true, 0), 2048, "one full wide leaf");
        assertEq(Descent.leafBytes(65, false, 0), 512, "full before the last");
        assertEq(Descent.leafBytes(65, false, 1), 8, "the rest");
        assertEq(Descent.leafBytes(129, true, 1), 16, "the rest, wide");
    }

    function test_records_are_read_totally() external pure {
        assertEq(Records.read(hex"0102", 0, 4), 0x01020000, "what is missing is zero");
        assertEq(Records.read(hex"0102", 2, 4), 0, "behind the end");
        assertEq(Records.read(hex"0102030405", 1, 4), 0x02030405, "inside");
        assertEq(Records.read("", 0, 32), 0, "nothing");
    }
}
