// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Codec} from "../referee/Codec.sol";
import {Ops} from "../referee/Ops.sol";
import {Tree} from "../referee/Tree.sol";
import {Instruction, Model, Operand} from "../interfaces/IReferee.sol";

/// @title Descent: the shape of every list that a game may post
/// @notice docs/protocol.md, "The game", 3. All shapes follow from the instruction, the position and the unit, never from the caller.
library Descent {
    /// @dev Levels of a tree that one list of nodes goes down, at most: with six no game takes a seventh move.
    uint256 private constant LIST_LEVELS = 6;
    /// @dev Bytes of one partial sum, an i128.
    uint256 internal constant SUM_BYTES = 16;
    /// @dev Rationale: a quoted byte costs up to 40 gas, hashing it when the list is posted not one.
    uint256 internal constant PIECE_BYTES = 128;
    uint8 private constant STEP = 1; // operand source
    uint256 private constant MODEL_BYTES = 14 * 32;

    /// @notice A model's id, of the bytes as they came: with a value too large for its field it is no model's.
    function modelId(Model calldata model) internal pure returns (bytes32 hash) {
        uint256 size = MODEL_BYTES;
        assembly ("memory-safe") {
            let copy := mload(0x40)
            calldatacopy(copy, model, size)
            hash := keccak256(copy, size)
        }
    }

    // ---- nodes

    /// @notice Concatenated words as a list.
    function words(bytes calldata list) internal pure returns (bytes32[] memory copy) {
        copy = new bytes32[](list.length / 32);
        assembly ("memory-safe") {
            calldatacopy(add(copy, 32), list.offset, shl(5, mload(copy)))
        }
    }

    /// @notice keccak256 of concatenated words, as they came.
    function hashOf(bytes32[] calldata list) internal pure returns (bytes32 hash) {
        assembly ("memory-safe") {
            let copy := mload(0x40)
            let size := shl(5, list.length)
            calldatacopy(copy, list.offset, size)
            hash := keccak256(copy, size)
        }
    }

    /// @notice Root of a tree of `count` nodes, from one of them.
    function rootOf(bytes32 node, uint256 index, uint256 count, bytes32[] memory siblings)
        internal
        pure
        returns (bytes32)
    {
        bytes32[] memory nodes = new bytes32[](1);
        nodes[0] = node;
        return Tree.rootOfRange(nodes, index, count, siblings);
    }

    /// @notice Levels that each list of nodes goes down in a tree of that depth > 0 (the last may go fewer).
    function levelsPerList(uint256 depth) internal pure returns (uint256) {
        uint256 lists = (depth + LIST_LEVELS - 1) / LIST_LEVELS;
        return (depth + lists - 1) / lists;
    }

    /// @notice Level of the list beneath a node at `level` > 0.
    function nextLevel(uint256 depth, uint256 level) internal pure returns (uint256) {
        uint256 levels = levelsPerList(depth);
        return level > levels ? level - levels : 0;
    }

    /// @notice Level of the node above a list at `level`.
    function parentLevel(uint256 depth, uint256 level) internal pure returns (uint256) {
        uint256 levels = levelsPerList(depth);
        // All lists but the last go down exactly `levels`, from the depth on; the last ends at 0, from whatever they left.
        return level > 0 ? level + levels : depth - (depth - 1) / levels * levels;
    }

    /// @notice Length of the list at `level` beneath node `parent` of `above`, in a tree of `leaves` leaves.
    function children(uint256 leaves, uint256 level, uint256 above, uint256 parent) internal pure returns (uint256) {
        uint256 first = parent << (above - level);
        uint256 end = (parent + 1) << (above - level);
        uint256 nodes = Tree.nodes(leaves, level);
        return (end < nodes ? end : nodes) - first;
    }

    // ---- elements

    /// @notice Bytes of leaf `index` of a vector.
    function leafBytes(uint256 elements, bool wide, uint256 index) internal pure returns (uint256) {
        uint256 size = Codec.elementBytes(wide);
        uint256 full = Codec.leafBytes(wide);
        uint256 rest = elements * size - index * full;
        return rest < full ? rest : full;
    }

    // ---- pieces of a list of elements or sums: who disputes one entry quotes its piece, and the hashes of the others

    /// @notice What a game remembers of such a list: keccak256 of the hashes of its pieces, keccak256 as well.
    function told(bytes memory list) internal pure returns (bytes32 hash) {
        uint256 size = PIECE_BYTES;
        assembly ("memory-safe") {
            let hashes := mload(0x40)
            let write := hashes
            let read := add(list, 32)
            for { let end := add(read, mload(list)) } lt(read, end) { read := add(read, size) } {
                let rest := sub(end, read)
                if gt(rest, size) { rest := size }
                mstore(write, keccak256(read, rest))
                write := add(write, 32)
            }
            hash := keccak256(hashes, sub(write, hashes))
        }
    }

    /// @notice As `told`, from one piece and the hashes of the others.
    /// @dev SAFETY: `index` is at most the number of the others.
    function toldBy(bytes calldata piece, uint256 index, bytes32[] calldata others)
        internal
        pure
        returns (bytes32 hash)
    {
        bytes32 own = keccak256(piece);
        assembly ("memory-safe") {
            let hashes := mload(0x40)
            let before := shl(5, index)
            let all := shl(5, others.length)
            calldatacopy(hashes, others.offset, before)
            mstore(add(hashes, before), own)
            calldatacopy(add(add(hashes, before), 32), add(others.offset, before), sub(all, before))
            hash := keccak256(hashes, add(all, 32))
        }
    }

    /// @notice Bytes of piece `index`: the last may be shorter.
    function pieceBytes(uint256 length, uint256 index) internal pure returns (uint256) {
        uint256 rest = length - index * PIECE_BYTES;
        return rest < PIECE_BYTES ? rest : PIECE_BYTES;
    }

    // ---- partial sums

    /// @notice Entries of the list that covers `chunks` chunks.
    function sums(uint256 chunks) internal pure returns (uint256) {
        uint256 span = Codec.span(chunks);
        return (chunks + span - 1) / span;
    }

    /// @notice The chunks that entry `pick` of the list over first .. end-1 covers.
    function sumRange(uint256 first, uint256 end, uint256 pick) internal pure returns (uint256 from, uint256 to) {
        uint256 span = Codec.span(end - first);
        from = first + pick * span;
        to = from + span < end ? from + span : end;
    }

    /// @notice All entries of a list of partial sums put together.
    function combine(uint8 op, bytes memory list) internal pure returns (int256 total) {
        int256[][] memory entries = new int256[][](1);
        entries[0] = Codec.decodeValues(list, 0, list.length / SUM_BYTES, true);
        total = Ops.combine(op, entries);
    }

    /// @notice The element that a list of partial sums over all its chunks amounts to, encoded.
    function finished(Instruction memory ins, bytes memory list) internal pure returns (bytes memory) {
        return Codec.encodeValue(Ops.finish(ins.op, combine(ins.op, list), ins.a), ins.wide != 0);
    }

    // ---- instructions

    /// @notice Whether instruction `step` reads only vectors that were agreed before it.
    function readsEarlier(Instruction memory ins, uint256 step) internal pure returns (bool) {
        return _earlier(ins.x, step) && _earlier(ins.y, step) && _earlier(ins.z, step);
    }

    /// @notice Of the roots of all vectors those that instruction `step` reads, in the order of its operands.
    function readRoots(Instruction memory ins, uint256 step, bytes calldata roots)
        internal
        pure
        returns (bytes memory)
    {
        return bytes.concat(_read(ins.x, step, roots), _read(ins.y, step, roots), _read(ins.z, step, roots));
    }

    /// @dev Empty for what is not read: of an instruction that reads later ones no proof is taken.
    function _read(Operand memory operand, uint256 step, bytes calldata roots) private pure returns (bytes memory) {
        if (operand.source != STEP || operand.id >= step) return "";
        return roots[32 * uint256(operand.id):32 * uint256(operand.id) + 32];
    }

    function _earlier(Operand memory operand, uint256 step) private pure returns (bool) {
        return operand.source != STEP || operand.id < step;
    }
}
