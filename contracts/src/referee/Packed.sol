// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Codec} from "./Codec.sol";
import {Floats} from "./Floats.sol";
import {Ops} from "./Ops.sol";

/// @title Packed: the long sums of most games, straight from the bytes that were opened
/// @notice What Ops.linear and Ops.distance yield of narrow integers and bfloat16. Rationale: to decode both into lists first costs more than the sum.
/// @dev Sixteen pairs a turn. The last few, and those with a float that is not plain (see Floats.lanes), take the way through lists.
/// SAFETY: memory is read unchecked from the addresses handed over.
library Packed {
    uint256 private constant GROUP = 16;

    /// @notice The sum of products of `count` integers at `x` and weights at `y`.
    function linear(uint256 x, uint256 y, uint256 count) internal pure returns (int256 total) {
        unchecked {
            for (uint256 n; count > 0; (x, y, count) = (x + 8 * n, y + 2 * n, count - n)) {
                n = count < GROUP ? count : GROUP;
                (bool plain, uint256 mantissas, uint256 shifts) =
                    Floats.lanes(_word(y), Floats.WEIGHT_BASE, Floats.WEIGHT_BEYOND);
                if (plain && n == GROUP) {
                    total += _products(x, mantissas, shifts);
                } else {
                    int256[] memory weights = Floats.bfloatsAt(y, n, Floats.WEIGHT_BASE, Floats.WEIGHT_BEYOND, 0);
                    total += Ops.dot(Codec.valuesAt(x, n, false), weights);
                }
            }
        }
    }

    /// @notice As Ops.verdict, of `count` integers at `x` and served values at `y`.
    function verdict(uint256 x, uint256 y, uint256 count, uint256 a, int256[] memory cell)
        internal
        pure
        returns (int256)
    {
        (bool bad, uint256 total, uint256 size) = _distance(x, y, count, a);
        return bad || Ops.outside(total, size, count, cell) ? int256(1) : int256(0);
    }

    /// @dev As Ops.distance.
    function _distance(uint256 x, uint256 y, uint256 count, uint256 a)
        private
        pure
        returns (bool bad, uint256 total, uint256 size)
    {
        unchecked {
            while (count > 0) {
                uint256 n = count < GROUP ? count : GROUP;
                (bool plain, uint256 more, uint256 sizes) =
                    Floats.lanes(_word(y), Floats.SERVED_BASE, Floats.SERVED_BEYOND);
                if (plain && n == GROUP) {
                    (more, sizes) = _squares(x, more, sizes);
                } else {
                    (bad, more, sizes) = _listed(x, y, n, a);
                    if (bad) break;
                }
                total += more;
                size += sizes;
                x += 8 * n;
                y += 2 * n;
                count -= n;
            }
        }
    }

    function _listed(uint256 x, uint256 y, uint256 n, uint256 a) private pure returns (bool, uint256, uint256) {
        int256[] memory served = Floats.bfloatsAt(y, n, Floats.SERVED_BASE, Floats.SERVED_BEYOND, Floats.INVALID);
        return Ops.distance(Codec.valuesAt(x, n, false), served, a);
    }

    /// @dev The sum of products of sixteen integers with as many lanes.
    function _products(uint256 x, uint256 mantissas, uint256 shifts) private pure returns (int256 total) {
        assembly ("memory-safe") {
            for { let end := add(x, 128) } lt(x, end) { x := add(x, 32) } {
                // Four integers a word, unzigzagged as in Codec.decodeValues.
                let word := mload(x)
                word := xor(
                    and(shr(1, word), 0x7fffffffffffffff7fffffffffffffff7fffffffffffffff7fffffffffffffff),
                    mul(
                        and(word, 0x0000000000000001000000000000000100000000000000010000000000000001),
                        0xffffffffffffffff
                    )
                )
                let t := mul(sar(192, word), shl(byte(1, shifts), sar(240, mantissas)))
                t := add(t, mul(sar(192, shl(64, word)), shl(byte(3, shifts), sar(240, shl(16, mantissas)))))
                t := add(t, mul(sar(192, shl(128, word)), shl(byte(5, shifts), sar(240, shl(32, mantissas)))))
                t := add(t, mul(signextend(7, word), shl(byte(7, shifts), sar(240, shl(48, mantissas)))))
                total := add(total, t)
                mantissas := shl(64, mantissas)
                shifts := shl(64, shifts)
            }
        }
    }

    /// @dev The squares of the distances of sixteen integers from as many lanes, and of the integers.
    function _squares(uint256 x, uint256 mantissas, uint256 shifts) private pure returns (uint256 total, uint256 size) {
        assembly ("memory-safe") {
            let half := 0x7fffffffffffffff7fffffffffffffff7fffffffffffffff7fffffffffffffff
            let low := 0x0000000000000001000000000000000100000000000000010000000000000001
            // Eight pairs a turn.
            for { let end := add(x, 128) } lt(x, end) { x := add(x, 64) } {
                let word := mload(x)
                word := xor(and(shr(1, word), half), mul(and(word, low), 0xffffffffffffffff))
                let d := sar(192, word)
                let s := sub(shl(byte(1, shifts), sar(240, mantissas)), d)
                let more := mul(s, s)
                let sizes := mul(d, d)
                d := sar(192, shl(64, word))
                s := sub(shl(byte(3, shifts), sar(240, shl(16, mantissas))), d)
                more := add(more, mul(s, s))
                sizes := add(sizes, mul(d, d))
                d := sar(192, shl(128, word))
                s := sub(shl(byte(5, shifts), sar(240, shl(32, mantissas))), d)
                more := add(more, mul(s, s))
                sizes := add(sizes, mul(d, d))
                d := signextend(7, word)
                s := sub(shl(byte(7, shifts), sar(240, shl(48, mantissas))), d)
                more := add(more, mul(s, s))
                sizes := add(sizes, mul(d, d))
                word := mload(add(x, 32))
                word := xor(and(shr(1, word), half), mul(and(word, low), 0xffffffffffffffff))
                d := sar(192, word)
                s := sub(shl(byte(9, shifts), sar(240, shl(64, mantissas))), d)
                more := add(more, mul(s, s))
                sizes := add(sizes, mul(d, d))
                d := sar(192, shl(64, word))
                s := sub(shl(byte(11, shifts), sar(240, shl(80, mantissas))), d)
                more := add(more, mul(s, s))
                sizes := add(sizes, mul(d, d))
                d := sar(192, shl(128, word))
                s := sub(shl(byte(13, shifts), sar(240, shl(96, mantissas))), d)
                more := add(more, mul(s, s))
                sizes := add(sizes, mul(d, d))
                d := signextend(7, word)
                s := sub(shl(byte(15, shifts), sar(240, shl(112, mantissas))), d)
                total := add(total, add(more, mul(s, s)))
                size := add(size, add(sizes, mul(d, d)))
                mantissas := shl(128, mantissas)
                shifts := shl(128, shifts)
            }
        }
    }

    function _word(uint256 place) private pure returns (uint256 word) {
        assembly ("memory-safe") {
            word := mload(place)
        }
    }
}
