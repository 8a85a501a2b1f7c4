// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IWorkers, Stage, Worker} from "../../contracts/src/interfaces/IWorkers.sol";
import {Market} from "./Market.t.sol";

contract WorkersTest is Market {
    address private constant STRANGER = address(0xBAD);

    function setUp() public {
        _deploy(address(this));
        for (uint256 i; i < 3; ++i) {
            _hire(i);
        }
    }

    // ---- register ----

    function test_register_revertsOnAnInvalidWorker() public {
        Worker memory w = _worker(0);
        w.signer = address(0);
        vm.expectRevert(abi.encodeWithSelector(IWorkers.InvalidWorker.selector, "signer"));
        workers.register(w);
        w = _worker(0);
        w.tls = 0;
        vm.expectRevert(abi.encodeWithSelector(IWorkers.InvalidWorker.selector, "tls"));
        workers.register(w);
        w = _worker(0);
        w.url = "";
        vm.expectRevert(abi.encodeWithSelector(IWorkers.InvalidWorker.selector, "url"));
        workers.register(w);
        w.url = string(new bytes(201));
        vm.expectRevert(abi.encodeWithSelector(IWorkers.UrlTooLong.selector, 201));
        workers.register(w);
        w.url = string(new bytes(200));
        workers.register(w);
    }

    function test_register_keepsTheSignerWhileStakeIsLocked() public {
        vm.prank(address(escrow));
        workers.lock(_account(0), 1);
        Worker memory w = _worker(0);
        w.signer = address(0x1234);
        vm.startPrank(_account(0));
        vm.expectRevert(abi.encodeWithSelector(IWorkers.InvalidWorker.selector, "signer changed while stake is locked"));
        workers.register(w);
        // The rest may change: a worker moves house while it serves.
        w = _worker(0);
        w.url = "http://elsewhere:1";
        w.tls = bytes32(uint256(77));
        workers.register(w);
        vm.stopPrank();
        assertEq(workers.worker(_account(0)).tls, bytes32(uint256(77)), "tls");

        vm.prank(address(escrow));
        workers.unlock(_account(0), 1);
        w.signer = address(0x1234);
        vm.prank(_account(0));
        workers.register(w);
        assertEq(workers.signerOf(_account(0)), address(0x1234), "signer");
    }

    // ---- stake ----

    function test_stake_revertsUnlessRegistered() public {
        vm.prank(STRANGER);
        vm.expectRevert(abi.encodeWithSelector(IWorkers.NotRegistered.selector, STRANGER));
        workers.stake(1);
    }

    function test_stake_movesTokens() public view {
        assertEq(workers.freeStake(_account(0)), STAKE, "free");
        assertEq(workers.lockedStake(_account(0)), 0, "locked");
        assertEq(token.balanceOf(address(workers)), 3 * STAKE, "balance");
    }

    function test_requestWithdrawal_revertsBeyondTheFreeStake() public {
        vm.prank(address(escrow));
        workers.lock(_account(0), 10);
        vm.prank(_account(0));
        vm.expectRevert(abi.encodeWithSelector(IWorkers.InsufficientStake.selector, _account(0), STAKE - 10, STAKE));
        workers.requestWithdrawal(STAKE);
    }

    function test_withdraw_revertsBeforeTheDelay() public {
        vm.startPrank(_account(0));
        vm.expectRevert(abi.encodeWithSelector(IWorkers.WithdrawalNotReady.selector, 0));
        workers.withdraw();
        workers.requestWithdrawal(100);
        vm.warp(START + DELAY_SECONDS - 1);
        vm.expectRevert(abi.encodeWithSelector(IWorkers.WithdrawalNotReady.selector, START + DELAY_SECONDS));
        workers.withdraw();
        vm.stopPrank();
    }

    function test_withdraw_paysOnceAfterTheDelay() public {
        vm.startPrank(_account(0));
        workers.requestWithdrawal(100);
        assertEq(workers.freeStake(_account(0)), STAKE - 100, "free");
        vm.warp(START + DELAY_SECONDS);
        workers.withdraw();
        assertEq(token.balanceOf(_account(0)), 100, "paid");
        vm.expectRevert(abi.encodeWithSelector(IWorkers.WithdrawalNotReady.selector, 0));
        workers.withdraw();
        vm.stopPrank();
    }

    function test_requestWithdrawal_replacesTheEarlierOne() public {
        vm.startPrank(_account(0));
        workers.requestWithdrawal(100);
        vm.warp(START + 10);
        workers.requestWithdrawal(STAKE);
        (uint256 amount, uint64 availableAt) = workers.withdrawalOf(_account(0));
        assertEq(amount, STAKE, "leaving");
        assertEq(availableAt, START + 10 + DELAY_SECONDS, "available");
        workers.requestWithdrawal(0);
        (amount, availableAt) = workers.withdrawalOf(_account(0));
        assertEq(amount + availableAt, 0, "cancelled");
        assertEq(workers.freeStake(_account(0)), STAKE, "free");
        vm.stopPrank();
    }

    // ---- locks ----

    function test_locks_revertForAnyoneButEscrow() public {
        vm.startPrank(STRANGER);
        bytes memory refusal = abi.encodeWithSelector(IWorkers.NotEscrow.selector, STRANGER);
        vm.expectRevert(refusal);
        workers.lock(_account(0), 1);
        vm.expectRevert(refusal);
        workers.unlock(_account(0), 1);
        vm.expectRevert(refusal);
        workers.slash(_account(0), 1);
        vm.stopPrank();
    }

    function test_lock_revertsBeyondTheFreeStake() public {
        vm.prank(_account(0));
        workers.requestWithdrawal(1); // what is leaving backs nothing
        vm.prank(address(escrow));
        vm.expectRevert(abi.encodeWithSelector(IWorkers.InsufficientStake.selector, _account(0), STAKE - 1, STAKE));
        workers.lock(_account(0), STAKE);
    }

    function testFuzz_locks_addUp(uint256 locked, uint256 slashed, uint256 unlocked) public {
        locked = bound(locked, 0, STAKE);
        slashed = bound(slashed, 0, locked);
        unlocked = bound(unlocked, 0, locked - slashed);
        vm.startPrank(address(escrow));
        workers.lock(_account(0), locked);
        workers.slash(_account(0), slashed);
        workers.unlock(_account(0), unlocked);
        vm.stopPrank();
        assertEq(workers.lockedStake(_account(0)), locked - slashed - unlocked, "locked");
        assertEq(workers.freeStake(_account(0)), STAKE - locked + unlocked, "free");
        assertEq(token.balanceOf(address(escrow)), slashed, "escrow");
    }

    function test_slash_revertsBeyondTheLock() public {
        vm.startPrank(address(escrow));
        workers.lock(_account(0), 5);
        vm.expectRevert();
        workers.slash(_account(0), 6);
        vm.expectRevert();
        workers.unlock(_account(0), 6);
        vm.stopPrank();
    }

    // ---- pipelines ----

    function test_createPipeline_revertsOnABrokenPartition() public {
        Stage[] memory s = _stages(3);
        s[1].firstLayer += 1; // a gap
        _refuse(s, abi.encodeWithSelector(IWorkers.InvalidPartition.selector, 1, s[0].endLayer, s[1].firstLayer));
        s = _stages(3);
        s[1].firstLayer -= 1; // an overlap
        _refuse(s, abi.encodeWithSelector(IWorkers.InvalidPartition.selector, 1, s[0].endLayer, s[1].firstLayer));
        s = _stages(3);
        s[0].firstLayer = 1;
        _refuse(s, abi.encodeWithSelector(IWorkers.InvalidPartition.selector, 0, 0, 1));
        s = _stages(3);
        s[1].endLayer = s[1].firstLayer; // empty
        _refuse(s, abi.encodeWithSelector(IWorkers.InvalidPartition.selector, 1, s[0].endLayer, s[1].firstLayer));
        s = _stages(3);
        s[2].endLayer = LAYERS - 1; // too short
        _refuse(s, abi.encodeWithSelector(IWorkers.InvalidPartition.selector, 3, LAYERS, LAYERS - 1));
        s[2].endLayer = LAYERS + 1; // too long
        _refuse(s, abi.encodeWithSelector(IWorkers.InvalidPartition.selector, 3, LAYERS, LAYERS + 1));
        _refuse(new Stage[](0), abi.encodeWithSelector(IWorkers.InvalidPartition.selector, 0, 0, 0));
        _refuse(new Stage[](65), abi.encodeWithSelector(IWorkers.InvalidPartition.selector, 65, 0, 0));
    }

    function test_createPipeline_revertsOnWrongShares() public {
        Stage[] memory s = _stages(3);
        s[0].shareBps += 1;
        _refuse(s, abi.encodeWithSelector(IWorkers.InvalidShares.selector, 10_001));
        s[0].shareBps -= 2;
        _refuse(s, abi.encodeWithSelector(IWorkers.InvalidShares.selector, 9_999));
    }

    function test_createPipeline_revertsOnAnUnknownModelOrWorker() public {
        Stage[] memory s = _stages(3);
        bytes[] memory signatures = _joins(s, 0);
        vm.expectRevert(abi.encodeWithSelector(IWorkers.UnknownModel.selector, bytes32(uint256(5))));
        workers.createPipeline(bytes32(uint256(5)), s, 0, signatures);
        s[2].worker = STRANGER;
        _refuse(s, abi.encodeWithSelector(IWorkers.NotRegistered.selector, STRANGER));
    }

    function test_createPipeline_revertsOnABadSignature() public {
        Stage[] memory s = _stages(3);
        bytes[] memory signatures = _joins(s, 0);
        (signatures[0], signatures[1]) = (signatures[1], signatures[0]);
        _refuse(s, 0, signatures, abi.encodeWithSelector(IWorkers.BadSignature.selector, 0));
        signatures = _joins(s, 0);
        signatures[2] = "";
        _refuse(s, 0, signatures, abi.encodeWithSelector(IWorkers.BadSignature.selector, 2));
        // A join of one pipeline is none of another.
        _refuse(s, 1, _joins(s, 0), abi.encodeWithSelector(IWorkers.BadSignature.selector, 0));
        _refuse(s, 0, new bytes[](2), abi.encodeWithSelector(IWorkers.BadSignature.selector, 2));
    }

    function test_createPipeline_revertsTheSecondTime() public {
        Stage[] memory s = _stages(3);
        bytes32 id = workers.createPipeline(modelId, s, 0, _joins(s, 0));
        _refuse(s, abi.encodeWithSelector(IWorkers.PipelineExists.selector, id));
        workers.createPipeline(modelId, s, 1, _joins(s, 1));
    }

    function test_createPipeline_keepsTheStages() public {
        Stage[] memory s = _stages(3);
        bytes32 expected = _pipelineId(s, 7);
        bytes[] memory signatures = _joins(s, 7);
        vm.expectEmit();
        emit IWorkers.PipelineCreated(expected, modelId, s, 7);
        bytes32 id = workers.createPipeline(modelId, s, 7, signatures);
        assertEq(id, expected, "id");
        assertEq(workers.pipelineModel(id), modelId, "model");
        assertEq(keccak256(abi.encode(workers.pipelineStages(id))), keccak256(abi.encode(s)), "stages");
        assertEq(keccak256(abi.encode(workers.pipelineStage(id, 2))), keccak256(abi.encode(s[2])), "stage 2");
        vm.expectRevert();
        workers.pipelineStage(id, 3);
    }

    function _refuse(Stage[] memory s, bytes memory refusal) private {
        _refuse(s, 0, _joins(s, 0), refusal);
    }

    function _refuse(Stage[] memory s, uint64 nonce, bytes[] memory signatures, bytes memory refusal) private {
        vm.expectRevert(refusal);
        workers.createPipeline(modelId, s, nonce, signatures);
    }
}
