// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @title Fixed: rounding and fixed-point functions of the canonical arithmetic
/// @notice docs/canonical.md, "Numbers" and "Functions"; the Python twin is verifier/referee/fixed.py.
/// @dev Everything is unchecked: the law bounds every intermediate far below 2^255 ("Bounds"), and a judge that could revert on an
/// overflow could be kept from convicting.
library Fixed {
    /// @dev Largest magnitude of a stored activation: 2^50 - 1.
    int256 internal constant LIMIT = (1 << 50) - 1;
    int256 internal constant ONE_Q30 = 1 << 30;
    int256 internal constant LOG2E_Q40 = 1586259972792;
    uint256 private constant MASK_30 = (1 << 30) - 1;

    /// @notice Shift right, ties toward +infinity: `floor((x + 2^(s-1)) / 2^s)`; x itself for s = 0.
    function rs(int256 x, uint256 s) internal pure returns (int256) {
        if (s == 0) return x;
        // The floor plus the highest bit that was shifted out: equal to the definition, but nothing is added that could overflow.
        unchecked {
            return (x >> s) + ((x >> (s - 1)) & 1);
        }
    }

    /// @notice Saturates to +-(2^50 - 1).
    function cl(int256 x) internal pure returns (int256) {
        if (x > LIMIT) return LIMIT;
        return x < -LIMIT ? -LIMIT : x;
    }

    /// @notice `floor(x / y)`; 0 when y = 0.
    function divFloor(int256 x, int256 y) internal pure returns (int256 quotient) {
        if (y == 0) return 0;
        unchecked {
            quotient = x / y;
            // Solidity truncates: below zero that is one too high, unless the division is exact.
            if ((x < 0) != (y < 0) && quotient * y != x) quotient -= 1;
        }
    }

    /// @notice Index of the highest set bit; 0 for x = 0.
    function log2(uint256 x) internal pure returns (uint256 index) {
        // Binary search without branches.
        assembly ("memory-safe") {
            index := shl(7, lt(0xffffffffffffffffffffffffffffffff, x))
            index := or(index, shl(6, lt(0xffffffffffffffff, shr(index, x))))
            index := or(index, shl(5, lt(0xffffffff, shr(index, x))))
            index := or(index, shl(4, lt(0xffff, shr(index, x))))
            index := or(index, shl(3, lt(0xff, shr(index, x))))
            index := or(index, shl(2, lt(0x0f, shr(index, x))))
            index := or(index, shl(1, lt(0x03, shr(index, x))))
            index := or(index, lt(0x01, shr(index, x)))
        }
    }

    /// @notice Floor of the square root.
    function isqrt(uint256 x) internal pure returns (uint256 root) {
        if (x == 0) return 0;
        unchecked {
            // INVARIANT: root starts above the square root, so Newton's steps fall strictly until they reach the floor.
            root = 1 << ((log2(x) >> 1) + 1);
            while (true) {
                uint256 next = (root + x / root) >> 1;
                if (next >= root) return root;
                root = next;
            }
        }
    }

    /// @notice 2^d for d <= 0 (larger d count as 0).
    /// @param d Q30
    /// @return Q40, in 0 .. 2^40
    function exp2(int256 d) internal pure returns (int256) {
        unchecked {
            if (d > 0) d = 0;
            int256 n = d >> 30;
            if (n <= -64) return 0;
            int256 x = d - (n << 30);
            int256 a = 23239;
            a = ((a * x) >> 30) + 153573;
            a = ((a * x) >> 30) + 1441968;
            a = ((a * x) >> 30) + 10322487;
            a = ((a * x) >> 30) + 59598342;
            a = ((a * x) >> 30) + 257941089;
            a = ((a * x) >> 30) + 744261126;
            a = ((a * x) >> 30) + 1073741824;
            return (a << 10) >> uint256(-n);
        }
    }

    /// @notice g / (1 + e^-g).
    /// @param g Q30
    /// @return Q30
    function silu(int256 g) internal pure returns (int256) {
        unchecked {
            int256 magnitude = g < 0 ? -g : g;
            int256 e = exp2(-rs(magnitude * LOG2E_Q40, 40)) >> 10;
            int256 s = (g >= 0 ? int256(1 << 60) : e << 30) / (ONE_Q30 + e);
            return rs(g * s, 30);
        }
    }

    /// @notice Sine and cosine of the turn `position * frequency / 2^64`.
    /// @param frequency entry of the RoPE table, 2^64 a turn a position
    /// @return sine Q30
    /// @return cosine Q30
    function sincos(uint256 position, uint256 frequency) internal pure returns (int256 sine, int256 cosine) {
        unchecked {
            uint256 p = (position * frequency) & type(uint64).max;
            int256 z = int256((p >> 32) & MASK_30);
            int256 z2 = (z * z) >> 30;
            int256 s = -3685;
            s = ((s * z2) >> 30) + 172072;
            s = ((s * z2) >> 30) - 5026892;
            s = ((s * z2) >> 30) + 85569282;
            s = ((s * z2) >> 30) - 693598666;
            s = ((s * z2) >> 30) + 1686629713;
            s = (z * s) >> 30;
            int256 c = 482;
            c = ((c * z2) >> 30) - 27028;
            c = ((c * z2) >> 30) + 987026;
            c = ((c * z2) >> 30) - 22401984;
            c = ((c * z2) >> 30) + 272375559;
            c = ((c * z2) >> 30) - 1324675879;
            c = ((c * z2) >> 30) + 1073741824;
            uint256 quarter = p >> 62;
            if (quarter == 0) return (s, c);
            if (quarter == 1) return (c, -s);
            if (quarter == 2) return (-s, -c);
            return (-c, s);
        }
    }
}
