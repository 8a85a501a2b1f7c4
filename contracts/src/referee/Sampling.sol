// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Fixed} from "./Fixed.sol";

/// @notice One draw as a step sees it: the request's parameters, the place, and the tokens that are compared. temperature and topP in
/// 1/65536; topK 0 and topP 65536 filter nothing.
struct Draw {
    uint256 temperature;
    uint256 topK;
    uint256 topP;
    uint256 seed;
    uint256 request;
    uint256 position;
    uint256 token; // served
    uint256 unit; // the competitor; the served token itself when its membership is judged
    uint256 first; // token of a chunk's first logit
}

/// @title Sampling: noise, and who may be chosen
/// @notice docs/canonical.md, "Sampling"; the Python twin is verifier/referee/sampling.py. Logits and noise are Q30, masses Q40 x 1/65536.
/// @dev A token's noise is -ln(-ln U) for a uniform U of (seed, request, position, token): the largest of logit + temperature x noise is then a
/// draw from the softmax (Gumbel's trick), and anyone can repeat it. Unchecked throughout: see Fixed.
library Sampling {
    int256 private constant LN2_Q30 = 744261118;
    uint256 private constant GOLDEN = 0x9E3779B97F4A7C15;
    uint256 private constant MASK = type(uint64).max;
    /// @dev Temperature 1, and the whole mass.
    uint256 private constant ONE = 65536;
    uint256 internal constant DRAW_FIELDS = 9;
    /// @dev Packed lists end before they should.
    error Truncated();

    /// @notice A draw from the list that ops are handed, which has DRAW_FIELDS values.
    function drawOf(int256[] memory list) internal pure returns (Draw memory draw) {
        // A struct in memory is its words, one after another.
        assembly ("memory-safe") {
            mcopy(draw, add(list, 32), 288)
        }
    }

    /// @notice The number of lists, then one after another, each its length and its values. Rationale: they go to another contract, and the ABI's own coding of
    /// lists of lists costs more than most of these ops.
    function pack(int256[][] memory lists) internal pure returns (bytes memory packed) {
        uint256 size = 32;
        for (uint256 i = 0; i < lists.length; ++i) {
            size += 32 + 32 * lists[i].length;
        }
        packed = new bytes(size);
        assembly ("memory-safe") {
            mstore(add(packed, 32), mload(lists))
            let to := add(packed, 64)
            let end := add(add(lists, 32), mul(mload(lists), 32))
            for { let from := add(lists, 32) } lt(from, end) { from := add(from, 32) } {
                let list := mload(from)
                let bytes_ := add(32, mul(mload(list), 32))
                mcopy(to, list, bytes_)
                to := add(to, bytes_)
            }
        }
    }

    /// @notice The inverse of `pack`, in place.
    function unpack(bytes memory packed) internal pure returns (int256[][] memory lists) {
        uint256 words = packed.length / 32;
        uint256 place = 1;
        uint256 count;
        assembly ("memory-safe") {
            if words { count := mload(add(packed, 32)) }
        }
        // SAFETY: no more lists than words, so that nobody makes this allocate the world.
        if (count > words) revert Truncated();
        lists = new int256[][](count);
        for (uint256 i = 0; i < count; ++i) {
            int256[] memory list;
            assembly ("memory-safe") {
                list := add(add(packed, 32), mul(place, 32))
            }
            if (place >= words || list.length >= words - place) revert Truncated();
            lists[i] = list;
            place += 1 + list.length;
        }
    }

    /// @notice That list, from a cell's fields.
    function listOf(bytes32 sampling, uint256 position, uint256 token, uint256 unit, uint256 first)
        internal
        pure
        returns (int256[] memory list)
    {
        uint256 word = uint256(sampling);
        list = new int256[](DRAW_FIELDS);
        list[0] = int256(word >> 224);
        list[1] = int256((word >> 192) & type(uint32).max);
        list[2] = int256((word >> 160) & type(uint32).max);
        list[3] = int256((word >> 96) & MASK);
        list[4] = int256((word >> 64) & type(uint32).max);
        (list[5], list[6], list[7], list[8]) = (int256(position), int256(token), int256(unit), int256(first));
    }

    // ---- noise

    /// @notice A token's noise in a draw, Q30.
    function noise(Draw memory draw, uint256 token) internal pure returns (int256) {
        unchecked {
            uint256 start = mix((mix(draw.seed) + GOLDEN * (1 + (draw.request << 32 | draw.position))) & MASK);
            return gumbel(mix((start + GOLDEN * (1 + token)) & MASK));
        }
    }

    /// @notice The finaliser of splitmix64 on a u64: each bit of z moves half the bits of the result.
    function mix(uint256 z) internal pure returns (uint256) {
        unchecked {
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK;
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK;
            return z ^ (z >> 31);
        }
    }

    /// @notice -ln(-ln U), Q30, for U = (2x + 1) / 2^65 of 64 random bits x. Between -3.9 and 45.1.
    function gumbel(uint256 x) internal pure returns (int256) {
        unchecked {
            if (x >> 63 == 0) return -ln(uint256(-ln(2 * x + 1, 65)), 30);
            // Near 1, where the winners are, 1 - U keeps all its digits: -ln U = v (1 + v/2 + ...).
            uint256 v = 2 * (x ^ MASK) + 1;
            int256 z = int256(v >> 35);
            int256 a = 538147262;
            a = ((a * z) >> 30) - 747396562;
            a = ((a * z) >> 30) + 606438234;
            a = ((a * z) >> 30) - 166609944;
            a = ((a * z) >> 30) + 123739353;
            a = ((a * z) >> 30) + 86124193;
            a = ((a * z) >> 30) + 134811307;
            a = ((a * z) >> 30) + 223672512;
            a = ((a * z) >> 30) + 536871275;
            a = ((a * z) >> 30) - 1;
            return -ln(v, 65) - a;
        }
    }

    /// @notice The natural logarithm of x / 2^fractionBits, x >= 1. Q30.
    function ln(uint256 x, uint256 fractionBits) internal pure returns (int256) {
        unchecked {
            uint256 power = Fixed.log2(x);
            int256 z = int256(power >= 30 ? x >> (power - 30) : x << (30 - power)) - Fixed.ONE_Q30;
            int256 a = -2427725;
            a = ((a * z) >> 30) + 16165559;
            a = ((a * z) >> 30) - 50520772;
            a = ((a * z) >> 30) + 101743012;
            a = ((a * z) >> 30) - 156057253;
            a = ((a * z) >> 30) + 207787834;
            a = ((a * z) >> 30) - 267061634;
            a = ((a * z) >> 30) + 357751363;
            a = ((a * z) >> 30) - 536860845;
            a = ((a * z) >> 30) + 1073741577;
            a = ((a * z) >> 30) + 1;
            return LN2_Q30 * (int256(power) - int256(fractionBits)) + a;
        }
    }

    // ---- who may be chosen

    /// @notice How many tokens of a chunk lie above the judged one: possibly (a competitor), surely (the served token).
    function rank(int256[] memory logits, int256 ownLogit, int256 margin, Draw memory draw)
        internal
        pure
        returns (int256 count)
    {
        int256 edge = _edge(ownLogit, margin, draw);
        uint256 judged = _judged(logits, draw);
        unchecked {
            for (uint256 i = 0; i < logits.length; ++i) {
                if (logits[i] >= edge && i != judged) ++count;
            }
        }
    }

    /// @notice A chunk's part of (1 - p) x mass above - p x the rest's: above 0, more than p lies above the judged token.
    /// @dev SAFETY: the logits served may differ from these by errors of which no two differ by more than the margin. So a competitor sees the
    /// rest lowered by it, p less by one unit and weights rounded against it; the served token the contrary.
    function mass(int256[] memory logits, int256 ownLogit, int256 largest, int256 margin, Draw memory draw)
        internal
        pure
        returns (int256)
    {
        if (draw.topP >= ONE) return 0;
        bool own = _own(draw);
        uint256 p = own ? draw.topP + 1 : draw.topP > 0 ? draw.topP - 1 : 0;
        (int256 edge, uint256 judged) = (_edge(ownLogit, margin, draw), _judged(logits, draw));
        int256 scale = _inverseTemperature(draw.temperature);
        (uint256 above, uint256 rest) = _masses(logits, edge, judged, largest, margin, scale, own);
        unchecked {
            return int256(above * (ONE - p)) - int256(rest * p);
        }
    }

    /// @notice A competitor: 1 if it is surely allowed. The served token: 1 if it is surely excluded.
    function standing(int256 rank_, int256 mass_, Draw memory draw) internal pure returns (int256) {
        bool behind = draw.topK > 0 && rank_ >= int256(draw.topK);
        bool outside = draw.topP < ONE && mass_ > 0;
        return (behind || outside) == _own(draw) ? int256(1) : int256(0);
    }

    /// @notice 1 if the served token is wrong: excluded, or beaten by more than the margin by a competitor that is allowed.
    function choice(int256 served, int256 other, int256 standing_, int256 margin, Draw memory draw)
        internal
        pure
        returns (int256)
    {
        if (standing_ != 1) return 0;
        if (_own(draw)) return 1;
        unchecked {
            int256 lead = (other - served) * int256(ONE);
            lead += int256(draw.temperature) * (noise(draw, draw.unit) - noise(draw, draw.token));
            return lead > margin * int256(ONE) ? int256(1) : int256(0);
        }
    }

    // ---- what they share

    function _own(Draw memory draw) private pure returns (bool) {
        return draw.unit == draw.token;
    }

    /// @dev The logit from which on a token counts as above.
    function _edge(int256 ownLogit, int256 margin, Draw memory draw) private pure returns (int256) {
        unchecked {
            return _own(draw) ? ownLogit + margin + 1 : ownLogit - margin;
        }
    }

    /// @dev Place of the judged token in a chunk; beyond it where the chunk does not hold it.
    function _judged(int256[] memory logits, Draw memory draw) private pure returns (uint256) {
        return draw.unit < draw.first ? logits.length : draw.unit - draw.first;
    }

    /// @dev log2(e) / temperature, Q40. Temperature 0, which is greedy and never asked for, counts as the smallest.
    function _inverseTemperature(uint256 temperature) private pure returns (int256) {
        return int256((uint256(Fixed.LOG2E_Q40) << 16) / (temperature == 0 ? 1 : temperature));
    }

    /// @dev Masses from `edge` on, less the judged token's, and of the rest: sums of 2^((x - largest) scale), Q40. What errors could favour -
    /// the mass above the served token, the rest beside a competitor's - is lowered by the margin, and the other side rounded up.
    function _masses(
        int256[] memory logits,
        int256 edge,
        uint256 judged,
        int256 largest,
        int256 margin,
        int256 scale,
        bool own
    ) private pure returns (uint256 above, uint256 rest) {
        // Assembly because a chunk takes 256 powers: the loop of Fixed.exp2 costs twice as much.
        assembly ("memory-safe") {
            judged := add(add(logits, 32), mul(judged, 32))
            let end := add(add(logits, 32), mul(mload(logits), 32))
            for { logits := add(logits, 32) } lt(logits, end) { logits := add(logits, 32) } {
                let x := mload(logits)
                let above_ := iszero(or(slt(x, edge), eq(logits, judged)))
                x := sub(x, largest)
                if eq(above_, own) { x := sub(x, margin) }
                x := sar(40, mul(x, scale))
                if sgt(x, 0) { x := 0 }
                let n := sub(0, sar(30, x))
                let a := 0
                if lt(n, 64) {
                    x := add(x, shl(30, n))
                    a := add(shr(30, mul(23239, x)), 153573)
                    a := add(shr(30, mul(a, x)), 1441968)
                    a := add(shr(30, mul(a, x)), 10322487)
                    a := add(shr(30, mul(a, x)), 59598342)
                    a := add(shr(30, mul(a, x)), 257941089)
                    a := add(shr(30, mul(a, x)), 744261126)
                    a := shr(n, shl(10, add(shr(30, mul(a, x)), 1073741824)))
                }
                a := add(a, xor(above_, own))
                switch above_
                case 0 { rest := add(rest, a) }
                default { above := add(above, a) }
            }
        }
    }
}
