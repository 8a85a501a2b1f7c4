// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Fixed} from "../../../contracts/src/referee/Fixed.sol";
import {Floats} from "../../../contracts/src/referee/Floats.sol";
import {Op, Ops} from "../../../contracts/src/referee/Ops.sol";
import {Referee} from "../../../contracts/src/referee/Referee.sol";
import {Base} from "../Base.t.sol";

contract OpsTest is Base {
    uint8 private constant NO_OP = 18;

    Referee private referee = new Referee();

    function test_RevertsOnAnUnknownOp() public {
        vm.expectRevert(abi.encodeWithSelector(Ops.UnknownOp.selector, 0));
        referee.run(0, new int256[][](1), 0, 0);
        vm.expectRevert(abi.encodeWithSelector(Ops.UnknownOp.selector, NO_OP));
        referee.run(NO_OP, new int256[][](1), 0, 0);
        vm.expectRevert(abi.encodeWithSelector(Ops.UnknownOp.selector, 23));
        referee.finish(23, 0, 0);
    }

    function test_RevertsOnListsOfAnotherShape() public {
        vm.expectRevert(abi.encodeWithSelector(Ops.OperandShape.selector, 2, 3));
        referee.run(uint8(Op.LINEAR), new int256[][](3), 24, 0);
        vm.expectRevert(abi.encodeWithSelector(Ops.OperandShape.selector, 2, 1));
        referee.run(uint8(Op.LINEAR), _lists(new int256[](2), new int256[](1)), 24, 0);
        vm.expectRevert(abi.encodeWithSelector(Ops.OperandShape.selector, 1, 0));
        referee.run(uint8(Op.MAX), new int256[][](1), 0, 0);
    }

    function _known(uint8 number) private pure returns (uint8 op) {
        op = uint8(bound(uint256(number), 1, 21));
        if (op >= NO_OP) ++op;
    }

    function testFuzz_EveryOpIsNamedByItsNumber(uint8 number) public pure {
        uint8 known = _known(number);
        assertEq(uint256(uint8(Ops.named(known))), known, "op");
    }

    function testFuzz_LinearEqualsTheLoopThatItUnrolls(int64[] memory x, int40 factor) public view {
        (int256[] memory a, int256[] memory b) = (new int256[](x.length), new int256[](x.length));
        int256 expected = 0;
        for (uint256 i = 0; i < x.length; ++i) {
            (a[i], b[i]) = (x[i], int256(factor) - int256(i));
            expected += a[i] * b[i];
        }
        assertEq(referee.run(uint8(Op.LINEAR), _lists(a, b), 24, 0), expected, "sum of products");
    }

    function _pairOf(int256 left, int256 right) private pure returns (int256[][] memory parts) {
        parts = new int256[][](1);
        parts[0] = new int256[](2);
        (parts[0][0], parts[0][1]) = (left, right);
    }

    function testFuzz_ChunksCombineToTheWholeSum(int64[8] memory x, uint8 cut_) public view {
        uint256 cut = bound(uint256(cut_), 1, 7);
        for (uint8 op = 0; op < 2; ++op) {
            uint8 number = uint8(op == 0 ? Op.SUM : Op.MAX);
            int256 left = referee.run(number, _list(x, 0, cut), 0, 0);
            int256 right = referee.run(number, _list(x, cut, 8), 0, 0);
            assertEq(Ops.combine(number, _pairOf(left, right)), referee.run(number, _list(x, 0, 8), 0, 0), "combined");
        }
    }

    function testFuzz_FinishRoundsAndSaturatesProductsOnly(uint8 number, int128 total) public view {
        uint8 op = _known(number);
        bool product = op == uint8(Op.LINEAR) || op == uint8(Op.LOGIT);
        assertEq(referee.finish(op, total, 24), product ? Fixed.cl(Fixed.rs(total, 24)) : int256(total), "finish");
    }

    function testFuzz_AnExactCopyIsNeverOutOfTolerance(int48[8] memory d, uint32 num, uint32 den, uint64 floor_)
        public
        view
    {
        int256[][] memory args = new int256[][](3);
        args[0] = _list(d);
        args[1] = _list(d);
        args[2] = _cell(num, uint256(den) + 1, floor_);
        assertEq(referee.run(uint8(Op.VERDICT), args, 1 << 49, 0), 0, "verdict");
    }

    function testFuzz_AVerdictOnlyHardensWithDistance(int48 d, int48 s, uint32 num, uint64 floor_) public view {
        int256[][] memory args = new int256[][](3);
        args[2] = _cell(num, 1 << 20, floor_);
        (args[0], args[1]) = (new int256[](1), new int256[](1));
        (args[0][0], args[1][0]) = (d, s);
        int256 near = referee.run(uint8(Op.VERDICT), args, 1 << 49, 0);
        args[1][0] += s >= d ? int256(1) : int256(-1);
        assertTrue(referee.run(uint8(Op.VERDICT), args, 1 << 49, 0) >= near, "one further");
    }

    function testFuzz_AnInvalidValueIsExcusedOnlyAboveTheBound(int56 d, uint56 limit) public view {
        int256[][] memory args = new int256[][](3);
        (args[0], args[1]) = (new int256[](1), new int256[](1));
        (args[0][0], args[1][0]) = (d, Floats.INVALID);
        args[2] = _cell(1, 1, 1 << 10);
        uint256 magnitude = uint256(d < 0 ? -int256(d) : int256(d));
        int256 expected = magnitude > limit ? int256(0) : int256(1);
        assertEq(referee.run(uint8(Op.VERDICT), args, limit, 0), expected, "verdict");
    }

    function testFuzz_SoftmaxTermsNeverExceedOne(int64 score, int64 most) public view {
        (int256[] memory x, int256[] memory y) = (new int256[](1), new int256[](1));
        (x[0], y[0]) = (score, most);
        int256 term = referee.run(uint8(Op.EXP), _lists(x, y), 0, 0);
        assertTrue(term >= 0 && term <= 1 << 40, "in 0..1");
    }

    function testFuzz_NoOpRevertsOnListsOfItsShape(int64 v, uint64 a, uint8 b, uint8 number) public view {
        uint8 op = _known(number);
        uint8[23] memory lists = [0, 2, 1, 1, 3, 2, 2, 2, 1, 2, 1, 2, 2, 2, 3, 2, 2, 2, 0, 4, 5, 3, 5];
        int256[][] memory args = new int256[][](lists[op]);
        for (uint256 i = 0; i < args.length; ++i) {
            bool two = i == 0 && (op == uint8(Op.ROPE) || op == uint8(Op.COMPARE));
            bool three = (op == uint8(Op.VERDICT) && i == 2) || (op == uint8(Op.COMPARE) && i == 1);
            if (op >= uint8(Op.RANK)) three = i + 2 == args.length && op != uint8(Op.STANDING);
            bool draw = op >= uint8(Op.RANK) && i + 1 == args.length;
            args[i] = new int256[](draw ? 9 : three ? 3 : two ? 2 : 1);
            args[i][0] = v;
        }
        referee.run(op, args, a, b % 3);
    }

    function _lists(int256[] memory x, int256[] memory y) private pure returns (int256[][] memory args) {
        args = new int256[][](2);
        (args[0], args[1]) = (x, y);
    }

    function _list(int64[8] memory x, uint256 from, uint256 to) private pure returns (int256[][] memory args) {
        args = new int256[][](1);
        args[0] = new int256[](to - from);
        for (uint256 i = from; i < to; ++i) {
            args[0][i - from] = x[i];
        }
    }

    function _list(int48[8] memory x) private pure returns (int256[] memory list) {
        list = new int256[](8);
        for (uint256 i = 0; i < 8; ++i) {
            list[i] = x[i];
        }
    }

    function _cell(uint256 num, uint256 den, uint256 floor_) private pure returns (int256[] memory cell) {
        cell = new int256[](3);
        (cell[0], cell[1], cell[2]) = (int256(num), int256(den), int256(floor_));
    }
}
