// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Acceptance, IEscrow, Job, Status} from "../../../contracts/src/interfaces/IEscrow.sol";
import {IDisputes, Segment} from "../../../contracts/src/interfaces/IDisputes.sol";
import {Rows} from "../../../contracts/src/game/Rows.sol";
import {IWorkers} from "../../../contracts/src/interfaces/IWorkers.sol";
import {Batch, Batches, Lie} from "../village/Batches.sol";
import {Case, Cases} from "../village/Cases.sol";
import {Plan} from "../village/Plan.sol";
import {Solver} from "../village/Solver.sol";
import {Scene, Table} from "../village/Scene.sol";

interface Prices {
    function txGasPrice(uint256 price_wei) external;
}

/// @title Attacks on consent, stake, bonds and refunds, and the rule that answers each (docs/laws.md, "Rules")
contract MoneyAttacks is Scene {
    uint256 private constant MOVE_GAS = 350_000;
    uint256 private constant GAME_GAS = 2_000_000;
    uint256 private constant GAS_RATE = 2;
    uint256 private constant LOCK = 2 * (650 + GAME_GAS * GAS_RATE);
    uint32 private constant CLOCK = 30;
    uint32 private constant GRACE = 5;

    // ---- consent

    /// @dev A requester has a worker's consent to one job and uses it for another, which that worker never saw.
    function test_consent_anAcceptanceOfOneJobBindsNoOther() external {
        bytes32 wanted = _open(_order(block.timestamp));
        Job memory trap = _order(block.timestamp);
        trap.requestsRoot = keccak256("prompts that nobody showed the workers");
        bytes32 forced = _open(trap);
        Acceptance[] memory given = _acceptances(wanted, STAGES);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.BadSignature.selector, 0));
        escrow.accept(forced, given);
        assertTrue(!escrow.lockHeld(forced, 0), "no lock without consent");
        escrow.accept(wanted, given);
        assertTrue(escrow.lockHeld(wanted, 0), "the job that was accepted");
    }

    // ---- locks

    /// @dev Accomplices: one has itself convicted by a friend at once, so that the job is void and the other takes its stake home.
    function test_locks_outliveTheFirstConviction() external {
        Batch memory b = Batches.build(Lie.BOTH);
        bytes32 job = _serve(b);
        Segment memory first = _fault(job, b, 0);
        Case memory truth = Cases.truth(b, first);
        _playOut(_challenged(COPIER, b, first, truth), _lying(b, first, 4, 0, false), truth);
        assertEq(uint256(escrow.status(job)), uint256(Status.Void), "void");

        // The second accomplice cannot get away.
        assertTrue(escrow.lockHeld(job, 1), "still locked");
        uint256 free = workers.freeStake(_account(1));
        vm.expectRevert(abi.encodeWithSelector(IWorkers.InsufficientStake.selector, _account(1), free, free + 1));
        vm.prank(_account(1));
        workers.requestWithdrawal(free + 1);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.TooEarly.selector, escrow.windowEnd(job) + 1));
        escrow.release(job);

        // A challenge in the window's last second still takes its lock, however long the game lasts.
        vm.warp(escrow.windowEnd(job));
        Segment memory second = _fault(job, b, 1);
        truth = Cases.truth(b, second);
        Table memory t = _challenged(WATCH, b, second, truth);
        vm.warp(_deadline(t));
        vm.expectRevert(abi.encodeWithSelector(IEscrow.GamesOpen.selector, 1));
        escrow.release(job);
        assertEq(_playOut(t, _lying(b, second, 4, 0, false), truth), 1, "convicted");
        escrow.release(job);
        assertEq(workers.freeStake(_account(0)), STAKE - LOCK, "stake of the first");
        assertEq(workers.freeStake(_account(1)), STAKE - LOCK, "stake of the second");
    }

    /// @dev A worker with stake for one job accepts two.
    function test_locks_areDisjointAcrossJobs() external {
        vm.prank(_account(0));
        workers.requestWithdrawal(STAKE - LOCK - LOCK / 2);
        bytes32 one = _open(_order(block.timestamp));
        bytes32 two = _open(_order(block.timestamp));
        escrow.accept(one, _acceptances(one, STAGES));
        Acceptance[] memory given = _acceptances(two, STAGES);
        vm.expectRevert(abi.encodeWithSelector(IWorkers.InsufficientStake.selector, _account(0), LOCK / 2, LOCK));
        escrow.accept(two, given);
    }

    /// @dev A cheat has itself convicted by eight friends, with commitments older than anybody's, to get its lock back.
    function test_slashing_friendsCannotSaveALock() external {
        Batch memory b = Batches.build(Lie.MLP_FIRST);
        bytes32 job = _serve(b);
        Segment memory s = _fault(job, b, 0);
        Case memory truth = Cases.truth(b, s);
        Case memory denial = _lying(b, s, 4, 0, false);
        for (uint160 i = 0; i < 9; ++i) {
            address friend = address(0xF00D00 + i);
            token.mint(friend, FUNDS);
            vm.prank(friend);
            token.approve(address(disputes), type(uint256).max);
            _playOut(_challenged(friend, b, s, truth), denial, truth);
        }
        vm.warp(escrow.windowEnd(job) + 1);
        uint256 burned = token.balanceOf(BURN);
        escrow.release(job);
        uint256 pay = 10; // six tenths of 17
        assertTrue((token.balanceOf(BURN) - burned) * 4 >= LOCK - pay, "at least a quarter burns");
        assertEq(escrow.credit(_account(1)), pay, "the other stage's pay comes first");
    }

    // ---- shows

    /// @dev A fault that is shown at once is shown again and again by others, who send one transaction and are paid for two, `prepare`
    /// included: what the lock pays for gas is bounded, and none of it is the part of whoever committed first.
    function test_link_showingItAgainTakesNothingFromWhoeverWasFirst() external {
        Batch memory b = Batches.build(Lie.OUT);
        bytes32 job = _serve(b);
        Segment memory s = _fault(job, b, 0);
        Table memory t = _started(WATCH, b, s, "");
        assertEq(t.seen.convicted, 1, "convicted");
        _refused(WATCH, _openingCall(b, s, t.salt, ""), IDisputes.GameExists.selector);
        vm.warp(block.timestamp + 1);
        for (uint256 i = 0; i < 9; ++i) {
            bytes32 salt = bytes32(++salts);
            _send(COPIER, abi.encodeCall(IDisputes.commit, (_gameId(COPIER, s, salt))));
            vm.roll(block.number + 1);
            (bool done,) = _send(COPIER, _openingCall(b, s, salt, "")); // it prepares nothing
            assertTrue(done, "the fault is still one");
        }
        vm.warp(escrow.windowEnd(job) + 1);
        uint256 burned = token.balanceOf(BURN);
        escrow.release(job);
        uint256 pay = 6; // four tenths of 17, of the stage that is right
        uint256 two = 2 * MOVE_GAS * GAS_RATE;
        assertEq(escrow.credit(COPIER), (LOCK - pay) / 2 - two, "of the half for gas, what the first left");
        assertTrue(escrow.credit(WATCH) >= two + (LOCK - pay) / 4, "its gas first, and a quarter of the lock at least");
        assertTrue((token.balanceOf(BURN) - burned) * 4 >= LOCK - pay, "at least a quarter burns");
        assertEq(disputes.credit(WATCH) + disputes.credit(COPIER), 0, "no bond was taken, none returns");
    }

    /// @dev A liar prepares every sum of a right job, before anybody else does and after: not one of them convicts.
    function test_link_noPreparationConvictsWhatIsRight() external {
        Batch memory b = Batches.build(Lie.NONE);
        bytes32 job = _serve(b);
        for (uint32 i = 0; i < 8; ++i) {
            Segment memory s = Segment(job, 1, Plan.LINK, 0, i % 2, i / 2 % 2, i < 4 ? 0 : uint32(Plan.WIDTH - 1));
            _prepare(LIAR, b, s);
            Segment memory other = Segment(job, 1, Plan.LINK, 0, i % 2, 1 - i / 2 % 2, s.unit);
            _prepare(LIAR, b, other);
            Table memory t = _prepared(COPIER, b, s, "");
            _refused(COPIER, _openingCall(b, s, t.salt, ""), IDisputes.NotWrong.selector);
            // The evidence of one position, or of another column, under the name of the other.
            bytes32 salt = bytes32(++salts);
            _send(LIAR, abi.encodeCall(IDisputes.commit, (_gameId(LIAR, other, salt))));
            vm.roll(block.number + 1);
            bytes memory crossed = abi.encodeCall(IDisputes.show, (other, salt, model, Solver.exhibits(b, s)));
            _refused(LIAR, crossed, Rows.RootMismatch.selector);
        }
        assertTrue(!escrow.convicted(job, 0) && !escrow.convicted(job, 1), "nobody is convicted");
    }

    // ---- challenges

    /// @dev A copier sees a challenge on its way, sends it first, and later sends it again under its own name.
    function test_committedChallenge_aCopyIsWorthNothing() external {
        Batch memory b = Batches.build(Lie.MLP_FIRST);
        Segment memory s = _fault(_serve(b), b, 0);
        Case memory truth = Cases.truth(b, s);
        bytes32 salt = bytes32(++salts);
        bytes32 id = _gameId(WATCH, s, salt);
        // The commitment says nothing, and whoever sends it first commits the watch.
        _send(COPIER, abi.encodeCall(IDisputes.commit, (id)));
        _refused(WATCH, abi.encodeCall(IDisputes.commit, (id)), IDisputes.CommitmentExists.selector);
        bytes memory call = _openingCall(b, s, salt, _steps(truth));
        _refused(WATCH, call, IDisputes.CommitmentTooRecent.selector);
        vm.roll(block.number + 1);
        _refused(COPIER, call, IDisputes.UnknownCommitment.selector);
        // Its own commitment, once it has seen the challenge, comes a block too late.
        _send(COPIER, abi.encodeCall(IDisputes.commit, (_gameId(COPIER, s, salt))));
        _refused(COPIER, call, IDisputes.CommitmentTooRecent.selector);
        Table memory t = Table(id, b, s, salt, _steps(truth), WATCH, _none());
        _do(t, WATCH, call);
        _refused(WATCH, call, IDisputes.GameExists.selector);
        uint64 committedAt = t.seen.game.committedAt;

        // The copier's game is younger: the reward goes to the watch.
        vm.warp(block.timestamp + 1);
        Table memory copy = _challenged(COPIER, b, s, truth);
        Case memory denial = _lying(b, s, 4, 0, false);
        assertTrue(copy.seen.game.committedAt > committedAt, "younger");
        assertEq(_playOut(copy, denial, truth), 0, "the copy is played to its end first");
        assertEq(_playOut(t, denial, truth), 0, "the original");
        vm.warp(escrow.windowEnd(s.job) + 1);
        escrow.release(s.job);
        uint256 gas = copy.seen.game.challengerMoves * MOVE_GAS * GAS_RATE;
        assertTrue(escrow.credit(COPIER) <= gas + MOVE_GAS * GAS_RATE, "no more than its gas");
        assertTrue(escrow.credit(WATCH) > LOCK / 4, "the reward");
    }

    function _none() private pure returns (Seen memory seen) {}

    // ---- bonds

    /// @dev A spammer opens games against an honest stage, so that it has no time and a real challenger no money.
    function test_bonds_doubleAndTheWorkersClockGrows() external {
        Batch memory b = Batches.build(Lie.NONE);
        Segment memory s = Segment(_serve(b), 0, Plan.MLP, 0, 0, 0, 0);
        Case memory truth = Cases.truth(b, s);
        Case memory claim = _lying(b, s, 4, 0, true);
        uint256 paid;
        Table[9] memory tables;
        for (uint256 i = 0; i < 9; ++i) {
            uint256 bond = GAME_GAS * GAS_RATE << i / 4;
            assertEq(disputes.bondFor(s.job, 0), bond, "announced");
            tables[i] = _challenged(LIAR, b, s, claim);
            paid += bond;
            assertEq(FUNDS - token.balanceOf(LIAR), paid, "taken");
            assertEq(uint256(tables[i].seen.game.workerSeconds), CLOCK + i * GRACE, "the worker's clock");
        }
        assertEq(disputes.bondFor(s.job, 1), GAME_GAS * GAS_RATE, "another stage is no dearer");
        // The honest stage answers them one after another, `grace` seconds each, and is paid for every move.
        uint256 moves;
        for (uint256 i = 0; i < 9; ++i) {
            vm.warp(block.timestamp + GRACE);
            assertTrue(_moves(tables[i], truth), "in time");
            ++moves;
        }
        for (uint256 i = 0; i < 9; ++i) {
            assertEq(_playOut(tables[i], truth, claim), NOBODY, "the spammer loses");
        }
        assertEq(disputes.credit(_account(0)), moves * MOVE_GAS * GAS_RATE, "paid by schedule");
        assertEq(disputes.credit(LIAR), 0, "nothing returns");
        uint256 rest = paid - moves * MOVE_GAS * GAS_RATE;
        vm.prank(_account(0));
        disputes.withdraw();
        assertEq(token.balanceOf(address(disputes)), rest, "the rest burns: it stays, and is nobody's");
        assertEq(disputes.bondFor(s.job, 0), GAME_GAS * GAS_RATE, "and it is cheap again");
    }

    // ---- refunds

    /// @dev A worker makes its moves dear - a high gas price, padded calldata - to drain the challenger's bond.
    function test_gasRefunds_followTheScheduleWhateverWasSpent() external {
        uint256[2] memory paid;
        for (uint256 i = 0; i < 2; ++i) {
            Prices(address(vm)).txGasPrice(i == 0 ? 1 : 1000 gwei);
            vm.fee(i == 0 ? 1 : 900 gwei);
            Batch memory b = Batches.build(Lie.NONE);
            Segment memory s = Segment(_serve(b), 0, Plan.MLP, 0, 0, 0, 0);
            Case memory truth = Cases.truth(b, s);
            Case memory claim = _lying(b, s, 0, 5, true);
            Table memory t = _challenged(LIAR, b, s, claim);
            bytes memory call = _callOf(t, truth);
            _do(t, _account(0), i == 0 ? call : bytes.concat(call, new bytes(4096)));
            uint256 before = disputes.credit(_account(0));
            assertEq(_playOut(t, truth, claim), NOBODY, "the liar loses");
            paid[i] = disputes.credit(_account(0)) - before;
            uint256 moves = t.seen.game.workerMoves;
            assertTrue(paid[i] == moves * MOVE_GAS * GAS_RATE || paid[i] == (moves + 1) * MOVE_GAS * GAS_RATE, "paid");
        }
        assertEq(paid[0], paid[1], "whatever was spent");
        assertTrue(paid[0] <= GAME_GAS * GAS_RATE, "and never more than the bond");
    }
}
