// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Games} from "../../../contracts/src/game/Games.sol";
import {HandoffProof, IDisputes, Phase, Segment} from "../../../contracts/src/interfaces/IDisputes.sol";
import {IEscrow, Status} from "../../../contracts/src/interfaces/IEscrow.sol";
import {Batch, Batches, Lie} from "../village/Batches.sol";
import {Case, Cases} from "../village/Cases.sol";
import {Plan} from "../village/Plan.sol";
import {Scene, Table} from "../village/Scene.sol";

/// @title Moves in the last second, repeated, out of order, front-run, from a stranger, against what is over; and many games at once
contract MoveAttacks is Scene {
    uint32 private constant CLOCK = 30;
    uint32 private constant GRACE = 5;
    // Instructions of the MLP: one of two blocks, proved after three lists; one that is proved at once.
    uint256 private constant SUM = 0;
    uint256 private constant INVERSE_ROOT = 2;

    /// @dev The watch against a worker that lies about one instruction, which faces the watch's instruction roots.
    function _game(uint256 step) private returns (Table memory t, Case memory worker, Case memory watch) {
        Batch memory b = Batches.build(Lie.MLP_FIRST);
        Segment memory s = _fault(_serve(b), b, 0);
        watch = Cases.truth(b, s);
        worker = _lying(b, s, step, 5, false);
        t = _challenged(WATCH, b, s, watch);
    }

    function test_lastSecond_everyMoveOfAWholeGameCounts() external {
        (Table memory t, Case memory worker, Case memory watch) = _game(INVERSE_ROOT);
        uint256 moves;
        while (true) {
            vm.warp(_deadline(t));
            _refused(STRANGER, _flagCall(t), IDisputes.FlagNotFallen.selector);
            if (!_moves(t, t.seen.game.workerTurn ? worker : watch)) break;
            ++moves;
            if (t.seen.ended) break;
        }
        // The worker denies the inverse root in its last second, the watch proves it in its own.
        assertTrue(t.seen.ended && t.seen.convicted == 0, "convicted");
        assertEq(moves, 2, "moves");
    }

    function test_lastSecond_aSecondLaterTheFlagHasFallenForEverybody() external {
        (Table memory t, Case memory worker,) = _game(SUM);
        bytes memory call = _callOf(t, worker);
        vm.warp(_deadline(t) + 1);
        _refused(_account(0), call, IDisputes.FlagFallen.selector);
        _refused(vm.addr(_key(0)), call, IDisputes.FlagFallen.selector);
        _do(t, STRANGER, _flagCall(t));
        assertEq(t.seen.convicted, 0, "convicted");
        _refused(STRANGER, _flagCall(t), IDisputes.WrongState.selector);
    }

    function test_lastSecond_graceIsNotStolenByAQuickOpponent() external {
        (Table memory t, Case memory worker, Case memory watch) = _game(SUM);
        vm.warp(_deadline(t));
        assertTrue(_moves(t, worker), "all of its time is used");
        assertTrue(_moves(t, watch), "the opponent answers in the same second");
        assertEq(_deadline(t), block.timestamp + GRACE, "the worker has grace again");
    }

    function test_repeated_aMoveCountsOnce() external {
        (Table memory t, Case memory worker,) = _game(SUM);
        bytes memory call = _callOf(t, worker);
        bytes memory flag_ = _flagCall(t);
        assertTrue(_moves(t, worker), "moved");
        bytes32 state = disputes.stateOf(t.id);
        _refused(_account(0), call, IDisputes.WrongState.selector);
        _refused(vm.addr(_key(0)), call, IDisputes.WrongState.selector);
        // An old state has an old clock, whose flag has long fallen.
        vm.warp(START + CLOCK + 1);
        _refused(STRANGER, flag_, IDisputes.WrongState.selector);
        assertEq(disputes.stateOf(t.id), state, "state");
    }

    function test_outOfOrder_aMoveOfAnotherPhaseIsRefused() external {
        (Table memory t, Case memory worker, Case memory watch) = _game(SUM);
        bytes[] memory calls = new bytes[](4);
        calls[0] = _callOf(t, worker);
        assertTrue(_moves(t, worker), "nodes");
        calls[1] = _callOf(t, watch);
        assertTrue(_moves(t, watch), "elements");
        assertTrue(t.seen.game.phase == Phase.Elements && t.seen.game.workerTurn, "the worker faces elements");
        // Neither an earlier move, nor the opponent's, nor a deflection, nor descending where one must prove.
        _refused(_account(0), calls[0], IDisputes.WrongState.selector);
        _refused(_account(0), calls[1], IDisputes.WrongState.selector);
        HandoffProof memory none = HandoffProof(0, 1, 0, "", new bytes32[](0), "");
        bytes memory deflection = abi.encodeCall(IDisputes.deflect, (t.id, Games.pack(t.seen.game), none));
        _refused(_account(0), deflection, IDisputes.WrongPhase.selector);
        _refused(_account(0), _callOf(t, worker), IDisputes.NotWrong.selector);
        _refused(WATCH, _callOf(t, worker), IDisputes.NotYourTurn.selector);
    }

    function test_outOfOrder_aChallengeBeforeItsCommitmentOrWithAnothersIsRefused() external {
        Batch memory b = Batches.build(Lie.MLP_FIRST);
        Segment memory s = _fault(_serve(b), b, 0);
        bytes memory steps = _steps(Cases.truth(b, s));
        _refused(WATCH, _openingCall(b, s, bytes32(uint256(7)), steps), IDisputes.UnknownCommitment.selector);
        Table memory t = _prepared(WATCH, b, s, steps);
        Segment memory other = Segment(s.job, 0, Plan.MLP, 0, 0, 0, 0);
        _refused(WATCH, _openingCall(b, other, t.salt, steps), IDisputes.UnknownCommitment.selector);
    }

    function test_stranger_nobodyMovesForAnother() external {
        (Table memory t, Case memory worker, Case memory watch) = _game(SUM);
        address[4] memory strangers = [STRANGER, COPIER, WATCH, _account(1)];
        for (uint256 i = 0; i < strangers.length; ++i) {
            _refused(strangers[i], _callOf(t, worker), IDisputes.NotYourTurn.selector);
        }
        assertTrue(_moves(t, worker), "the worker itself");
        strangers[2] = _account(0);
        for (uint256 i = 0; i < strangers.length; ++i) {
            _refused(strangers[i], _callOf(t, watch), IDisputes.NotYourTurn.selector);
        }
    }

    /// @dev A front-runner calls the flag, settles or releases first: what was to be done is done.
    function test_frontRun_whatAStrangerDidFirstCountsAsDone() external {
        (Table memory t,,) = _game(SUM);
        vm.warp(_deadline(t) + 1);
        _do(t, COPIER, _flagCall(t));
        _refused(WATCH, _flagCall(t), IDisputes.WrongState.selector);
        assertEq(disputes.credit(WATCH), t.seen.game.bond + 2 * 2_000_000, "the bond returns to who posted it");
        assertEq(disputes.credit(COPIER), 0, "the caller has nothing of it");
        vm.warp(escrow.windowEnd(t.segment.job) + 1);
        vm.prank(COPIER);
        escrow.release(t.segment.job);
        assertTrue(escrow.credit(WATCH) > 0, "the reward is the challenger's");
        assertEq(escrow.credit(COPIER), 0, "not the caller's");
    }

    // ---- against what is over

    function test_settled_noMoveIntoAGameThatEnded() external {
        (Table memory t, Case memory worker, Case memory watch) = _game(INVERSE_ROOT);
        bytes memory first = _callOf(t, worker);
        bytes memory opening = _openingCall(t.batch, t.segment, t.salt, t.steps);
        _playOut(t, worker, watch);
        bytes memory last = _callOf(t, watch);
        _refused(_account(0), first, IDisputes.WrongState.selector);
        _refused(WATCH, last, IDisputes.WrongState.selector);
        _refused(STRANGER, _flagCall(t), IDisputes.WrongState.selector);
        _refused(WATCH, opening, IDisputes.GameExists.selector);
        _refused(WATCH, abi.encodeCall(IDisputes.commit, (t.id)), IDisputes.CommitmentExists.selector);
    }

    function test_settled_noGameAgainstAJobThatIsOver() external {
        Batch memory b = Batches.build(Lie.MLP_FIRST);
        bytes32 job = _serve(b);
        Segment memory s = _fault(job, b, 0);
        Table memory t = _prepared(WATCH, b, s, _steps(Cases.truth(b, s)));
        bytes memory opening = _openingCall(b, s, t.salt, t.steps);
        vm.warp(escrow.windowEnd(job) + 1);
        _refused(WATCH, opening, IEscrow.TooLate.selector);
        escrow.settle(job);
        _refused(WATCH, opening, IEscrow.WrongStatus.selector);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.WrongStatus.selector, job, Status.Committed, Status.Paid));
        escrow.settle(job);
        assertEq(token.balanceOf(WATCH), FUNDS, "no bond was taken");
    }

    // ---- many at once

    /// @dev Games on one job and on another, interleaved move by move: each ends as if it were alone.
    function test_manyGames_onOneJobAndOnManyDoNotTouchOneAnother() external {
        Table[5] memory tables;
        Case[5] memory workers_;
        Case[5] memory challengers;
        Batch memory right = Batches.build(Lie.NONE);
        Batch memory wrong = Batches.build(Lie.BOTH);
        bytes32[2] memory served = [_serve(right), _serve(wrong)];
        for (uint256 i = 0; i < 5; ++i) {
            // 0, 1, 2: against the right batch. 3, 4: against both stages of the wrong one.
            Batch memory b = i < 3 ? right : wrong;
            Segment memory s = i < 3
                ? Segment(served[0], uint8(i % 2), Plan.MLP, 0, uint32(i % 2), 0, 0)
                : _fault(served[1], b, i - 3);
            Case memory truth = Cases.truth(b, s);
            Case memory lie = _lying(b, s, i, 9, i < 3);
            (workers_[i], challengers[i]) = i < 3 ? (truth, lie) : (lie, truth);
            tables[i] = _challenged(i < 3 ? LIAR : WATCH, b, s, challengers[i]);
        }
        for (uint256 turn = 0; turn < 6; ++turn) {
            for (uint256 i = 0; i < 5; ++i) {
                if (!tables[i].seen.ended) {
                    _moves(tables[i], tables[i].seen.game.workerTurn ? workers_[i] : challengers[i]);
                }
            }
        }
        for (uint256 i = 0; i < 5; ++i) {
            uint8 convicted = _playOut(tables[i], workers_[i], challengers[i]);
            assertEq(convicted, i < 3 ? NOBODY : i - 3, "convicted");
        }
        vm.warp(escrow.windowEnd(served[1]) + 1);
        escrow.settle(served[0]);
        escrow.release(served[1]);
        assertEq(uint256(escrow.status(served[0])), uint256(Status.Paid), "the right batch is paid");
        uint256 lock = escrow.job(served[1]).lock;
        assertEq(workers.freeStake(_account(0)), STAKE - lock, "one lock of stage 0");
        assertEq(workers.freeStake(_account(1)), STAKE - lock, "one lock of stage 1");
    }

    /// @dev Law 5. Spam in the window's last second, every move in its last second: pay comes within the window and one game.
    function test_law5_payIsDelayedByTheWindowAndOneGameAtMost() external {
        Batch memory b = Batches.build(Lie.NONE);
        bytes32 job = _serve(b);
        Segment memory s = Segment(job, 0, Plan.MLP, 0, 0, 0, 0);
        Case memory truth = Cases.truth(b, s);
        Case memory claim = _lying(b, s, 1, 0, true); // the longest game of this model
        uint256 end = escrow.windowEnd(job);
        vm.warp(end);
        uint256 spam = 6;
        Table[] memory tables = new Table[](spam);
        for (uint256 i = 0; i < spam; ++i) {
            tables[i] = _challenged(LIAR, b, s, claim);
        }
        vm.expectRevert(abi.encodeWithSelector(IEscrow.TooEarly.selector, end + 1));
        escrow.settle(job);
        uint256 longest = 0;
        for (uint256 i = 0; i < spam; ++i) {
            uint256 moves = 1;
            vm.warp(end);
            while (!tables[i].seen.ended) {
                vm.warp(_deadline(tables[i]));
                if (_moves(tables[i], tables[i].seen.game.workerTurn ? truth : claim)) ++moves;
                else _runsOut(tables[i]);
            }
            uint256 most = 2 * uint256(CLOCK) + (i + moves) * GRACE + 1;
            assertTrue(block.timestamp - end <= most, "one game");
            if (block.timestamp > longest) longest = block.timestamp;
        }
        vm.warp(longest);
        escrow.settle(job);
        assertEq(uint256(escrow.status(job)), uint256(Status.Paid), "paid");
    }
}
