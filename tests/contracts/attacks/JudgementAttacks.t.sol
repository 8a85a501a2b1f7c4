// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Games} from "../../../contracts/src/game/Games.sol";
import {IDisputes, Move, Segment} from "../../../contracts/src/interfaces/IDisputes.sol";
import {Ops} from "../../../contracts/src/referee/Ops.sol";
import {Batch, Batches, Lie} from "../village/Batches.sol";
import {Case, Cases} from "../village/Cases.sol";
import {Plan} from "../village/Plan.sol";
import {Board, Solver} from "../village/Solver.sol";
import {Scene, Table} from "../village/Scene.sol";

/// @title Attacks on what is judged, and the rule that answers each (docs/laws.md, "Rules")
contract JudgementAttacks is Scene {
    /// @dev The honest watch against a worker that lies about `step` in the game.
    function _convicts(Lie lie, uint256 step, uint256 element) private returns (uint8) {
        Batch memory b = Batches.build(lie);
        Segment memory s = _fault(_serve(b), b, 0);
        if (_shown(s.kind)) return _started(WATCH, b, s, "").seen.convicted;
        Case memory truth = Cases.truth(b, s);
        assertTrue(Cases.verdict(truth), "expected a fault");
        Table memory t = _challenged(WATCH, b, s, truth);
        return _playOut(t, _lying(b, s, step, element, false), truth);
    }

    /// @dev A worker serves what is no number, hoping that no distance from it can be computed.
    function test_totalDecoding_servingNoNumbersConvicts() external {
        assertEq(_convicts(Lie.NAN, 4, 0), 1, "convicted");
    }

    /// @dev A challenger accuses a token whose logit lost to another's by a rounding error.
    function test_twoSidedMargin_aTokenThatLostWithinTheMarginIsSafe() external {
        Batch memory b = Batches.build(Lie.CLOSE);
        bytes32 job = _serve(b);
        Segment memory s = Segment(job, 1, Plan.TOKEN, 0, 1, 0, _best(b));
        Case memory truth = Cases.truth(b, s);
        assertTrue(truth.vectors[3][1] > truth.vectors[3][0], "the competitor's logit is larger");
        // Honest up to the logits: only the last instruction is claimed wrongly.
        Case memory claim = _lying(b, s, 4, 0, true);
        assertEq(_playOut(_challenged(LIAR, b, s, claim), truth, claim), NOBODY, "nobody is convicted");
    }

    function test_twoSidedMargin_aTokenThatLostByMoreConvicts() external {
        assertEq(_convicts(Lie.TOKEN, 4, 0), 1, "convicted");
    }

    /// @dev A worker leaves out one block whose share in the whole row is below the tolerance.
    function test_perBlockVerdict_aFaultThatThePooledRowForgivesConvicts() external {
        Batch memory b = Batches.build(Lie.BLOCK);
        Segment memory s = Segment(0, 0, Plan.K, 0, 0, 0, 0);
        int256[][] memory pooled = new int256[][](3);
        bytes memory sum = Batches.add(Batches.row(b.tensors[0][Plan.H], 0), Batches.row(b.tensors[0][Plan.ATTN], 0));
        pooled[0] = Batches.served(sum);
        pooled[1] = Batches.served(Batches.row(b.tensors[0][Plan.KEYS], 0));
        pooled[2] = new int256[](3);
        (pooled[2][0], pooled[2][1], pooled[2][2]) = (1, 8, 1 << 20);
        assertEq(Ops.verdict(pooled, 1 << 49), 0, "the pooled distance is within tolerance");
        assertTrue(!Cases.verdict(Cases.truth(b, s)), "so is the other block");
        assertEq(_convicts(Lie.BLOCK, 1, 0), 0, "convicted");
    }

    /// @dev A worker flips the lowest bit of one number between two layers.
    function test_exactLink_oneBitBetweenLayersConvicts() external {
        assertEq(_convicts(Lie.OUT, 0, 0), 1, "within a stage");
        assertEq(_convicts(Lie.EMBED, 0, 0), 0, "of the embedding");
        Batch memory b = Batches.build(Lie.LINK_RECEIVER);
        Table memory t = _started(WATCH, b, _fault(_serve(b), b, 0), "");
        _runsOut(t);
        assertEq(t.seen.convicted, 1, "what it received");
    }

    /// @dev A sender hands off another row than it commits to, so that the honest receiver is accused.
    function test_signedHandoff_anHonestReceiverIsNotFramed() external {
        Batch memory b = Batches.build(Lie.LINK_SENDER);
        Table memory t = _started(WATCH, b, _fault(_serve(b), b, 0), "");
        assertEq(t.seen.game.worker, _account(1), "the receiver is accused");
        _do(t, _account(1), _deflectionCall(t.id, t.seen.game, b));
        assertEq(t.seen.convicted, 0, "the sender is convicted");
        assertTrue(!escrow.convicted(t.segment.job, 1), "the receiver is not");
    }

    /// @dev A receiver lies and shows a hand-off that the sender never signed.
    function test_signedHandoff_aReceiverCannotForgeIt() external {
        Batch memory b = Batches.build(Lie.LINK_RECEIVER);
        Table memory t = _started(WATCH, b, _fault(_serve(b), b, 0), "");
        // The very record that would help it, signed by the wrong key.
        bytes memory row = Batches.row(b.tensors[1][Plan.H], 1);
        b.handoff = abi.encodePacked(uint32(0), uint32(1), uint32(1), new bytes(128));
        for (uint256 i = 0; i < 128; ++i) {
            b.handoff[12 + i] = row[512 + i];
        }
        bytes memory call = _deflectionCall(t.id, t.seen.game, b);
        call[call.length - 95] ^= 0x01; // within r of the signature
        _refused(_account(1), call, IDisputes.BadHandoff.selector);
        _runsOut(t);
        assertEq(t.seen.convicted, 1, "convicted");
    }

    /// @dev A worker stops early and bills what it never served.
    function test_stopAndBill_aFalseCountOrTotalConvicts() external {
        assertEq(_convicts(Lie.STOP, 0, 0), 1, "stop code");
        assertEq(_convicts(Lie.BILL, 0, 0), 1, "total");
        Batch memory b = Batches.build(Lie.LENGTH);
        Table memory t = _started(WATCH, b, _fault(_serve(b), b, 0), "");
        _runsOut(t);
        assertEq(t.seen.convicted, 1, "positions");
    }

    /// @dev A friend of a guilty worker opens a game in which it agrees with the worker, to be beaten at once or to stall.
    function test_constantWrong_agreeingWithTheWorkerOpensNoGame() external {
        Batch memory b = Batches.build(Lie.MLP_FIRST);
        Segment memory s = _fault(_serve(b), b, 0);
        Case memory agrees = _lying(b, s, 4, 0, false);
        Table memory t = _prepared(LIAR, b, s, _steps(agrees));
        _refused(LIAR, _openingCall(b, s, t.salt, t.steps), IDisputes.VerdictNotWrong.selector);
        // Another encoding of "wrong" is not wrong either: the leaf of i64 2.
        agrees.vectors[4][0] = 2;
        _refused(LIAR, _openingCall(b, s, t.salt, _steps(agrees)), IDisputes.VerdictNotWrong.selector);
        assertEq(escrow.openGames(s.job, 0), 0, "games");
    }

    /// @dev A liar writes the right value with other bytes, one bit away, or a value at the end of its width. The lowest bit is the sign.
    function test_injectiveEncoding_everyOtherByteStringIsProvedWrong() external {
        Batch memory b = Batches.build(Lie.NONE);
        Segment memory s = Segment(_serve(b), 0, Plan.MLP, 0, 0, 1, 0);
        Case memory truth = Cases.truth(b, s);
        uint256[3] memory flipped = [uint256(1), 1 << 32, 1 << 63];
        for (uint256 i = 0; i < flipped.length; ++i) {
            _provedWrong(b, s, truth, 3, 7, _flip(truth.vectors[3][7], flipped[i]));
            _provedWrong(b, s, truth, 1, 0, _flip(truth.vectors[1][0], flipped[i] << 64 * (i / 2)));
        }
        _provedWrong(b, s, truth, 3, 7, type(int64).min);
        _provedWrong(b, s, truth, 1, 0, type(int128).max);
    }

    /// @dev The value whose encoding has those bits changed.
    function _flip(int256 value, uint256 bits) private pure returns (int256) {
        uint256 zigzag = uint256((value << 1) ^ (value >> 255)) ^ bits;
        return int256(zigzag >> 1) ^ -int256(zigzag & 1);
    }

    function _provedWrong(
        Batch memory b,
        Segment memory s,
        Case memory truth,
        uint256 step,
        uint256 element,
        int256 value
    ) private {
        Case memory claim = _lying(b, s, step, element, true);
        claim.vectors[step][element] = value;
        assertEq(_playOut(_challenged(LIAR, b, s, claim), truth, claim), NOBODY, "the liar loses");
    }

    /// forge-config: default.fuzz.runs = 16
    /// forge-config: nightly.fuzz.runs = 500
    /// @dev Whatever sums a liar posts, one of them is proved wrong: `prove` never reverts on well-formed data.
    function testFuzz_totalProve_anySumsAreProvedWrong(bytes32 sums) external {
        Batch memory b = Batches.build(Lie.NONE);
        bytes32 job = _serve(b);
        Segment memory s = Segment(job, 0, Plan.MLP, 0, 0, 1, 0);
        Case memory truth = Cases.truth(b, s);
        Case memory claim = _lying(b, s, 1, 0, true);
        Table memory t = _challenged(LIAR, b, s, claim);
        assertTrue(_moves(t, truth), "the worker picks the sum of squares");
        Move memory move = Solver.solve(Board(t.seen.game, t.seen.list, t.steps, 0), claim).move;
        move.list = abi.encodePacked(sums);
        if (keccak256(move.list) == keccak256(Cases.sums(truth, 1, 0, 0, 2))) return;
        (bool done,) = _send(LIAR, abi.encodeCall(IDisputes.descend, (t.id, Games.pack(t.seen.game), move)));
        if (!done) return; // they add up to what they dispute
        t.seen = _seen();
        assertTrue(_moves(t, truth), "the worker proves one of them wrong");
        assertTrue(t.seen.ended && t.seen.convicted == NOBODY, "and wins");
    }
}
