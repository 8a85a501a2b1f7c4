// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Codec} from "../../../contracts/src/referee/Codec.sol";
import {Floats} from "../../../contracts/src/referee/Floats.sol";
import {Ops} from "../../../contracts/src/referee/Ops.sol";
import {Packed} from "../../../contracts/src/referee/Packed.sol";
import {Base} from "../Base.t.sol";

/// @title What is summed straight from the bytes is what the lists amount to
contract PackedTest is Base {
    uint256 private constant MOST = 70;

    /// @param odd how many of 256 floats are any bits at all; the others are plain
    function testFuzz_LinearIsThatOfTheLists(uint256 seed, uint8 count_, uint8 first_, uint8 odd) public pure {
        (uint256 count, uint256 first) = (bound(uint256(count_), 1, MOST), bound(uint256(first_), 0, 20));
        (bytes memory x, bytes memory y) = _operands(seed, first + count, odd);
        int256[] memory weights = Floats.weights(y, first, count, Floats.BFLOAT16);
        int256 expected = Ops.dot(Codec.decodeValues(x, first, count, false), weights);
        assertEq(Packed.linear(_at(x, 8 * first), _at(y, 2 * first), count), expected, "sum of products");
    }

    function testFuzz_VerdictIsThatOfTheLists(uint256 seed, uint8 count_, uint8 first_, uint8 odd, uint64 num)
        public
        pure
    {
        (uint256 count, uint256 first) = (bound(uint256(count_), 1, MOST), bound(uint256(first_), 0, 20));
        (bytes memory x, bytes memory y) = _operands(seed, first + count, odd);
        int256[][] memory args = new int256[][](3);
        args[0] = Codec.decodeValues(x, first, count, false);
        args[1] = Floats.served(y, first, count, Floats.BFLOAT16, Floats.INVALID);
        args[2] = new int256[](3);
        // About half are out of tolerance: the ratio of two sums of like numbers.
        (args[2][0], args[2][1], args[2][2]) = (int256(uint256(num >> 32)), int256(1 << 28), int256(seed & 0xffff));
        uint256 a = uint256(1) << (seed % 64);
        int256 value = Packed.verdict(_at(x, 8 * first), _at(y, 2 * first), count, a, args[2]);
        assertEq(value, Ops.verdict(args, a), "verdict");
    }

    /// @dev Integers of all sizes, and floats around both the range of weights and that of served values.
    function _operands(uint256 seed, uint256 count, uint256 odd) private pure returns (bytes memory x, bytes memory y) {
        for (uint256 i = 0; i < count; ++i) {
            uint256 word = uint256(keccak256(abi.encode(seed, i)));
            x = bytes.concat(x, bytes8(uint64(word >> (word >> 250))));
            bool any = (word >> 200) & 0xff < odd;
            uint256 bits = any ? word >> 64 & 0xffff : (word >> 64 & 0x807f) | ((115 + (word >> 80) % 16) << 7);
            y = bytes.concat(y, bytes1(uint8(bits)), bytes1(uint8(bits >> 8)));
        }
    }

    function _at(bytes memory data, uint256 offset) private pure returns (uint256 place) {
        assembly ("memory-safe") {
            place := add(add(data, 32), offset)
        }
    }
}
