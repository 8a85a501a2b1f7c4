// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Floats} from "../../../contracts/src/referee/Floats.sol";

/// @title What holds of Floats for every input: proved by halmos (`make prove`), not tried
contract FloatsProofs {
    function _served(uint256 bits, uint256 dtype) private pure returns (int256) {
        int256[] memory one = new int256[](1);
        one[0] = int256(bits);
        Floats.decodeServed(one, dtype, Floats.INVALID);
        return one[0];
    }

    function _weight(uint256 bits, uint256 dtype) private pure returns (int256) {
        int256[] memory one = new int256[](1);
        one[0] = int256(bits);
        Floats.decodeWeights(one, dtype);
        return one[0];
    }

    function _bounded(int256 value) private pure {
        assert(value == Floats.INVALID || (value > -(1 << 50) && value < 1 << 50));
    }

    function check_servedBfloat16IsInvalidOrBelow2To20(uint16 bits) external pure {
        int256 value = _served(bits, Floats.BFLOAT16);
        _bounded(value);
        // NaN, infinities and 2^20 and up are invalid, nothing else is.
        assert((value == Floats.INVALID) == ((bits & 0x7fff) >= 0x4980));
    }

    function check_servedFloat16IsInvalidOrBelow2To20(uint16 bits) external pure {
        int256 value = _served(bits, Floats.FLOAT16);
        _bounded(value);
        assert((value == Floats.INVALID) == ((bits & 0x7fff) >= 0x7c00));
    }

    function check_servedFloat32IsInvalidOrBelow2To20(uint32 bits) external pure {
        int256 value = _served(bits, Floats.FLOAT32);
        _bounded(value);
        assert((value == Floats.INVALID) == ((bits & 0x7fffffff) >= 0x49800000));
    }

    function check_weightsAreBelow2To8(uint32 bits) external pure {
        int256 small = _weight(bits & 0xffff, Floats.BFLOAT16);
        assert(small > -(1 << 32) && small < 1 << 32);
        int256 large = _weight(bits, Floats.FLOAT32);
        assert(large > -(1 << 40) && large < 1 << 40);
    }

    function check_oppositeBitsDecodeToOppositeValues(uint32 bits) external pure {
        int256 value = _served(bits, Floats.FLOAT32);
        if (value == Floats.INVALID) return;
        assert(_served(bits ^ 0x80000000, Floats.FLOAT32) == -value);
    }

    function check_decodingRisesWithTheBits(uint32 a, uint32 b) external pure {
        if (a > b || b > 0x7fffffff) return;
        assert(_served(a, Floats.FLOAT32) <= _served(b, Floats.FLOAT32));
    }

    function check_zeroAddsNothingInBfloat16(uint16 a) external pure {
        if (a & 0x7f80 == 0x7f80 || a == 0x8000) return;
        assert(Floats.add(Floats.BFLOAT16, a, 0) == a);
    }

    function check_oppositesCancelInBfloat16(uint16 a) external pure {
        if (a & 0x7f80 == 0x7f80) return;
        assert(Floats.add(Floats.BFLOAT16, a, a ^ 0x8000) == 0);
    }

    function check_whatIsNoNumberStaysNone(uint16 a, uint16 b) external pure {
        if (a & 0x7f80 != 0x7f80) return;
        assert(Floats.add(Floats.BFLOAT16, a, b) == 0x7fc0);
    }
}
