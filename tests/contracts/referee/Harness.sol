// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Instruction} from "../../../contracts/src/interfaces/IReferee.sol";
import {Codec, SegmentHeader} from "../../../contracts/src/referee/Codec.sol";
import {Fixed} from "../../../contracts/src/referee/Fixed.sol";
import {Floats} from "../../../contracts/src/referee/Floats.sol";
import {Ops} from "../../../contracts/src/referee/Ops.sol";
import {Sampling} from "../../../contracts/src/referee/Sampling.sol";
import {Tree} from "../../../contracts/src/referee/Tree.sol";

/// @title Harness: the referee's libraries, made callable for the twin tests
contract Harness {
    // ---- Fixed

    function rs(int256 x, uint256 s) external pure returns (int256) {
        return Fixed.rs(x, s);
    }

    function cl(int256 x) external pure returns (int256) {
        return Fixed.cl(x);
    }

    function isqrt(uint256 x) external pure returns (uint256) {
        return Fixed.isqrt(x);
    }

    function exp2(int256 d) external pure returns (int256) {
        return Fixed.exp2(d);
    }

    function silu(int256 g) external pure returns (int256) {
        return Fixed.silu(g);
    }

    function sincos(uint256 position, uint256 frequency) external pure returns (int256, int256) {
        return Fixed.sincos(position, frequency);
    }

    // ---- Floats

    /// @notice Decodes a whole list at once; what is invalid reads as Floats.INVALID.
    function decode(int256[] memory bits, uint8 dtype, uint256 fraction, uint256 limit)
        external
        pure
        returns (int256[] memory)
    {
        Floats.decode(bits, dtype, fraction, limit, Floats.INVALID);
        return bits;
    }

    function rawBits(bytes memory data, uint256 first, uint256 count, uint8 dtype)
        external
        pure
        returns (int256[] memory)
    {
        return Floats.rawBits(data, first, count, dtype);
    }

    function served(bytes memory data, uint256 first, uint256 count, uint8 dtype, int256 instead)
        external
        pure
        returns (int256[] memory)
    {
        return Floats.served(data, first, count, dtype, instead);
    }

    function weights(bytes memory data, uint256 first, uint256 count, uint8 dtype)
        external
        pure
        returns (int256[] memory)
    {
        return Floats.weights(data, first, count, dtype);
    }

    function add(uint8 dtype, uint256[] memory a, uint256[] memory b) external pure returns (uint256[] memory sums) {
        sums = new uint256[](a.length);
        for (uint256 i = 0; i < a.length; ++i) {
            sums[i] = Floats.add(dtype, a[i], b[i]);
        }
    }

    // ---- Tree

    function leaf(bytes memory data) external pure returns (bytes32) {
        return Tree.leaf(data);
    }

    function leaves(bytes memory data, uint256 size) external pure returns (bytes32[] memory) {
        return Tree.leaves(data, size);
    }

    function node(bytes32 left, bytes32 right) external pure returns (bytes32) {
        return Tree.node(left, right);
    }

    function depth(uint256 count) external pure returns (uint256) {
        return Tree.depth(count);
    }

    function nodes(uint256 count, uint256 level) external pure returns (uint256) {
        return Tree.nodes(count, level);
    }

    function fold(bytes32[] memory hashes) external pure returns (bytes32) {
        return Tree.fold(hashes);
    }

    function rootOfRange(bytes32[] memory hashes, uint256 first, uint256 count, bytes32[] memory siblings)
        external
        pure
        returns (bytes32)
    {
        return Tree.rootOfRange(hashes, first, count, siblings);
    }

    // ---- Codec

    function encodeValue(int256 value, bool wide) external pure returns (bytes memory) {
        return Codec.encodeValue(value, wide);
    }

    function decodeValues(bytes memory data, uint256 first, uint256 count, bool wide)
        external
        pure
        returns (int256[] memory)
    {
        return Codec.decodeValues(data, first, count, wide);
    }

    function instruction(bytes memory data) external pure returns (Instruction memory) {
        return Codec.instruction(data);
    }

    function header(bytes memory data) external pure returns (SegmentHeader memory) {
        return Codec.header(data);
    }

    function counts(bytes memory data, uint256 position, uint256 unit)
        external
        pure
        returns (uint256 elements, uint256 chunks, uint256 span)
    {
        Instruction memory ins = Codec.instruction(data);
        elements = Codec.elementCount(ins, position, unit);
        chunks = Codec.chunkCount(ins, position);
        span = Codec.span(chunks);
    }

    // ---- Sampling

    function gumbel(uint256 x) external pure returns (int256) {
        return Sampling.gumbel(x);
    }

    function mix(uint256 z) external pure returns (uint256) {
        return Sampling.mix(z);
    }

    // ---- Ops

    function combine(uint8 op, int256[][] calldata parts) external pure returns (int256) {
        return Ops.combine(op, parts);
    }
}
