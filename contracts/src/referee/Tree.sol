// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";

/// @title Tree: SHA-256 trees as in RFC 6962
/// @notice docs/canonical.md, "Trees"; the Python twin is verifier/referee/tree.py.
/// @dev Level 0 is the leaves; neighbours pair up; an unpaired last node is carried up unchanged.
library Tree {
    /// @dev Nodes first .. first+length-1 do not lie within a level of `count` nodes, or there are none.
    error IndexOutOfRange(uint256 first, uint256 length, uint256 count);
    /// @dev The proof needed `expected` siblings (at least, when there were too few).
    error ProofLength(uint256 expected, uint256 actual);

    function leaf(bytes memory data) internal pure returns (bytes32) {
        uint256 start;
        assembly ("memory-safe") {
            start := add(data, 32)
        }
        return _pure(_leafAt)(start, data.length);
    }

    /// @notice As `leaf`, of bytes that are still in calldata.
    function leafOf(bytes calldata data) internal pure returns (bytes32) {
        bytes memory copy = data;
        return leaf(copy);
    }

    /// @notice Hashes of concatenated leaves of `size` bytes each; the last may be shorter.
    function leaves(bytes memory data, uint256 size) internal pure returns (bytes32[] memory hashes) {
        unchecked {
            uint256 length = data.length;
            hashes = new bytes32[]((length + size - 1) / size);
            uint256 start;
            assembly ("memory-safe") {
                start := add(data, 32)
            }
            for (uint256 i = 0; i < hashes.length; ++i) {
                uint256 bytesHere = length < size ? length : size;
                hashes[i] = _pure(_leafAt)(start, bytesHere);
                (start, length) = (start + bytesHere, length - bytesHere);
            }
        }
    }

    function node(bytes32 left, bytes32 right) internal pure returns (bytes32) {
        return sha256(bytes.concat(bytes1(0x01), left, right));
    }

    /// @notice Levels above the leaves of a tree of `count` leaves: ceil(log2 count).
    function depth(uint256 count) internal pure returns (uint256 levels) {
        return Math.log2(count, Math.Rounding.Ceil);
    }

    /// @notice Nodes of level `level` in a tree of `count` leaves: ceil(count / 2^level).
    function nodes(uint256 count, uint256 level) internal pure returns (uint256) {
        if (count == 0) return 0;
        return ((count - 1) >> level) + 1;
    }

    /// @notice The node above a whole list of neighbours, the first of which is a leftmost descendant of that node.
    /// @dev A children list pairs up like a tree of its own. Overwrites `hashes`.
    function fold(bytes32[] memory hashes) internal pure returns (bytes32) {
        return rootOfRange(hashes, 0, hashes.length, new bytes32[](0));
    }

    /// @notice Root of a tree from the nodes first .. first+hashes.length-1 of a level that has `count` nodes.
    /// @dev Overwrites `hashes`. Every sibling must be used.
    function rootOfRange(bytes32[] memory hashes, uint256 first, uint256 count, bytes32[] memory siblings)
        internal
        pure
        returns (bytes32 root)
    {
        uint256 used;
        (root, used) = climb(hashes, first, count, siblings, 0);
        if (used != siblings.length) revert ProofLength(used, siblings.length);
    }

    /// @notice As `rootOfRange`, taking its siblings from `siblings[from]` on and leaving the rest to the next tree.
    /// @return root the root that the nodes and siblings imply
    /// @return used how many siblings are used so far, `from` included
    function climb(bytes32[] memory hashes, uint256 first, uint256 count, bytes32[] memory siblings, uint256 from)
        internal
        pure
        returns (bytes32 root, uint256 used)
    {
        uint256 length = hashes.length;
        if (length == 0 || count < length || first > count - length) revert IndexOutOfRange(first, length, count);
        used = _pure(_climb)(hashes, first, count, siblings, from);
        if (used > siblings.length) revert ProofLength(used, siblings.length);
        root = hashes[0];
    }

    /// @dev Pairs up level by level, in place. Stops at the first sibling that is missing, and counts it.
    function _climb(bytes32[] memory hashes, uint256 first, uint256 count, bytes32[] memory siblings, uint256 used)
        private
        view
        returns (uint256)
    {
        // Assembly because a list of 64 nodes is 63 hashes, and a proof from a vocabulary 25: a loop of checked accesses would cost four times
        // the hashing itself.
        assembly ("memory-safe") {
            let list := add(hashes, 32)
            let length := mload(hashes)
            // One preimage for all nodes, behind what is allocated: prefix, left half, right half.
            let preimage := mload(0x40)
            let left := add(preimage, 1)
            mstore8(preimage, 1)
            for {} gt(length, 1) {} {
                // INVARIANT: a parent is written where its children have been read, so the place written never overtakes the place read.
                let read := list
                let write := list
                let end := add(list, shl(5, length))
                if and(first, 1) {
                    used := add(used, 1)
                    if gt(used, mload(siblings)) { break }
                    mstore(left, mload(add(siblings, shl(5, used))))
                    mstore(add(left, 32), mload(read))
                    // SAFETY: fails for lack of gas alone; then nothing must be taken for the hash.
                    if iszero(staticcall(gas(), 2, preimage, 65, write, 32)) { revert(0, 0) }
                    read := add(read, 32)
                    write := add(write, 32)
                }
                for {} lt(add(read, 32), end) { read := add(read, 64) } {
                    mcopy(left, read, 64)
                    if iszero(staticcall(gas(), 2, preimage, 65, write, 32)) { revert(0, 0) }
                    write := add(write, 32)
                }
                if lt(read, end) {
                    switch lt(add(first, length), count)
                    case 0 { mstore(write, mload(read)) } // unpaired: carried up
                    default {
                        used := add(used, 1)
                        if gt(used, mload(siblings)) { break }
                        mstore(left, mload(read))
                        mstore(add(left, 32), mload(add(siblings, shl(5, used))))
                        if iszero(staticcall(gas(), 2, preimage, 65, write, 32)) { revert(0, 0) }
                    }
                    write := add(write, 32)
                }
                length := shr(5, sub(write, list))
                first := shr(1, first)
                count := shr(1, add(count, 1))
            }
            // The way up of a single node, which is most of every proof: it or its sibling stands to the left. It has one unless it is
            // the last of an odd number.
            let alone := mload(list)
            for { let last := sub(count, 1) } last { last := shr(1, last) } {
                if iszero(gt(xor(first, 1), last)) {
                    used := add(used, 1)
                    if gt(used, mload(siblings)) { break }
                    let place := shl(5, and(first, 1))
                    mstore(add(left, place), alone)
                    mstore(add(left, xor(place, 32)), mload(add(siblings, shl(5, used))))
                    if iszero(staticcall(gas(), 2, preimage, 65, 0, 32)) { revert(0, 0) }
                    alone := mload(0)
                }
                first := shr(1, first)
            }
            mstore(list, alone)
        }
        return used;
    }

    /// @dev SHA-256 by the precompile, of a leaf's bytes in memory. Rationale: the built-in function copies its argument first; here the prefix
    /// stands for a moment in the byte before.
    function _leafAt(uint256 start, uint256 length) private view returns (bytes32 hash) {
        assembly ("memory-safe") {
            let before := mload(sub(start, 32))
            mstore8(sub(start, 1), 0)
            // SAFETY: fails for lack of gas alone; then nothing must be taken for the hash.
            if iszero(staticcall(gas(), 2, sub(start, 1), add(length, 1), 0, 32)) { revert(0, 0) }
            mstore(sub(start, 32), before)
            hash := mload(0)
        }
    }

    /// @dev Calling the precompile is as pure as the built-in function, but the compiler lets no pure function do it: the functions' types are
    /// changed.
    function _pure(function(uint256, uint256) view returns (bytes32) called)
        private
        pure
        returns (function(uint256, uint256) pure returns (bytes32) typed)
    {
        assembly ("memory-safe") {
            typed := called
        }
    }

    function _pure(function(bytes32[] memory, uint256, uint256, bytes32[] memory, uint256)
            view returns (uint256) called)
        private
        pure
        returns (function(bytes32[] memory, uint256, uint256, bytes32[] memory, uint256) pure returns (uint256) typed)
    {
        assembly ("memory-safe") {
            typed := called
        }
    }
}
