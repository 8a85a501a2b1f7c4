// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Fixed} from "../../../contracts/src/referee/Fixed.sol";

/// @title What holds of Fixed for every input: proved by halmos (`make prove`), not tried
contract FixedProofs {
    int256 private constant LIMIT = (1 << 50) - 1;

    /// @dev The shifts of the law: activations, weights of either fraction, inverse roots and exponents.
    function check_rsIsTheFloorOfTheShiftedSum(int200 x) external pure {
        assert(Fixed.rs(x, 24) == (int256(x) + (1 << 23)) >> 24);
        assert(Fixed.rs(x, 30) == (int256(x) + (1 << 29)) >> 30);
        assert(Fixed.rs(x, 32) == (int256(x) + (1 << 31)) >> 32);
        assert(Fixed.rs(x, 40) == (int256(x) + (1 << 39)) >> 40);
    }

    function check_rsByZeroIsTheValue(int256 x) external pure {
        assert(Fixed.rs(x, 0) == x);
    }

    function check_rsKeepsTheOrder(int200 x, int200 y) external pure {
        if (x > y) return;
        assert(Fixed.rs(x, 24) <= Fixed.rs(y, 24));
        assert(Fixed.rs(x, 30) <= Fixed.rs(y, 30));
        assert(Fixed.rs(x, 40) <= Fixed.rs(y, 40));
    }

    function check_clKeepsWhatFitsAndSaturatesTheRest(int256 x) external pure {
        int256 y = Fixed.cl(x);
        assert(y >= -LIMIT && y <= LIMIT);
        if (x >= -LIMIT && x <= LIMIT) assert(y == x);
        else assert(y == (x > 0 ? LIMIT : -LIMIT));
    }

    function check_clIsOdd(int256 x) external pure {
        if (x == type(int256).min) return;
        assert(Fixed.cl(-x) == -Fixed.cl(x));
    }

    function check_log2IsTheHighestBit(uint256 x) external pure {
        uint256 index = Fixed.log2(x);
        if (x == 0) assert(index == 0);
        else assert(x >> index == 1);
    }

    function check_exp2OfWholeNumbersIsExact(uint8 n) external pure {
        assert(Fixed.exp2(-int256(uint256(n)) << 30) == (n < 64 ? (int256(1) << 40) >> n : int256(0)));
    }

    function check_exp2OfWhatIsPositiveIsOne(int128 d) external pure {
        if (d < 0) return;
        assert(Fixed.exp2(d) == 1 << 40);
    }
}
