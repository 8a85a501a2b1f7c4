// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Fixed} from "./Fixed.sol";
import {Floats} from "./Floats.sol";

/// @dev Every op of the law, by its number in an instruction.
enum Op {
    NONE,
    ADD,
    SUMSQ,
    RSQRT,
    NORM,
    LINEAR,
    ROPE,
    SCORE,
    MAX,
    EXP,
    SUM,
    WSUM,
    DIV,
    GATED,
    VERDICT,
    LOGIT,
    COMPARE,
    SAME,
    UNUSED_18, // no op: a number that was given up is not given again
    RANK,
    MASS,
    STANDING,
    CHOICE
}

/// @title Ops: pure, total arithmetic on lists of integers
/// @notice docs/canonical.md, "Ops"; the Python twin is verifier/referee/ops.py.
/// @dev `args` has one list for each read, in the order of canonical.md; the ops of sampling are handed the draw as their last.
/// Activations are Q30, weights QG, raw float bits unsigned. Unchecked throughout: see Fixed.
library Ops {
    /// @dev No op has this number.
    error UnknownOp(uint8 op);
    /// @dev An op was handed `actual` lists, or a list of `actual` values, where it reads `expected`.
    error OperandShape(uint256 expected, uint256 actual);

    /// @notice The op of that number.
    function named(uint8 number) internal pure returns (Op) {
        if (number == 0 || number > uint8(Op.CHOICE) || number == uint8(Op.UNUSED_18)) revert UnknownOp(number);
        return Op(number);
    }

    /// @notice One element, or the sum of one chunk, of an op.
    function run(uint8 number, int256[][] memory args, uint256 a, uint256 b) internal pure returns (int256) {
        Op op = named(number);
        // The sums first: they are most of every program.
        if (op == Op.LINEAR || op == Op.WSUM || op == Op.LOGIT) return linear(args);
        if (op == Op.SUMSQ) return sumsq(args);
        if (op == Op.MAX) return max(args);
        if (op == Op.SUM) return sum(args);
        if (op == Op.ADD) return add(args, b);
        if (op == Op.RSQRT) return rsqrt(args, a, b);
        if (op == Op.NORM) return norm(args, a);
        if (op == Op.ROPE) return rope(args, a, b);
        if (op == Op.SCORE) return score(args, a);
        if (op == Op.EXP) return exp(args);
        if (op == Op.DIV) return div(args);
        if (op == Op.GATED) return gated(args);
        if (op == Op.VERDICT) return verdict(args, a);
        if (op == Op.COMPARE) return compare(args);
        if (op == Op.SAME) return same(args);
        // The ops of sampling run in a contract of their own: Sampler.
        revert UnknownOp(number);
    }

    /// @notice The element that a sum's total stands for.
    function finish(uint8 number, int256 total, uint256 a) internal pure returns (int256) {
        Op op = named(number);
        return op == Op.LINEAR || op == Op.LOGIT ? Fixed.cl(Fixed.rs(total, a)) : total;
    }

    /// @notice Partial results (one or more) of an element, in a single list, put together.
    function combine(uint8 number, int256[][] memory parts) internal pure returns (int256) {
        return named(number) == Op.MAX ? max(parts) : sum(parts);
    }

    // ---- the ops, by their number

    /// @dev Raw bits [x], [y] of dtype b: their hardware sum, decoded as served.
    function add(int256[][] memory args, uint256 b) internal pure returns (int256) {
        _lists(args, 2);
        int256[] memory bits = new int256[](1);
        bits[0] = int256(Floats.add(b, uint256(_only(args[0])), uint256(_only(args[1]))));
        Floats.decodeServed(bits, b, 0);
        return bits[0];
    }

    /// @dev [x...]: the sum of squares, Q60.
    function sumsq(int256[][] memory args) internal pure returns (int256) {
        _lists(args, 1);
        return dot(args[0], args[0]);
    }

    /// @dev [x] a sum of b squares, a = floor(eps * 2^60): 1 / sqrt(x / b + eps), Q40; 0 where that divides by zero.
    function rsqrt(int256[][] memory args, uint256 a, uint256 b) internal pure returns (int256) {
        _lists(args, 1);
        int256 x = _only(args[0]);
        unchecked {
            uint256 below = (x > 0 ? uint256(x) : 0) + b * a;
            return below == 0 ? int256(0) : int256(Fixed.isqrt((b << 140) / below));
        }
    }

    /// @dev [x], [y] the inverse root (Q40), [z] the gain (Qa).
    function norm(int256[][] memory args, uint256 a) internal pure returns (int256) {
        _lists(args, 3);
        unchecked {
            return Fixed.cl(Fixed.rs(Fixed.rs(_only(args[0]) * _only(args[1]), 40) * _only(args[2]), a));
        }
    }

    /// @dev [x...], [y...]: the sum of products. LINEAR, WSUM and LOGIT differ in what they read and in `finish` only.
    function linear(int256[][] memory args) internal pure returns (int256) {
        _lists(args, 2);
        return dot(args[0], args[1]);
    }

    /// @dev [x0, x1], [frequency] at position a: the first (b = 0) or second half's element of the turned pair.
    function rope(int256[][] memory args, uint256 a, uint256 b) internal pure returns (int256) {
        _lists(args, 2);
        _length(args[0], 2);
        (int256 x0, int256 x1) = (args[0][0], args[0][1]);
        (int256 s, int256 c) = Fixed.sincos(a, uint256(_only(args[1])));
        unchecked {
            if (b == 0) return Fixed.rs(x0 * c, 30) - Fixed.rs(x1 * s, 30);
            return Fixed.rs(x1 * c, 30) + Fixed.rs(x0 * s, 30);
        }
    }

    /// @dev [q...], [k...]: their product times the scale a (Q40), for a softmax in base 2.
    function score(int256[][] memory args, uint256 a) internal pure returns (int256) {
        _lists(args, 2);
        int256 product = Fixed.cl(Fixed.rs(dot(args[0], args[1]), 30));
        unchecked {
            return Fixed.rs(product * int256(a), 40);
        }
    }

    /// @dev [x...], at least one: the largest.
    function max(int256[][] memory args) internal pure returns (int256 largest) {
        _lists(args, 1);
        int256[] memory x = args[0];
        if (x.length == 0) revert OperandShape(1, 0);
        largest = x[0];
        assembly ("memory-safe") {
            let end := add(add(x, 32), shl(5, mload(x)))
            for { let place := add(x, 64) } lt(place, end) { place := add(place, 32) } {
                let other := mload(place)
                if sgt(other, largest) { largest := other }
            }
        }
    }

    /// @dev [x], [y]: 2^(x - y), Q40.
    function exp(int256[][] memory args) internal pure returns (int256) {
        _lists(args, 2);
        unchecked {
            return Fixed.exp2(_only(args[0]) - _only(args[1]));
        }
    }

    /// @dev [x...]: the sum.
    function sum(int256[][] memory args) internal pure returns (int256 total) {
        _lists(args, 1);
        int256[] memory x = args[0];
        assembly ("memory-safe") {
            let end := add(add(x, 32), shl(5, mload(x)))
            for { let place := add(x, 32) } lt(place, end) { place := add(place, 32) } {
                total := add(total, mload(place))
            }
        }
    }

    /// @dev [x], [y]: the quotient, floored; 0 when y <= 0.
    function div(int256[][] memory args) internal pure returns (int256) {
        _lists(args, 2);
        (int256 x, int256 y) = (_only(args[0]), _only(args[1]));
        return y <= 0 ? int256(0) : Fixed.cl(Fixed.divFloor(x, y));
    }

    /// @dev [x], [y]: silu(x) y.
    function gated(int256[][] memory args) internal pure returns (int256) {
        _lists(args, 2);
        unchecked {
            return Fixed.cl(Fixed.rs(Fixed.silu(_only(args[0])) * _only(args[1]), 30));
        }
    }

    /// @dev [D...] standard, [S...] served or INVALID, [num, den, floor]: 1 if S is out of tolerance, else 0. An invalid S is excused, and
    /// left out of both sums, only where |D| exceeds the bound a (Q30) of what the dtype holds.
    function verdict(int256[][] memory args, uint256 a) internal pure returns (int256) {
        _lists(args, 3);
        (int256[] memory standard, int256[] memory served, int256[] memory cell) = (args[0], args[1], args[2]);
        _length(served, standard.length);
        _length(cell, 3);
        unchecked {
            (bool bad, uint256 distance_, uint256 size) = distance(standard, served, a);
            return bad || outside(distance_, size, standard.length, cell) ? int256(1) : int256(0);
        }
    }

    /// @dev [served token's logit, competitor's], [num, den, margin]: 1 if the competitor wins by more than the margin.
    function compare(int256[][] memory args) internal pure returns (int256) {
        _lists(args, 2);
        _length(args[0], 2);
        _length(args[1], 3);
        unchecked {
            return args[0][1] - args[0][0] > args[1][2] ? int256(1) : int256(0);
        }
    }

    /// @dev Raw bits [x...], [y...]: 1 if any differ, else 0.
    function same(int256[][] memory args) internal pure returns (int256) {
        _lists(args, 2);
        (int256[] memory x, int256[] memory y) = (args[0], args[1]);
        _length(y, x.length);
        bytes32 left;
        bytes32 right;
        assembly ("memory-safe") {
            let size := shl(5, mload(x))
            left := keccak256(add(x, 32), size)
            right := keccak256(add(y, 32), size)
        }
        return left == right ? int256(0) : int256(1);
    }

    // ---- what the ops share

    /// @dev Whether VERDICT's sums, over `count` pairs, are out of the tolerance [num, den, floor].
    function outside(uint256 distance_, uint256 size, uint256 count, int256[] memory cell)
        internal
        pure
        returns (bool)
    {
        unchecked {
            size += count * uint256(cell[2] * cell[2]);
            (uint256 num, uint256 den) = (uint256(cell[0]), uint256(cell[1]));
            return distance_ * den * den > num * num * size;
        }
    }

    /// @dev VERDICT's sums over the pairs whose S is valid, of equally long lists; bad where an invalid S is not excused.
    function distance(int256[] memory standard, int256[] memory served, uint256 a)
        internal
        pure
        returns (bool bad, uint256 distance_, uint256 size)
    {
        int256 missing = Floats.INVALID;
        // Assembly for the same reason as the product below.
        assembly ("memory-safe") {
            let ahead := sub(served, standard)
            let place := add(standard, 32)
            let end := add(place, shl(5, mload(standard)))
            for {} lt(place, end) { place := add(place, 32) } {
                let d := mload(place)
                let s := mload(add(place, ahead))
                if eq(s, missing) {
                    if slt(d, 0) { d := sub(0, d) }
                    if iszero(gt(d, a)) {
                        bad := 1
                        break
                    }
                    d := 0
                    s := 0
                }
                s := sub(s, d)
                distance_ := add(distance_, mul(s, s))
                size := add(size, mul(d, d))
            }
        }
    }

    /// @dev The sum of products.
    function dot(int256[] memory x, int256[] memory y) internal pure returns (int256 total) {
        _length(y, x.length);
        // Assembly because bounds checks would double the cost of the 256-term step that most games end with.
        assembly ("memory-safe") {
            let length := mul(mload(x), 32)
            let ahead := sub(y, x)
            let place := add(x, 32)
            let end := add(place, length)
            // Four terms a turn while they last, then one.
            for { let whole := add(place, and(length, not(127))) } lt(place, whole) { place := add(place, 128) } {
                let y4 := add(place, ahead)
                let t := mul(mload(place), mload(y4))
                t := add(t, mul(mload(add(place, 32)), mload(add(y4, 32))))
                t := add(t, mul(mload(add(place, 64)), mload(add(y4, 64))))
                total := add(total, add(t, mul(mload(add(place, 96)), mload(add(y4, 96)))))
            }
            for {} lt(place, end) { place := add(place, 32) } {
                total := add(total, mul(mload(place), mload(add(place, ahead))))
            }
        }
    }

    function _lists(int256[][] memory args, uint256 expected) private pure {
        if (args.length != expected) revert OperandShape(expected, args.length);
    }

    function _length(int256[] memory list, uint256 expected) private pure {
        if (list.length != expected) revert OperandShape(expected, list.length);
    }

    function _only(int256[] memory list) private pure returns (int256) {
        _length(list, 1);
        return list[0];
    }
}
