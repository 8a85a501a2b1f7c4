// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Acceptance, Claim, IEscrow, Job, Status} from "../../contracts/src/interfaces/IEscrow.sol";
import {IWorkers, Worker} from "../../contracts/src/interfaces/IWorkers.sol";
import {Market} from "./Market.t.sol";

/// @title A job's life without games
contract EscrowTest is Market {
    uint256 private constant COUNT = 3;
    uint256 private constant MAXIMUM = 650; // 100 * 3 + 50 * 7

    bytes32 private pipeline;

    function setUp() public {
        _deploy(address(this));
        pipeline = _pipeline(COUNT);
    }

    // ---- open ----

    function test_open_revertsOnEveryInvalidField() public {
        Job memory j = _job(pipeline);
        j.requestsRoot = 0;
        _refuse(j, "requestsRoot");
        j = _job(pipeline);
        j.requests = 0;
        _refuse(j, "requests");
        j = _job(pipeline);
        j.promptTokens = j.requests - 1;
        _refuse(j, "promptTokens");
        j = _job(pipeline);
        j.maxTokens = j.requests - 1;
        _refuse(j, "maxTokens");
        j = _job(pipeline);
        j.gasRate = 0;
        _refuse(j, "gasRate");
        j = _job(pipeline);
        j.tokenPrice = type(uint128).max;
        _refuse(j, "price");
        j = _job(pipeline);
        j.lock -= 1;
        _refuse(j, "lock");
        j = _job(pipeline);
        j.acceptBy = START - 1;
        _refuse(j, "acceptBy");
        j = _job(pipeline);
        j.commitBy = j.acceptBy;
        _refuse(j, "commitBy");
        j.commitBy = START + 365 days + 1;
        _refuse(j, "commitBy");
        j = _job(pipeline);
        j.window = 19;
        _refuse(j, "window");
        j.window = 30 days + 1;
        _refuse(j, "window");
        j = _job(pipeline);
        j.clock = 4;
        _refuse(j, "clock");
        j.clock = 7 days + 1;
        _refuse(j, "clock");
        j = _job(pipeline);
        j.grace = 0;
        _refuse(j, "grace");
        j.grace = j.clock + 1;
        _refuse(j, "grace");
        j = _job(pipeline);
        j.pipeline = bytes32(uint256(1));
        _refuse(j, "pipeline");
        j = _job(pipeline);
        j.model = bytes32(uint256(1));
        _refuse(j, "model");
    }

    function test_open_acceptsTheBounds() public {
        Job memory j = _job(pipeline);
        j.promptTokens = j.maxTokens = j.requests;
        j.acceptBy = START;
        j.commitBy = START + 365 days;
        j.window = 30 days;
        j.clock = j.grace = 7 days;
        _open(j);
        j.window = 20;
        j.clock = j.grace = 5;
        j.commitBy = START + 1;
        _open(j);
    }

    function test_open_revertsTheSecondTime() public {
        bytes32 id = _open(_job(pipeline));
        vm.prank(REQUESTER);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.JobExists.selector, id));
        escrow.open(_job(pipeline));
    }

    function test_open_takesTheMaximumPrice() public {
        Job memory j = _job(pipeline);
        bytes32 expected = keccak256(abi.encode(block.chainid, address(escrow), REQUESTER, j));
        vm.expectEmit();
        emit IEscrow.JobOpened(expected, REQUESTER, pipeline, j);
        bytes32 id = _open(j);
        assertEq(id, expected, "id");
        assertEq(token.balanceOf(address(escrow)), MAXIMUM, "escrowed");
        assertEq(escrow.requester(id), REQUESTER, "requester");
        assertEq(keccak256(abi.encode(escrow.job(id))), keccak256(abi.encode(j)), "job");
        _expectStatus(id, Status.Open);
    }

    // ---- accept ----

    function test_accept_revertsInTheWrongStatus() public {
        vm.expectRevert(abi.encodeWithSelector(IEscrow.WrongStatus.selector, bytes32(0), Status.Open, Status.None));
        escrow.accept(0, new Acceptance[](0));
        bytes32 id = _open(_job(pipeline));
        vm.warp(START + 101);
        escrow.expire(id);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.WrongStatus.selector, id, Status.Open, Status.Refunded));
        escrow.accept(id, new Acceptance[](0));
    }

    function test_accept_keepsItsDeadline() public {
        bytes32 id = _open(_job(pipeline));
        Acceptance[] memory list = _acceptances(id, COUNT);
        vm.warp(START + 101);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.TooLate.selector, START + 100));
        escrow.accept(id, list);
        vm.warp(START + 100);
        escrow.accept(id, list);
        _expectStatus(id, Status.Accepted);
    }

    function test_accept_revertsOnABadSignature() public {
        bytes32 id = _open(_job(pipeline));
        Acceptance[] memory list = _one(_acceptance(id, 1, _key(0))); // by another worker
        vm.expectRevert(abi.encodeWithSelector(IEscrow.BadSignature.selector, 1));
        escrow.accept(id, list);
        list = _one(_acceptance(id, 0, _key(1)));
        list[0].stage = 1; // by the right one, for another stage
        vm.expectRevert(abi.encodeWithSelector(IEscrow.BadSignature.selector, 1));
        escrow.accept(id, list);
        list = _one(_acceptance(bytes32(uint256(1)), 1, _key(1))); // for another job
        vm.expectRevert(abi.encodeWithSelector(IEscrow.BadSignature.selector, 1));
        escrow.accept(id, list);
        list[0].signature = "";
        vm.expectRevert(abi.encodeWithSelector(IEscrow.BadSignature.selector, 1));
        escrow.accept(id, list);
    }

    function test_accept_revertsOnAnUnknownStageOrTooLongAList() public {
        bytes32 id = _open(_job(pipeline));
        Acceptance[] memory list = _one(_acceptance(id, 3, _key(0)));
        vm.expectRevert(abi.encodeWithSelector(IEscrow.UnknownStage.selector, 3));
        escrow.accept(id, list);
        list = new Acceptance[](4);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.AlreadyDone.selector, 0));
        escrow.accept(id, list);
    }

    function test_accept_revertsWithoutEnoughStake() public {
        Job memory j = _job(pipeline);
        j.lock = uint128(STAKE + 1);
        bytes32 id = _open(j);
        Acceptance[] memory list = _acceptances(id, COUNT);
        vm.expectRevert(abi.encodeWithSelector(IWorkers.InsufficientStake.selector, _account(0), STAKE, STAKE + 1));
        escrow.accept(id, list);
    }

    function test_accept_locksEveryStageOnce() public {
        bytes32 id = _open(_job(pipeline));
        uint256 lock = _job(pipeline).lock;
        escrow.accept(id, _one(_acceptance(id, 1, _key(1))));
        escrow.accept(id, _one(_acceptance(id, 1, _key(1)))); // passed over
        assertEq(workers.lockedStake(_account(1)), lock, "locked once");
        assertTrue(escrow.lockHeld(id, 1) && !escrow.lockHeld(id, 0), "lockHeld");
        _expectStatus(id, Status.Open);
        Acceptance[] memory all = _acceptances(id, COUNT);
        vm.expectEmit();
        emit IEscrow.StageAccepted(id, 0, _account(0));
        escrow.accept(id, all);
        _expectStatus(id, Status.Accepted);
        for (uint256 i; i < COUNT; ++i) {
            assertEq(workers.lockedStake(_account(i)), lock, "locked");
        }
        escrow.accept(id, all); // a copy that comes late breaks nobody
        assertEq(workers.lockedStake(_account(0)), lock, "locked once");
    }

    // ---- commit ----

    function test_commit_revertsInTheWrongStatus() public {
        bytes32 id = _open(_job(pipeline));
        vm.expectRevert(abi.encodeWithSelector(IEscrow.WrongStatus.selector, id, Status.Accepted, Status.Open));
        escrow.commit(id, new Claim[](0));
    }

    function test_commit_keepsItsDeadline() public {
        bytes32 id = _accepted();
        Claim[] memory claims = _claims(id, COUNT, 20);
        vm.warp(START + 201);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.TooLate.selector, START + 200));
        escrow.commit(id, claims);
        vm.warp(START + 200);
        escrow.commit(id, claims);
        assertEq(escrow.windowEnd(id), START + 260, "window");
    }

    function test_commit_revertsOnABadClaim() public {
        bytes32 id = _accepted();
        bytes32 outputs = bytes32(uint256(5));
        _refuse(id, _claim(id, 0, 0, 0, 0, _key(0)), abi.encodeWithSelector(IEscrow.InvalidJob.selector, "root"));
        bytes memory refusal = abi.encodeWithSelector(IEscrow.OutputsFromWrongStage.selector, 1);
        _refuse(id, _claim(id, 1, _root(1), outputs, 0, _key(1)), refusal);
        _refuse(id, _claim(id, 1, _root(1), 0, 1, _key(1)), refusal);
        _refuse(
            id, _claim(id, 2, _root(2), 0, 20, _key(2)), abi.encodeWithSelector(IEscrow.InvalidJob.selector, "outputs")
        );
        refusal = abi.encodeWithSelector(IEscrow.TooManyTokens.selector, 51, 50);
        _refuse(id, _claim(id, 2, _root(2), outputs, 51, _key(2)), refusal);
        _refuse(id, _claim(id, 3, _root(3), 0, 0, _key(2)), abi.encodeWithSelector(IEscrow.UnknownStage.selector, 3));
        // Signed by another worker, or altered after it was signed.
        refusal = abi.encodeWithSelector(IEscrow.BadSignature.selector, 2);
        _refuse(id, _claim(id, 2, _root(2), outputs, 20, _key(1)), refusal);
        Claim memory claim = _claim(id, 2, _root(2), outputs, 20, _key(2));
        claim.tokens = 21;
        _refuse(id, claim, refusal);
        claim.tokens = 20;
        claim.root = _root(3);
        _refuse(id, claim, refusal);
        claim.root = _root(2);
        claim.outputs = _root(3);
        _refuse(id, claim, refusal);
        Claim[] memory tooMany = new Claim[](4);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.AlreadyDone.selector, 0));
        escrow.commit(id, tooMany);
    }

    function test_commit_isCompleteWithTheLastStage() public {
        bytes32 id = _accepted();
        escrow.commit(id, _one(_claim(id, 1, _root(1), 0, 0, _key(1))));
        // A second root of the same stage, though signed, is passed over.
        escrow.commit(id, _one(_claim(id, 1, _root(7), 0, 0, _key(1))));
        assertEq(escrow.root(id, 1), _root(1), "root");
        assertEq(escrow.root(id, 0), 0, "no root yet");
        _expectStatus(id, Status.Accepted);
        Claim[] memory claims = _claims(id, COUNT, 20);
        vm.expectEmit();
        emit IEscrow.StageCommitted(id, 0, _root(0));
        vm.expectEmit();
        emit IEscrow.StageCommitted(id, 2, _root(2));
        vm.expectEmit();
        emit IEscrow.JobCommitted(id, bytes32(uint256(0x2000)), 20, START + 60);
        escrow.commit(id, claims);
        _expectStatus(id, Status.Committed);
        (bytes32 outputs, uint64 tokens) = escrow.outputs(id);
        assertEq(outputs, bytes32(uint256(0x2000)), "outputs");
        assertEq(tokens, 20, "tokens");
        escrow.commit(id, claims); // a copy that comes late breaks nobody
    }

    function test_commit_usesTheSignerThatServedTheJob() public {
        bytes32 id = _accepted();
        Worker memory w = _worker(0);
        w.signer = vm.addr(0x999);
        vm.prank(_account(0));
        vm.expectRevert(abi.encodeWithSelector(IWorkers.InvalidWorker.selector, "signer changed while stake is locked"));
        workers.register(w);
        escrow.commit(id, _claims(id, COUNT, 20));
    }

    // ---- settle ----

    function test_settle_revertsBeforeTheWindowIsOver() public {
        bytes32 id = _accepted();
        vm.expectRevert(abi.encodeWithSelector(IEscrow.WrongStatus.selector, id, Status.Committed, Status.Accepted));
        escrow.settle(id);
        escrow.commit(id, _claims(id, COUNT, 20));
        vm.warp(START + 60);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.TooEarly.selector, START + 61));
        escrow.settle(id);
    }

    function test_settle_paysByShares() public {
        bytes32 id = _accepted();
        escrow.commit(id, _claims(id, COUNT, 20));
        vm.warp(START + 61);
        // 440 in shares of 3333, 3333, 3334: 146 each; 212 of 650 return.
        vm.expectEmit();
        emit IEscrow.JobPaid(id, 438, 212);
        escrow.settle(id);
        _expectStatus(id, Status.Paid);
        for (uint256 i; i < COUNT; ++i) {
            assertEq(escrow.credit(_account(i)), 146, "pay");
            assertEq(workers.lockedStake(_account(i)), 0, "locked");
            assertEq(workers.freeStake(_account(i)), STAKE, "free");
        }
        assertEq(escrow.credit(REQUESTER), 212, "returned");
        vm.expectRevert(abi.encodeWithSelector(IEscrow.WrongStatus.selector, id, Status.Committed, Status.Paid));
        escrow.settle(id);
    }

    function testFuzz_settle_sharesOutThePrice(uint128 promptPrice, uint128 tokenPrice, uint64 tokens) public {
        Job memory j = _job(pipeline);
        j.promptPrice = uint128(bound(promptPrice, 0, 1e24));
        j.tokenPrice = uint128(bound(tokenPrice, 0, 1e24));
        tokens = uint64(bound(tokens, 0, j.maxTokens));
        uint256 maximum = uint256(j.promptPrice) * 100 + uint256(j.tokenPrice) * 50;
        uint256 price = uint256(j.promptPrice) * 100 + uint256(j.tokenPrice) * tokens;
        j.lock = uint128(2 * (maximum + 4_000_000));
        bytes32 id = _open(j);
        escrow.accept(id, _acceptances(id, COUNT));
        escrow.commit(id, _claims(id, COUNT, tokens));
        vm.warp(START + 61);
        escrow.settle(id);
        uint256 paid;
        for (uint256 i; i < COUNT; ++i) {
            paid += escrow.credit(_account(i));
        }
        assertTrue(paid <= price && price - paid < COUNT, "paid within rounding");
        assertEq(paid + escrow.credit(REQUESTER), maximum, "shared out");
    }

    // ---- expire ----

    function test_expire_revertsBeforeItsDeadline() public {
        vm.expectRevert(abi.encodeWithSelector(IEscrow.WrongStatus.selector, bytes32(0), Status.Open, Status.None));
        escrow.expire(0);
        bytes32 id = _open(_job(pipeline));
        vm.warp(START + 100);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.TooEarly.selector, START + 101));
        escrow.expire(id);
        escrow.accept(id, _acceptances(id, COUNT));
        vm.warp(START + 200);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.TooEarly.selector, START + 201));
        escrow.expire(id);
        escrow.commit(id, _claims(id, COUNT, 20));
        vm.warp(START + 1000);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.WrongStatus.selector, id, Status.Open, Status.Committed));
        escrow.expire(id);
    }

    function test_expire_refundsWithoutFeeIfNotAllAccepted() public {
        bytes32 id = _open(_job(pipeline));
        escrow.accept(id, _one(_acceptance(id, 0, _key(0))));
        vm.warp(START + 101);
        vm.expectEmit();
        emit IEscrow.JobRefunded(id, MAXIMUM, 0);
        escrow.expire(id);
        assertEq(escrow.credit(REQUESTER), MAXIMUM, "refund");
        _expectStakes(0, 0, 0);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.WrongStatus.selector, id, Status.Open, Status.Refunded));
        escrow.expire(id);
    }

    // 1 % of 650 is 6.

    function test_expire_splitsTheFeeAcrossTheBrokenBoundary() public {
        bytes32 id = _accepted();
        escrow.commit(id, _one(_claim(id, 0, _root(0), 0, 0, _key(0))));
        escrow.commit(id, _one(_claim(id, 2, _root(2), bytes32(uint256(1)), 20, _key(2))));
        vm.warp(START + 201);
        vm.expectEmit();
        emit IEscrow.JobRefunded(id, MAXIMUM, 6);
        escrow.expire(id);
        _expectStakes(3, 3, 0);
        assertEq(escrow.credit(REQUESTER), MAXIMUM, "the fee is not the requester's: it may be a friend of who gave up");
        assertEq(token.balanceOf(escrow.BURN_ADDRESS()), 6, "burned");
        assertEq(token.balanceOf(address(escrow)), MAXIMUM, "balance");
    }

    function test_expire_chargesTheFirstStageAlone() public {
        bytes32 id = _accepted();
        escrow.commit(id, _one(_claim(id, 1, _root(1), 0, 0, _key(1))));
        vm.warp(START + 201);
        escrow.expire(id);
        _expectStakes(6, 0, 0);
    }

    function test_expire_chargesTheLastBoundary() public {
        bytes32 id = _accepted();
        escrow.commit(id, _one(_claim(id, 0, _root(0), 0, 0, _key(0))));
        escrow.commit(id, _one(_claim(id, 1, _root(1), 0, 0, _key(1))));
        vm.warp(START + 201);
        escrow.expire(id);
        _expectStakes(0, 3, 3);
    }

    // ---- withdraw ----

    function test_withdraw_revertsWithoutCredit() public {
        vm.expectRevert(abi.encodeWithSelector(IEscrow.NothingToWithdraw.selector));
        escrow.withdraw();
    }

    function test_withdraw_paysOnce() public {
        bytes32 id = _open(_job(pipeline));
        vm.warp(START + 101);
        escrow.expire(id);
        vm.startPrank(REQUESTER);
        escrow.withdraw();
        assertEq(token.balanceOf(REQUESTER), FUNDS, "balance");
        vm.expectRevert(abi.encodeWithSelector(IEscrow.NothingToWithdraw.selector));
        escrow.withdraw();
        vm.stopPrank();
    }

    function _accepted() private returns (bytes32 id) {
        id = _open(_job(pipeline));
        escrow.accept(id, _acceptances(id, COUNT));
    }

    function _refuse(Job memory j, string memory what) private {
        vm.prank(REQUESTER);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.InvalidJob.selector, what));
        escrow.open(j);
    }

    function _refuse(bytes32 id, Claim memory claim, bytes memory refusal) private {
        Claim[] memory list = _one(claim);
        vm.expectRevert(refusal);
        escrow.commit(id, list);
    }

    function _expectStatus(bytes32 id, Status expected) private view {
        assertEq(uint256(escrow.status(id)), uint256(expected), "status");
    }

    function _expectStakes(uint256 lost0, uint256 lost1, uint256 lost2) private view {
        uint256[3] memory lost = [lost0, lost1, lost2];
        for (uint256 i; i < COUNT; ++i) {
            assertEq(workers.lockedStake(_account(i)), 0, "locked");
            assertEq(workers.freeStake(_account(i)), STAKE - lost[i], "free");
        }
    }
}
