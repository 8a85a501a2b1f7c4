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
        if (dtype == BFLOAT16) return _bfloats(data, first, count, SERVED_FRACTION, SERVED_LIMIT, instead);
        values = rawBits(data, first, count, dtype);
        decodeServed(values, dtype, instead);
    }

    /// @notice The elements first .. first+count-1 of little-endian weights, in QG; NaN, infinities and |v| >= 2^8 read as 0.
    function weights(bytes memory data, uint256 first, uint256 count, uint256 dtype)
        internal
        pure
        returns (int256[] memory values)
    {
        if (dtype == BFLOAT16) return _bfloats(data, first, count, weightFraction(dtype), WEIGHT_LIMIT, 0);
        values = rawBits(data, first, count, dtype);
        decodeWeights(values, dtype);
    }

    /// @dev bfloat16, the dtype of nearly every model, without a list of raw bits: sixteen lanes of a word are taken apart side by side where all
    /// are normal numbers that lose nothing to truncation, and one by one where any is not.
    function _bfloats(bytes memory data, uint256 first, uint256 count, uint256 fraction, uint256 limit, int256 instead)
        private
        pure
        returns (int256[] memory values)
    {
        unchecked {
            // Whole words are decoded, then the length is set right.
            values = new int256[](count + 16);
        }
        uint256 source;
        uint256 target;
        assembly ("memory-safe") {
            source := add(add(data, 32), shl(1, first))
            target := add(values, 32)
            mstore(values, count)
        }
        // The exponent field of a number whose lowest mantissa bit is 2^-fraction: below it bits are lost; and the lowest that is invalid.
        _bfloatWords(source, target, target + 32 * count, 134 - fraction, 127 + limit, instead);
    }

    /// @dev Decodes words from `source` on to `target` .. `end`, and what the last word holds besides.
    function _bfloatWords(uint256 source, uint256 target, uint256 end, uint256 base, uint256 beyond, int256 instead)
        private
        pure
    {
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
            for {} lt(target, end) { source := add(source, 32) } {
                let word := mload(source)
                word := or(
                    shl(8, and(word, 0x00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff)),
                    and(shr(8, word), 0x00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff)
                )
                let magnitude := and(word, 0x7fff7fff7fff7fff7fff7fff7fff7fff7fff7fff7fff7fff7fff7fff7fff7fff)
                let shift := 0x0001000100010001000100010001000100010001000100010001000100010001
                // A lane's sum reaches bit 15 exactly if its exponent field is at least `beyond`; or, in the second, at least `base`.
                switch and(
                    or(
                        add(magnitude, mul(shift, sub(0x8000, shl(7, beyond)))),
                        not(add(magnitude, mul(shift, sub(0x8000, shl(7, base)))))
                    ),
                    0x8000800080008000800080008000800080008000800080008000800080008000
                )
                case 0 {
                    shift := sub(
                        and(shr(7, magnitude), 0x00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff),
                        mul(shift, base)
                    )
                    magnitude := or(
                        and(word, 0x007f007f007f007f007f007f007f007f007f007f007f007f007f007f007f007f),
                        0x0080008000800080008000800080008000800080008000800080008000800080
                    )
                    // Twice the sign bit, taken from 1, is the factor.
                    word := and(shr(14, word), 0x0002000200020002000200020002000200020002000200020002000200020002)
                    // Eight lanes, then the other eight. INVARIANT: every magnitude has its hidden bit, so 0 means that both were done.
                    for {} magnitude { magnitude := shl(128, magnitude) } {
                        mstore(target, mul(sub(1, byte(1, word)), shl(byte(1, shift), byte(1, magnitude))))
                        mstore(add(target, 32), mul(sub(1, byte(3, word)), shl(byte(3, shift), byte(3, magnitude))))
                        mstore(add(target, 64), mul(sub(1, byte(5, word)), shl(byte(5, shift), byte(5, magnitude))))
                        mstore(add(target, 96), mul(sub(1, byte(7, word)), shl(byte(7, shift), byte(7, magnitude))))
                        mstore(add(target, 128), mul(sub(1, byte(9, word)), shl(byte(9, shift), byte(9, magnitude))))
                        mstore(add(target, 160), mul(sub(1, byte(11, word)), shl(byte(11, shift), byte(11, magnitude))))
                        mstore(add(target, 192), mul(sub(1, byte(13, word)), shl(byte(13, shift), byte(13, magnitude))))
                        mstore(add(target, 224), mul(sub(1, byte(15, word)), shl(byte(15, shift), byte(15, magnitude))))
                        target := add(target, 256)
                        word := shl(128, word)
                        shift := shl(128, shift)
                    }
                }
                default {
                    for { let lane := 256 } lane {} {
                        lane := sub(lane, 16)
                        mstore(target, any(and(shr(lane, word), 0xffff), base, beyond, instead))
                        target := add(target, 32)
                    }
                }
            }
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
