// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";

import {Fixed} from "../../../contracts/src/referee/Fixed.sol";
import {Base} from "../Base.t.sol";

contract FixedTest is Base {
    int256 private constant ONE_Q40 = 1 << 40;

    function testFuzz_RsIsTheFloorOfTheShiftedSum(int200 x, uint8 s) public pure {
        uint256 shift = bound(uint256(s), 1, 50);
        // Floor by truncating division of a value made non-negative by a whole multiple of the divisor.
        int256 divisor = int256(1 << shift);
        int256 lift = int256(1) << 250;
        int256 expected = (x + divisor / 2 + lift) / divisor - lift / divisor;
        assertEq(Fixed.rs(x, shift), expected, "rs");
    }

    function testFuzz_RsByZeroIsTheValue(int256 x) public pure {
        assertEq(Fixed.rs(x, 0), x, "rs by 0");
    }

    function testFuzz_RsOfAnyShiftNeverReverts(int256 x, uint256 s) public pure {
        int256 y = Fixed.rs(x, s);
        assertTrue(s == 0 || (y >= x / 2 - 1 && y <= x / 2 + 1) || s > 1, "half at most");
    }

    function testFuzz_ClKeepsWhatFitsAndSaturatesTheRest(int256 x) public pure {
        int256 y = Fixed.cl(x);
        assertTrue(y <= Fixed.LIMIT && y >= -Fixed.LIMIT, "within the limit");
        assertTrue(y == x || x > Fixed.LIMIT || x < -Fixed.LIMIT, "unchanged within");
    }

    function testFuzz_DivFloorLeavesARestBelowTheDivisor(int128 x, int128 y) public pure {
        if (y == 0) return assertEq(Fixed.divFloor(x, y), 0, "by zero");
        int256 rest = x - Fixed.divFloor(x, y) * y;
        assertTrue(y > 0 ? rest >= 0 && rest < y : rest <= 0 && rest > y, "rest");
    }

    function testFuzz_IsqrtIsTheFloorOfTheRoot(uint256 x, uint8 shift) public pure {
        x >>= shift;
        assertEq(Fixed.isqrt(x), Math.sqrt(x), "isqrt");
    }

    function testFuzz_IsqrtOfSquaresAndTheirNeighbours(uint128 root) public pure {
        uint256 square = uint256(root) * root;
        assertEq(Fixed.isqrt(square), root, "of a square");
        if (root > 0) assertEq(Fixed.isqrt(square - 1), root - 1, "below a square");
    }

    function testFuzz_Exp2OfWholeNumbersIsExact(uint8 n) public pure {
        uint256 power = bound(uint256(n), 0, 63);
        assertEq(Fixed.exp2(-int256(power << 30)), ONE_Q40 >> power, "2^-n");
    }

    function testFuzz_Exp2HalvesWithEachWhole(int64 d) public pure {
        int256 x = d > 0 ? -int256(d) : int256(d);
        assertEq(Fixed.exp2(x - (1 << 30)), x >> 30 <= -63 ? int256(0) : Fixed.exp2(x) >> 1, "2^(d - 1)");
    }

    function testFuzz_Exp2RisesAndStaysBelowOne(int40 d, uint32 more) public pure {
        int256 low = Fixed.exp2(d);
        int256 high = Fixed.exp2(int256(d) + int256(uint256(more)));
        // The polynomial of the law may fall by one unit of Q40 >> its whole part where it is flattest.
        assertTrue(low <= high + (1 << 12), "rises");
        assertTrue(low >= 0 && low <= ONE_Q40, "in 0..1");
    }

    function testFuzz_SiluOfOppositesDiffersByTheArgument(int48 g) public pure {
        // g s(g) + g s(-g) = g, as the two sigmoids add up to one.
        int256 difference = Fixed.silu(g) - Fixed.silu(-int256(g)) - g;
        int256 slack = (g < 0 ? -int256(g) : int256(g)) >> 29;
        assertTrue(difference <= 2 + slack && difference >= -2 - slack, "odd part");
    }

    function testFuzz_SincosLiesOnTheUnitCircle(uint32 position, uint64 frequency) public pure {
        (int256 s, int256 c) = Fixed.sincos(position, frequency);
        int256 off = s * s + c * c - (1 << 60);
        assertTrue(off < 1 << 35 && off > -(1 << 35), "radius");
    }

    function testFuzz_AQuarterTurnSwapsSineAndCosine(uint64 frequency) public pure {
        (int256 s, int256 c) = Fixed.sincos(1, frequency);
        unchecked {
            (int256 s1, int256 c1) = Fixed.sincos(1, frequency + (1 << 62));
            assertEq(s1, c, "sine");
            assertEq(c1, -s, "cosine");
        }
    }
}
