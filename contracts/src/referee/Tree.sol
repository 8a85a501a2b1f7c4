// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @title Tree: SHA-256 trees as in RFC 6962
/// @notice docs/canonical.md, "Trees"; the Python twin is verifier/referee/tree.py.
/// @dev Level 0 is the leaves; neighbours pair up; an unpaired last node is carried up unchanged.
library Tree {
    /// @dev Nodes first .. first+length-1 do not lie within a level of `count` nodes, or there are none.
    error IndexOutOfRange(uint256 first, uint256 length, uint256 count);
    /// @dev The proof needed `expected` siblings (at least, when there were too few).
    error ProofLength(uint256 expected, uint256 actual);

    function leaf(bytes memory data) internal pure returns (bytes32) {
        return sha256(bytes.concat(bytes1(0x00), data));
    }

    /// @notice Hashes of concatenated leaves of `size` bytes each; the last may be shorter.
    function leaves(bytes memory data, uint256 size) internal pure returns (bytes32[] memory hashes) {
        unchecked {
            uint256 length = data.length;
            hashes = new bytes32[]((length + size - 1) / size);
            bytes memory prefixed = new bytes(size + 1);
            for (uint256 i = 0; i < hashes.length; ++i) {
                uint256 start = i * size;
                uint256 bytesHere = length - start < size ? length - start : size;
                assembly ("memory-safe") {
                    mstore(prefixed, add(bytesHere, 1))
                    mcopy(add(prefixed, 33), add(add(data, 32), start), bytesHere)
                }
                hashes[i] = _sha256(prefixed);
            }
        }
    }

    function node(bytes32 left, bytes32 right) internal pure returns (bytes32) {
        return sha256(bytes.concat(bytes1(0x01), left, right));
    }

    /// @notice Levels above the leaves of a tree of `count` leaves: ceil(log2 count).
    function depth(uint256 count) internal pure returns (uint256 levels) {
        if (count > 1) {
            for (--count; count > 0; count >>= 1) {
                ++levels;
            }
        }
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
        used = from;
        // One buffer for all nodes' preimages.
        bytes memory preimage = new bytes(65);
        preimage[0] = 0x01;
        unchecked {
            for (; count > 1; (first, count) = (first >> 1, (count + 1) >> 1)) {
                // INVARIANT: right is the index in the list of a pair's right half, and right >> 1 that of its parent, which never overtakes its
                // children. The first pair's left half is a sibling where the list starts at an odd node.
                uint256 right = 1 - (first & 1);
                for (; right <= length; right += 2) {
                    bytes32 l;
                    bytes32 r;
                    if (right == 0) l = _sibling(siblings, used++);
                    else l = hashes[right - 1];
                    if (right < length) {
                        r = hashes[right];
                    } else if (first + right < count) {
                        r = _sibling(siblings, used++);
                    } else {
                        hashes[right >> 1] = l;
                        continue;
                    }
                    assembly ("memory-safe") {
                        mstore(add(preimage, 33), l)
                        mstore(add(preimage, 65), r)
                    }
                    hashes[right >> 1] = _sha256(preimage);
                }
                length = right >> 1;
            }
        }
        root = hashes[0];
    }

    /// @dev SHA-256 by the precompile, read in place. Rationale: the built-in function copies its argument first and costs twice as much on a
    /// node; calling the precompile is as pure, but the compiler lets no pure function do it, so the function's type is changed.
    function _sha256(bytes memory preimage) private pure returns (bytes32) {
        function(bytes memory) view returns (bytes32) called = _precompile;
        function(bytes memory) pure returns (bytes32) typed;
        assembly ("memory-safe") {
            typed := called
        }
        return typed(preimage);
    }

    function _precompile(bytes memory preimage) private view returns (bytes32 hash) {
        assembly ("memory-safe") {
            // SAFETY: fails for lack of gas alone; then nothing must be taken for the hash.
            if iszero(staticcall(gas(), 2, add(preimage, 32), mload(preimage), 0, 32)) { revert(0, 0) }
            hash := mload(0)
        }
    }

    function _sibling(bytes32[] memory siblings, uint256 index) private pure returns (bytes32) {
        if (index >= siblings.length) revert ProofLength(index + 1, siblings.length);
        return siblings[index];
    }
}
