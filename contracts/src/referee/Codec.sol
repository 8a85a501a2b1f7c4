// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Instruction, Operand} from "../interfaces/IReferee.sol";

/// @notice Where a segment kind's instructions stand in the program tree, and how many heads, blocks or tokens a challenge may name.
struct SegmentHeader {
    uint32 first;
    uint32 steps;
    uint32 units;
}

/// @title Codec: bytes to values and counts
/// @notice docs/canonical.md, "Integer vectors" and "Instruction"; the Python twin is verifier/referee/codec.py.
library Codec {
    /// @dev A leaf or record must have exactly `expected` bytes.
    error DataLength(uint256 expected, uint256 actual);

    /// @dev Elements of a full leaf of a row of served or stored floats, and of a hand-off's record.
    uint256 internal constant BLOCK = 256;
    /// @dev Elements of a full leaf of an integer vector. Rationale: the one long vector of wide elements, WSUM's, has two lists of partial sums
    /// beneath; with 128 a leaf one list of nodes leads there even from the 64 heads of a 70B model.
    uint256 private constant NARROW_LEAF = 64;
    uint256 private constant WIDE_LEAF = 128;
    uint256 internal constant HEADER_BYTES = 16;
    uint256 internal constant INSTRUCTION_BYTES = 128;
    /// @dev Terms of one chunk of a sum, and of a WSUM, whose chunk is a column of one tile of v.
    uint256 internal constant CHUNK_TERMS = 256;
    uint256 internal constant WSUM_TERMS = 8;
    /// @dev Logits of a chunk of RANK and MASS: 1024 chunks, two lists of sums, hold a vocabulary of 131,072.
    uint256 internal constant FOLD_TERMS = 128;
    uint8 private constant WSUM = 11;
    uint8 private constant RANK = 19;
    uint8 private constant MASS = 20;
    /// @dev `terms` of a sum over all positions up to the judged one.
    uint32 internal constant TERMS_CAUSAL = type(uint32).max;

    // ---- integer vectors

    /// @notice Bytes of one element.
    function elementBytes(bool wide) internal pure returns (uint256) {
        return wide ? 16 : 8;
    }

    /// @notice Elements of a full leaf.
    function elementsPerLeaf(bool wide) internal pure returns (uint256) {
        return wide ? WIDE_LEAF : NARROW_LEAF;
    }

    /// @notice Bytes of a full leaf.
    function leafBytes(bool wide) internal pure returns (uint256) {
        return elementsPerLeaf(wide) * elementBytes(wide);
    }

    /// @notice Leaves of a vector of `elements` elements.
    function leafCount(uint256 elements, bool wide) internal pure returns (uint256) {
        return (elements + elementsPerLeaf(wide) - 1) / elementsPerLeaf(wide);
    }

    /// @notice Zigzag, big-endian. A value that the width cannot hold (no honest list has one) keeps its low bits.
    function encodeValue(int256 value, bool wide) internal pure returns (bytes memory) {
        // Arithmetic shift: all ones for a negative value, so the exclusive or is -2x-1 there and 2x elsewhere.
        uint256 zigzag = uint256((value << 1) ^ (value >> 255));
        return wide ? abi.encodePacked(uint128(zigzag)) : abi.encodePacked(uint64(zigzag));
    }

    /// @notice Element `index` of concatenated leaves.
    function decodeValue(bytes memory data, uint256 index, bool wide) internal pure returns (int256) {
        return decodeValues(data, index, 1, wide)[0];
    }

    /// @notice Elements first .. first+count-1 of concatenated leaves.
    function decodeValues(bytes memory data, uint256 first, uint256 count, bool wide)
        internal
        pure
        returns (int256[] memory values)
    {
        uint256 size = elementBytes(wide);
        // SAFETY: `valuesAt` reads memory unchecked.
        if (data.length < (first + count) * size) revert DataLength((first + count) * size, data.length);
        uint256 source;
        assembly ("memory-safe") {
            source := add(add(data, 32), mul(first, size))
        }
        return valuesAt(source, count, wide);
    }

    /// @notice As `decodeValues`, from the address of the first.
    function valuesAt(uint256 source, uint256 count, bool wide) internal pure returns (int256[] memory values) {
        // Room for three more: a word of narrow elements is unpacked as a whole, then the length is set right. What is read past the end is
        // never seen.
        values = new int256[](count + 3);
        assembly ("memory-safe") {
            mstore(values, count)
            let target := add(values, 32)
            let end := add(target, mul(count, 32))
            switch wide
            case 0 {
                // Four elements a word, unzigzagged side by side: halved, and inverted where the low bit was set (that bit times 2^64-1 is
                // all ones in its own element).
                let low := 0x0000000000000001000000000000000100000000000000010000000000000001
                let half := 0x7fffffffffffffff7fffffffffffffff7fffffffffffffff7fffffffffffffff
                for {} lt(target, end) { target := add(target, 128) } {
                    let word := mload(source)
                    word := xor(and(shr(1, word), half), mul(and(word, low), 0xffffffffffffffff))
                    mstore(target, sar(192, word))
                    mstore(add(target, 32), signextend(7, shr(128, word)))
                    mstore(add(target, 64), signextend(7, shr(64, word)))
                    mstore(add(target, 96), signextend(7, word))
                    source := add(source, 32)
                }
            }
            default {
                for {} lt(target, end) { target := add(target, 32) } {
                    let zigzag := shr(128, mload(source))
                    mstore(target, xor(shr(1, zigzag), sub(0, and(zigzag, 1))))
                    source := add(source, 16)
                }
            }
        }
    }

    // ---- programs

    /// @notice Reads an instruction from its program leaf.
    function instruction(bytes memory data) internal pure returns (Instruction memory ins) {
        if (data.length != INSTRUCTION_BYTES) revert DataLength(INSTRUCTION_BYTES, data.length);
        (uint256 word, uint256 x, uint256 y, uint256 z) = _words(data);
        ins.op = uint8(word >> 248);
        ins.wide = uint8(word >> 240);
        ins.rows = uint32(word >> 208);
        ins.cols = uint32(word >> 176);
        ins.limit = uint32(word >> 144);
        ins.terms = uint32(word >> 112);
        ins.a = uint64(word >> 48);
        ins.b = uint32(word >> 16);
        ins.x = _operand(x);
        ins.y = _operand(y);
        ins.z = _operand(z);
    }

    /// @notice Reads a segment kind's header from its program leaf.
    function header(bytes memory data) internal pure returns (SegmentHeader memory head) {
        if (data.length != HEADER_BYTES) revert DataLength(HEADER_BYTES, data.length);
        uint256 word = uint256(bytes32(data));
        head.first = uint32(word >> 224);
        head.steps = uint32(word >> 192);
        head.units = uint32(word >> 160);
    }

    /// @dev SAFETY: the length was checked. abi.decode would check it once more, a word at a time.
    function _words(bytes memory data) private pure returns (uint256 word, uint256 x, uint256 y, uint256 z) {
        assembly ("memory-safe") {
            word := mload(add(data, 32))
            x := mload(add(data, 64))
            y := mload(add(data, 96))
            z := mload(add(data, 128))
        }
    }

    function _operand(uint256 word) private pure returns (Operand memory operand) {
        operand.source = uint8(word >> 248);
        operand.id = uint8(word >> 240);
        operand.base = uint64(word >> 176);
        operand.layerStride = uint64(word >> 112);
        operand.unitStride = uint32(word >> 80);
        operand.width = uint32(word >> 48);
    }

    // ---- counts; the caller of a game never states one, they all follow from the program and the place judged

    /// @notice P: the length of a row over positions 0..position, padded to whole chunks.
    function paddedPositions(uint256 position) internal pure returns (uint256) {
        return (position / CHUNK_TERMS + 1) * CHUNK_TERMS;
    }

    /// @notice Elements of an instruction's vector.
    function elementCount(Instruction memory ins, uint256 position, uint256 unit) internal pure returns (uint256) {
        return vectorLength(ins.rows, ins.cols, ins.limit, position, unit);
    }

    /// @notice As `elementCount`, from the shape alone: a STEP operand carries its source's.
    function vectorLength(uint256 rows, uint256 cols, uint256 limit, uint256 position, uint256 unit)
        internal
        pure
        returns (uint256)
    {
        if (cols == 0) return rows * paddedPositions(position);
        if (limit == 0) return rows * cols;
        uint256 start = unit * cols;
        if (start >= limit) return 0;
        return rows * (limit - start < cols ? limit - start : cols);
    }

    /// @notice Terms of the sum that yields one element; 0 for a step that is computed at once.
    function termCount(Instruction memory ins, uint256 position) internal pure returns (uint256) {
        return ins.terms == TERMS_CAUSAL ? position + 1 : ins.terms;
    }

    /// @notice Terms of one chunk of an op's sums.
    function chunkTerms(uint8 op) internal pure returns (uint256) {
        if (op == RANK || op == MASS) return FOLD_TERMS;
        return op == WSUM ? WSUM_TERMS : CHUNK_TERMS;
    }

    /// @notice Chunks of the sum that yields one element; 1 for a step that is computed at once.
    function chunkCount(Instruction memory ins, uint256 position) internal pure returns (uint256) {
        uint256 terms = termCount(ins, position);
        if (terms == 0) return 1;
        uint256 size = chunkTerms(ins.op);
        return (terms + size - 1) / size;
    }

    /// @notice Chunks that each entry of a list of partial sums over `chunks` chunks covers: the smallest power of 32 that keeps the
    /// list at 32 entries or fewer.
    function span(uint256 chunks) internal pure returns (uint256 covered) {
        covered = 1;
        while (covered * 32 < chunks) covered *= 32;
    }
}
