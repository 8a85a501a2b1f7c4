// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Floats} from "../../../contracts/src/referee/Floats.sol";
import {Base} from "../Base.t.sol";

contract FloatsTest is Base {
    function test_RevertsOnAnUnknownDtype() public {
        vm.expectRevert(abi.encodeWithSelector(Floats.UnknownDtype.selector, 3));
        this.size(3);
    }

    function size(uint256 dtype) external pure returns (uint256) {
        return Floats.elementBytes(dtype);
    }

    function testFuzz_OppositeBitsDecodeToOppositeValues(uint32 raw, uint8 kind) public pure {
        uint256 dtype = kind % 3;
        uint256 magnitude = raw & (_sign(dtype) - 1);
        int256 value = _decode(magnitude, dtype, -1);
        if (value != -1) assertEq(_decode(magnitude | _sign(dtype), dtype, -1), -value, "opposite");
        else assertEq(_decode(magnitude | _sign(dtype), dtype, -1), -1, "invalid alike");
    }

    function testFuzz_DecodeRisesWithTheBits(uint32 a, uint32 b, uint8 kind) public pure {
        uint256 dtype = kind % 3;
        (uint256 low, uint256 high) = (a & (_sign(dtype) - 1), b & (_sign(dtype) - 1));
        if (low > high) (low, high) = (high, low);
        // Invalid magnitudes are the largest of all.
        assertTrue(_decode(low, dtype, 1 << 60) <= _decode(high, dtype, 1 << 60), "monotone");
    }

    function testFuzz_ValidServedValuesStayBelow2To50(uint32 raw, uint8 kind) public pure {
        int256 value = _decode(raw & (2 * _sign(kind % 3) - 1), kind % 3, 0);
        assertTrue(value < 1 << 50 && value > -(1 << 50), "bound");
    }

    function testFuzz_AddCommutes(uint32 a, uint32 b, uint8 kind) public pure {
        assertEq(Floats.add(kind % 3, a, b), Floats.add(kind % 3, b, a), "commutes");
    }

    function testFuzz_ZeroAddsNothing(uint32 raw, uint8 kind) public pure {
        uint256 dtype = kind % 3;
        uint256 bits = raw & (2 * _sign(dtype) - 1);
        uint256 expected = _finite(bits, dtype) ? bits : _nan(dtype);
        // +0 + -0 is +0.
        if (bits == _sign(dtype)) expected = 0;
        assertEq(Floats.add(dtype, bits, 0), expected, "x + 0");
    }

    function testFuzz_OppositesCancelToPlusZero(uint32 raw, uint8 kind) public pure {
        uint256 dtype = kind % 3;
        uint256 bits = raw & (2 * _sign(dtype) - 1);
        assertEq(Floats.add(dtype, bits, bits ^ _sign(dtype)), _finite(bits, dtype) ? 0 : _nan(dtype), "x - x");
    }

    function testFuzz_DoublingRaisesTheExponent(uint32 raw, uint8 kind) public pure {
        uint256 dtype = kind % 3;
        uint256 unit = _infinity(dtype) & (~_infinity(dtype) + 1);
        uint256 bits = bound(uint256(raw), unit, _infinity(dtype) - unit - 1);
        assertEq(Floats.add(dtype, bits, bits), bits + unit, "2x");
    }

    function testFuzz_RawBitsAreLittleEndian(bytes32 a, bytes32 b, uint8 first, uint8 count) public pure {
        bytes memory data = bytes.concat(a, b);
        uint256 from = bound(uint256(first), 0, 31);
        uint256 many = bound(uint256(count), 0, 32 - from);
        int256[] memory bits = Floats.rawBits(data, from, many, Floats.BFLOAT16);
        assertEq(bits.length, many, "length");
        for (uint256 i = 0; i < many; ++i) {
            uint256 place = 2 * (from + i);
            assertEq(bits[i], int256(uint256(uint8(data[place])) | (uint256(uint8(data[place + 1])) << 8)), "element");
        }
    }

    function _decode(uint256 raw, uint256 dtype, int256 instead) private pure returns (int256) {
        int256[] memory bits = new int256[](1);
        bits[0] = int256(raw);
        Floats.decodeServed(bits, dtype, instead);
        return bits[0];
    }

    function _sign(uint256 dtype) private pure returns (uint256) {
        return dtype == Floats.FLOAT32 ? 1 << 31 : 1 << 15;
    }

    function _infinity(uint256 dtype) private pure returns (uint256) {
        return dtype == Floats.BFLOAT16 ? 0x7f80 : dtype == Floats.FLOAT16 ? 0x7c00 : 0x7f800000;
    }

    function _nan(uint256 dtype) private pure returns (uint256) {
        return dtype == Floats.BFLOAT16 ? 0x7fc0 : dtype == Floats.FLOAT16 ? 0x7e00 : 0x7fc00000;
    }

    function _finite(uint256 bits, uint256 dtype) private pure returns (bool) {
        return bits & _infinity(dtype) != _infinity(dtype);
    }
}
