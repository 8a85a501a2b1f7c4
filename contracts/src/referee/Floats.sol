// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Fixed} from "./Fixed.sol";

/// @title Floats: decoding and adding raw floating-point bits
/// @notice docs/canonical.md, "Decoding a float" and "Adding floats as hardware does"; the Python twin is verifier/referee/floats.py.
library Floats {
    /// @dev No such dtype; known are 0 bfloat16, 1 float16, 2 float32.
    error UnknownDtype(uint256 dtype);

    uint256 internal constant BFLOAT16 = 0;
    uint256 internal constant FLOAT16 = 1;
    uint256 internal constant FLOAT32 = 2;

    /// @dev Fraction bits and range of served values: Q30, |v| < 2^20.
    uint256 internal constant SERVED_FRACTION = 30;
    uint256 internal constant SERVED_LIMIT = 20;
    /// @dev Range of weights: |v| < 2^8.
    uint256 internal constant WEIGHT_LIMIT = 8;
    /// @dev What VERDICT sees in place of a served value that is NaN, infinite or too large. No valid value comes near it.
    int256 internal constant INVALID = 1 << 62;

    /// @dev Of bfloat16 weights and served values: the exponent field of a number whose lowest mantissa bit is the lowest that is kept, and the
    /// lowest that is invalid.
    uint256 internal constant WEIGHT_BASE = 134 - 24;
    uint256 internal constant WEIGHT_BEYOND = 127 + WEIGHT_LIMIT;
    uint256 internal constant SERVED_BASE = 134 - SERVED_FRACTION;
    uint256 internal constant SERVED_BEYOND = 127 + SERVED_LIMIT;

    uint256 private constant INFINITY_32 = 0x7f800000;

    /// @notice Fraction bits of decoded weights, "G".
    function weightFraction(uint256 dtype) internal pure returns (uint256) {
        return dtype == FLOAT32 ? 32 : 24;
    }

    /// @notice Bytes of one element.
    function elementBytes(uint256 dtype) internal pure returns (uint256) {
        if (dtype > FLOAT32) revert UnknownDtype(dtype);
        return dtype == FLOAT32 ? 4 : 2;
    }

    // ---- reading

    /// @notice Raw bits of the elements first .. first+count-1 of little-endian `data`, which must hold them.
    function rawBits(bytes memory data, uint256 first, uint256 count, uint256 dtype)
        internal
        pure
        returns (int256[] memory bits)
    {
        uint256 lane = elementBytes(dtype) * 8;
        unchecked {
            // Room for a last word that is only partly wanted: whole words are unpacked, then the length is set right.
            bits = new int256[](count + 256 / lane);
        }
        assembly ("memory-safe") {
            let source := add(add(data, 32), shr(3, mul(first, lane)))
            let target := add(bits, 32)
            let end := add(target, mul(count, 32))
            let mask := sub(shl(lane, 1), 1)
            for {} lt(target, end) { source := add(source, 32) } {
                // Reverse the bytes of every lane of the word at once.
                let word := mload(source)
                word := or(
                    shl(8, and(word, 0x00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff)),
                    and(shr(8, word), 0x00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff)
                )
                if eq(lane, 32) {
                    word := or(
                        shl(16, and(word, 0x0000ffff0000ffff0000ffff0000ffff0000ffff0000ffff0000ffff0000ffff)),
                        and(shr(16, word), 0x0000ffff0000ffff0000ffff0000ffff0000ffff0000ffff0000ffff0000ffff)
                    )
                }
                // Four lanes a turn: the loop itself would cost as much as the lane.
                let step := mul(lane, 4)
                for { let shift := 256 } shift {} {
                    shift := sub(shift, step)
                    let four := shr(shift, word)
                    mstore(add(target, 96), and(four, mask))
                    four := shr(lane, four)
                    mstore(add(target, 64), and(four, mask))
                    four := shr(lane, four)
                    mstore(add(target, 32), and(four, mask))
                    mstore(target, and(shr(lane, four), mask))
                    target := add(target, 128)
                }
            }
            mstore(bits, count)
        }
    }

    /// @notice The elements first .. first+count-1 of little-endian served `data`, in Q30.
    /// @param instead what to read NaN, infinities and |v| >= 2^20 as
    function served(bytes memory data, uint256 first, uint256 count, uint256 dtype, int256 instead)
        internal
        pure
        returns (int256[] memory values)
    {
        if (dtype == BFLOAT16) return bfloatsAt(_at(data, first), count, SERVED_BASE, SERVED_BEYOND, instead);
        values = rawBits(data, first, count, dtype);
        decodeServed(values, dtype, instead);
    }

    /// @notice The elements first .. first+count-1 of little-endian weights, in QG; NaN, infinities and |v| >= 2^8 read as 0.
    function weights(bytes memory data, uint256 first, uint256 count, uint256 dtype)
        internal
        pure
        returns (int256[] memory values)
    {
        if (dtype == BFLOAT16) return bfloatsAt(_at(data, first), count, WEIGHT_BASE, WEIGHT_BEYOND, 0);
        values = rawBits(data, first, count, dtype);
        decodeWeights(values, dtype);
    }

    /// @dev Address of a two-byte element.
    function _at(bytes memory data, uint256 index) private pure returns (uint256 source) {
        assembly ("memory-safe") {
            source := add(add(data, 32), shl(1, index))
        }
    }

    /// @dev bfloat16, the dtype of nearly every model, from the address of the first, without a list of raw bits: sixteen of a word side by side
    /// where all are plain, else one by one.
    /// @param base the exponent field below which bits are lost
    /// @param beyond the lowest exponent field that is invalid
    function bfloatsAt(uint256 source, uint256 count, uint256 base, uint256 beyond, int256 instead)
        internal
        pure
        returns (int256[] memory values)
    {
        unchecked {
            // Whole words are decoded, then the length is set right.
            values = new int256[](count + 16);
        }
        uint256 target;
        uint256 end;
        assembly ("memory-safe") {
            target := add(values, 32)
            end := add(target, mul(count, 32))
            mstore(values, count)
        }
        while (target < end) {
            uint256 word;
            assembly ("memory-safe") {
                word := mload(source)
                source := add(source, 32)
            }
            (bool plain, uint256 mantissas, uint256 shifts) = lanes(word, base, beyond);
            assembly ("memory-safe") {
                // A lane that may be anything.
                function any(raw, low, tooHigh, other) -> value {
                    let exponent := and(shr(7, raw), 255)
                    // Zeros and subnormals: no hidden bit, and the exponent of the lowest normal numbers.
                    value := or(and(raw, 127), shl(7, gt(exponent, 0)))
                    value := shr(low, shl(or(exponent, iszero(exponent)), value))
                    if shr(15, raw) { value := sub(0, value) }
                    if iszero(lt(exponent, tooHigh)) { value := other }
                }
                switch plain
                case 0 {
                    for { let lane := 0 } lt(lane, 32) { lane := add(lane, 2) } {
                        let raw := or(byte(lane, word), shl(8, byte(add(lane, 1), word)))
                        mstore(add(target, shl(4, lane)), any(raw, base, beyond, instead))
                    }
                }
                default {
                    for { let place := target } lt(place, add(target, 512)) { place := add(place, 128) } {
                        mstore(place, shl(byte(1, shifts), sar(240, mantissas)))
                        mstore(add(place, 32), shl(byte(3, shifts), sar(240, shl(16, mantissas))))
                        mstore(add(place, 64), shl(byte(5, shifts), sar(240, shl(32, mantissas))))
                        mstore(add(place, 96), shl(byte(7, shifts), sar(240, shl(48, mantissas))))
                        mantissas := shl(64, mantissas)
                        shifts := shl(64, shifts)
                    }
                }
                target := add(target, 512)
            }
        }
    }

    /// @notice Sixteen bfloat16 of a little-endian word, taken apart side by side; lane i, of 16 bits, is element i.
    /// @param base the exponent field below which bits would be lost
    /// @param beyond the lowest exponent field that is invalid
    /// @return plain whether all are valid normal numbers that lose nothing; only then the rest means anything
    /// @return mantissas each with its hidden bit and its sign
    /// @return shifts by how much each is to be shifted left, in the lane's lower byte
    function lanes(uint256 word, uint256 base, uint256 beyond)
        internal
        pure
        returns (bool plain, uint256 mantissas, uint256 shifts)
    {
        assembly ("memory-safe") {
            let ones := 0x0001000100010001000100010001000100010001000100010001000100010001
            let low := 0x00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff
            word := or(shl(8, and(word, low)), and(shr(8, word), low))
            let magnitude := and(word, 0x7fff7fff7fff7fff7fff7fff7fff7fff7fff7fff7fff7fff7fff7fff7fff7fff)
            // A lane's sum reaches bit 15 exactly if its exponent field is at least `beyond`; or, in the second, at least `base`.
            let above := add(magnitude, mul(ones, sub(0x8000, shl(7, base))))
            plain := iszero(
                and(
                    or(add(magnitude, mul(ones, sub(0x8000, shl(7, beyond)))), not(above)),
                    0x8000800080008000800080008000800080008000800080008000800080008000
                )
            )
            shifts := and(shr(7, above), low)
            let negative := and(shr(15, word), ones)
            mantissas := or(
                and(magnitude, 0x007f007f007f007f007f007f007f007f007f007f007f007f007f007f007f007f),
                0x0080008000800080008000800080008000800080008000800080008000800080
            )
            // Two's complement in each lane: all ones are 2^16 - 1, and no mantissa is 0.
            mantissas := add(xor(mantissas, mul(negative, 0xffff)), negative)
        }
    }

    /// @notice Decodes raw bits of served values in place, to Q30.
    /// @param instead what to read NaN, infinities and |v| >= 2^20 as
    function decodeServed(int256[] memory bits, uint256 dtype, int256 instead) internal pure {
        decode(bits, dtype, SERVED_FRACTION, SERVED_LIMIT, instead);
    }

    /// @notice Decodes raw bits of weights in place, to QG; NaN, infinities and |v| >= 2^8 read as 0.
    function decodeWeights(int256[] memory bits, uint256 dtype) internal pure {
        decode(bits, dtype, weightFraction(dtype), WEIGHT_LIMIT, 0);
    }

    /// @notice Decodes raw bits in place: magnitude times 2^fraction truncated toward zero, the sign applied after.
    function decode(int256[] memory bits, uint256 dtype, uint256 fraction, uint256 limit, int256 instead)
        internal
        pure
    {
        uint256 mantissaBits;
        uint256 bias;
        uint256 beyond; // the lowest exponent field that is invalid
        uint256 magnitudeMask;
        if (dtype == BFLOAT16) (mantissaBits, bias, beyond, magnitudeMask) = (7, 127, 255, 0x7fff);
        else if (dtype == FLOAT16) (mantissaBits, bias, beyond, magnitudeMask) = (10, 15, 31, 0x7fff);
        else if (dtype == FLOAT32) (mantissaBits, bias, beyond, magnitudeMask) = (23, 127, 255, 0x7fffffff);
        else revert UnknownDtype(dtype);
        if (bias + limit < beyond) beyond = bias + limit;
        _decode(bits, mantissaBits, beyond - 1, magnitudeMask, bias + mantissaBits + 64 - fraction, instead);
    }

    /// @param normals how many exponent fields, from 1 on, stand for valid normal numbers
    /// @param down how far (mantissa << 64 + exponent field) is to be shifted down
    function _decode(
        int256[] memory bits,
        uint256 mantissaBits,
        uint256 normals,
        uint256 magnitudeMask,
        uint256 down,
        int256 instead
    ) private pure {
        assembly ("memory-safe") {
            let hidden := shl(mantissaBits, 1)
            let mantissaMask := sub(hidden, 1)
            let end := add(add(bits, 32), mul(mload(bits), 32))
            for { let place := add(bits, 32) } lt(place, end) { place := add(place, 32) } {
                let raw := mload(place)
                let exponent := shr(mantissaBits, and(raw, magnitudeMask))
                // Twice the sign bit, taken from 1, is the factor 1 or -1.
                let value :=
                    mul(
                        sub(1, shl(1, gt(raw, magnitudeMask))),
                        shr(down, shl(add(exponent, 64), or(and(raw, mantissaMask), hidden)))
                    )
                if iszero(lt(sub(exponent, 1), normals)) {
                    value := instead
                    if iszero(exponent) {
                        // Zero, or a subnormal: no hidden bit, and the exponent of the lowest normal numbers.
                        value := shr(down, shl(65, and(raw, mantissaMask)))
                        if gt(raw, magnitudeMask) { value := sub(0, value) }
                    }
                }
                mstore(place, value)
            }
        }
    }

    // ---- adding

    /// @notice The sum of two floats as raw bits: exact, rounded to float32, then to `dtype`, to nearest with ties to even.
    function add(uint256 dtype, uint256 a, uint256 b) internal pure returns (uint256) {
        (uint256 a32, uint256 b32) = (_widen(dtype, a), _widen(dtype, b));
        if (a32 & INFINITY_32 == INFINITY_32 || b32 & INFINITY_32 == INFINITY_32) {
            return dtype == BFLOAT16 ? 0x7fc0 : dtype == FLOAT16 ? 0x7e00 : 0x7fc00000;
        }
        return _narrow(dtype, _add32(a32, b32));
    }

    /// @dev The same number as float32 bits; exact.
    function _widen(uint256 dtype, uint256 bits) private pure returns (uint256) {
        unchecked {
            if (dtype == FLOAT32) return bits & 0xffffffff;
            if (dtype == BFLOAT16) return (bits & 0xffff) << 16;
            if (dtype != FLOAT16) revert UnknownDtype(dtype);
            uint256 sign = (bits & 0x8000) << 16;
            uint256 exponent = (bits >> 10) & 0x1f;
            uint256 mantissa = bits & 0x3ff;
            if (exponent == 31) return sign | INFINITY_32 | (mantissa << 13);
            if (exponent > 0) return sign | ((exponent + 112) << 23) | (mantissa << 13);
            if (mantissa == 0) return sign;
            // A subnormal float16 is a normal float32: bring its highest bit to the hidden place.
            exponent = 113;
            while (mantissa & 0x400 == 0) {
                mantissa <<= 1;
                --exponent;
            }
            return sign | (exponent << 23) | ((mantissa & 0x3ff) << 13);
        }
    }

    /// @dev Sum of two finite float32.
    function _add32(uint256 a, uint256 b) private pure returns (uint256) {
        unchecked {
            if (a & 0x7fffffff < b & 0x7fffffff) (a, b) = (b, a);
            (uint256 mantissaA, uint256 exponentA) = _parts32(a);
            (uint256 mantissaB, uint256 exponentB) = _parts32(b);
            // The larger magnitude sits 128 bits up, so the smaller one is exact for any distance up to 128. Beyond that only its being
            // there can matter to the rounding, and one unit says so.
            uint256 distance = exponentA - exponentB;
            uint256 large = mantissaA << 128;
            uint256 small = distance <= 128 ? mantissaB << (128 - distance) : mantissaB == 0 ? 0 : 1;
            uint256 sum = (a ^ b) >> 31 == 0 ? large + small : large - small;
            // Equal magnitudes of opposite sign give +0; two negative zeros give -0.
            if (sum == 0) return a & b & 0x80000000;
            return (a & 0x80000000) | _round(sum, int256(exponentA) - 128, 23, INFINITY_32);
        }
    }

    /// @dev Mantissa with its hidden bit, and the exponent field, which a subnormal shares with the lowest normal numbers.
    function _parts32(uint256 bits) private pure returns (uint256 mantissa, uint256 exponent) {
        exponent = (bits >> 23) & 0xff;
        mantissa = bits & 0x7fffff;
        if (exponent == 0) exponent = 1;
        else mantissa |= 0x800000;
    }

    /// @dev float32 bits to the nearest value of `dtype`.
    function _narrow(uint256 dtype, uint256 bits) private pure returns (uint256) {
        if (dtype == FLOAT32) return bits;
        unchecked {
            // bfloat16 is the upper half: half a unit, or a little less where the kept part is even, carries where it must.
            if (dtype == BFLOAT16) return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
            uint256 sign = (bits >> 16) & 0x8000;
            uint256 magnitude = bits & 0x7fffffff;
            if (magnitude == INFINITY_32) return sign | 0x7c00;
            if (magnitude == 0) return sign;
            (uint256 mantissa, uint256 exponent) = _parts32(magnitude);
            // In units of float16's lowest mantissa bit at the same exponent field: its bias is 112 lower, its mantissa 13 bits shorter.
            return sign | _round(mantissa << 115, int256(exponent) - 112 - 128, 10, 0x7c00);
        }
    }

    /// @dev Rounds a magnitude to the bits of a float with `mantissaBits` and no sign.
    /// @param value the magnitude, > 0, in units of a lowest mantissa bit at exponent field `exponent` (which may be out of the format's range)
    /// @param infinity bits to return on overflow
    function _round(uint256 value, int256 exponent, uint256 mantissaBits, uint256 infinity)
        private
        pure
        returns (uint256)
    {
        unchecked {
            // How many low bits go: as many as leave mantissaBits + 1, or more where the exponent field would fall below 1.
            // A sum of normal numbers nearly always ends at one of the two places tried first.
            uint256 top = value >> 151 == 1 ? 151 : value >> 152 == 1 ? 152 : Fixed.log2(value);
            int256 drop = int256(top) - int256(mantissaBits);
            if (exponent + drop < 1) drop = 1 - exponent;
            uint256 kept = value >> uint256(drop);
            uint256 lost = value & ((1 << uint256(drop)) - 1);
            uint256 half = 1 << uint256(drop - 1);
            if (lost > half || (lost == half && kept & 1 == 1)) ++kept;
            // The hidden bit carries into the exponent field, and so does a mantissa that rounds up to the next power of two.
            uint256 bits = (uint256(exponent + drop - 1) << mantissaBits) + kept;
            return bits < infinity ? bits : infinity;
        }
    }
}
