// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Claim, Consent, IEscrow, Job, Status} from "../../contracts/src/interfaces/IEscrow.sol";
import {IWorkers, Stage} from "../../contracts/src/interfaces/IWorkers.sol";
import {Market} from "./Market.t.sol";

/// @title A job goes on with another pipeline
contract EscrowMoveTest is Market {
    uint256 private constant COUNT = 3;
    uint256 private constant SPARE = 7; // worker 7 stands in at stage 1
    uint8 private constant PLACE = 1;

    bytes32 private line;
    bytes32 private relief;
    bytes32 private id;
    uint64 private until;

    function setUp() public {
        _deploy(address(this));
        line = _pipeline(COUNT);
        _hire(SPARE);
        relief = _relief(SPARE, 1);
        id = _open(_job(line));
        escrow.accept(id, _acceptances(id, COUNT));
        until = START + 50;
    }

    function test_move_theSpareIsLockedPaidAndCommitsInTheOthersPlace() public {
        _move();

        assertEq(escrow.job(id).pipeline, relief, "pipeline of the job");
        assertEq(escrow.brief(id, PLACE).pipeline, relief, "pipeline in a game's brief");
        assertEq(workers.lockedStake(_account(PLACE)), 0, "lock of the one who left");
        assertEq(workers.freeStake(_account(PLACE)), STAKE, "stake of the one who left");
        assertEq(workers.lockedStake(_account(SPARE)), _job(line).lock, "lock of the spare");
        assertEq(workers.lockedStake(_account(0)), _job(line).lock, "lock of one who stayed");

        Claim[] memory claims = _claims(id, COUNT, 40);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.BadSignature.selector, PLACE));
        escrow.commit(id, claims); // the old worker's
        claims[PLACE] = _claim(id, PLACE, _root(PLACE), 0, 0, _key(SPARE));
        escrow.commit(id, claims);
        vm.warp(block.timestamp + 61);
        escrow.settle(id);
        assertEq(escrow.credit(_account(PLACE)), 0, "pay of the one who left");
        assertEq(escrow.credit(_account(SPARE)), uint256(580) * 3333 / 10_000, "pay of the spare");
        assertEq(workers.lockedStake(_account(SPARE)), 0, "lock of the spare at the end");
        assertEq(token.balanceOf(address(workers)), STAKE * (COUNT + 1), "all stake");
    }

    function test_move_aConvictionTakesTheLockOfTheSpare() public {
        _move();
        Claim[] memory claims = _claims(id, COUNT, 40);
        claims[PLACE] = _claim(id, PLACE, _root(PLACE), 0, 0, _key(SPARE));
        escrow.commit(id, claims);
        escrow.gameOpened(id, PLACE);
        escrow.gameClosed(id, PLACE, PLACE, address(0xC0DE), START, 1000);
        vm.warp(block.timestamp + 61);
        escrow.release(id);
        assertEq(workers.freeStake(_account(PLACE)), STAKE, "stake of the one who left");
        assertEq(workers.freeStake(_account(SPARE)), STAKE - _job(line).lock, "stake of the spare");
    }

    function test_move_anAbsentSpareIsWhoPaysTheNoShowFee() public {
        _move();
        escrow.commit(id, _one(_claim(id, 0, _root(0), 0, 0, _key(0))));
        vm.warp(START + 201);
        escrow.expire(id);
        assertEq(workers.freeStake(_account(PLACE)), STAKE, "stake of the one who left");
        assertEq(workers.freeStake(_account(SPARE)), STAKE - 3, "half of the fee");
    }

    /// @dev A receiver that has sealed and committed would lose the signature that it was handed with the sender who leaves.
    function test_move_revertsOnceAnybodyHasCommitted() public {
        escrow.commit(id, _one(_claim(id, PLACE + 1, _root(PLACE + 1), bytes32(uint256(0x2000)), 40, _key(PLACE + 1))));
        vm.expectRevert(abi.encodeWithSelector(IEscrow.AlreadyCommitted.selector, id));
        escrow.move(id, relief, _consents(relief));
        assertEq(escrow.job(id).pipeline, line, "pipeline of the job");
    }

    function test_move_aClaimMadeInTheOldPipelineIsWorthNothing() public {
        Claim memory claim = _claim(id, 0, _root(0), 0, 0, _key(0));
        _move();
        vm.expectRevert(abi.encodeWithSelector(IEscrow.BadSignature.selector, 0));
        escrow.commit(id, _one(claim));
    }

    function test_move_consentToStayIsNoneToComeBack() public {
        _hire(SPARE + 1);
        bytes32 other = _relief(SPARE + 1, 2);
        Consent[] memory consents = _consents(other); // from the first pipeline
        consents[COUNT] = _consent(other, until, SPARE + 1);
        _move();
        vm.expectRevert(abi.encodeWithSelector(IEscrow.BadSignature.selector, 0));
        escrow.move(id, other, consents);
    }

    function test_move_needsEverybodysConsent() public {
        for (uint256 missing; missing <= COUNT; ++missing) {
            Consent[] memory consents = _consents(relief);
            uint8 stage = missing == COUNT ? PLACE : uint8(missing);
            consents[missing] = _consent(relief, until, 99); // a stranger's
            vm.expectRevert(abi.encodeWithSelector(IEscrow.BadSignature.selector, stage));
            escrow.move(id, relief, consents);
        }
        Consent[] memory fewer = new Consent[](COUNT);
        for (uint256 i; i < COUNT; ++i) {
            fewer[i] = _consents(relief)[i];
        }
        vm.expectRevert(abi.encodeWithSelector(IEscrow.BadSignature.selector, PLACE));
        escrow.move(id, relief, fewer);
    }

    function test_move_consentIsToOnePipelineAndOneJobUntilThen() public {
        _hire(SPARE + 1);
        bytes32 other = _relief(SPARE + 1, 2);
        Consent[] memory consents = _consents(relief);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.BadSignature.selector, 0));
        escrow.move(id, other, consents);

        Job memory second = _job(line);
        second.nonce = 2;
        bytes32 twin = _open(second);
        escrow.accept(twin, _acceptances(twin, COUNT));
        vm.expectRevert(abi.encodeWithSelector(IEscrow.BadSignature.selector, 0));
        escrow.move(twin, relief, consents);

        vm.warp(until + 1);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.TooLate.selector, until));
        escrow.move(id, relief, consents);
    }

    function test_move_revertsOutsideItsTime() public {
        Job memory second = _job(line);
        second.nonce = 2;
        bytes32 twin = _open(second);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.WrongStatus.selector, twin, Status.Accepted, Status.Open));
        escrow.move(twin, relief, _consents(relief));

        until = START + 1000;
        Consent[] memory consents = _consents(relief);
        vm.warp(START + 201);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.TooLate.selector, START + 200));
        escrow.move(id, relief, consents);
        vm.warp(START + 50);
        escrow.commit(id, _claims(id, COUNT, 40));
        vm.expectRevert(abi.encodeWithSelector(IEscrow.WrongStatus.selector, id, Status.Accepted, Status.Committed));
        escrow.move(id, relief, consents);
    }

    function test_move_revertsForAPipelineThatDoesNotFit() public {
        vm.expectRevert(abi.encodeWithSelector(IEscrow.InvalidJob.selector, "pipeline"));
        escrow.move(id, bytes32(uint256(1)), _consents(bytes32(uint256(1))));
        Stage[] memory two = _stages(2);
        bytes32 shorter = workers.createPipeline(modelId, two, 5, _joins(two, 5));
        vm.expectRevert(abi.encodeWithSelector(IEscrow.InvalidJob.selector, "stages"));
        escrow.move(id, shorter, _consents(shorter));
    }

    function test_move_aSpareWithoutStakeIsRefused() public {
        vm.prank(_account(SPARE));
        workers.requestWithdrawal(STAKE);
        vm.expectRevert(
            abi.encodeWithSelector(IWorkers.InsufficientStake.selector, _account(SPARE), 0, _job(line).lock)
        );
        escrow.move(id, relief, _consents(relief));
    }

    function test_move_aRepeatedCallChangesNothing() public {
        escrow.move(id, relief, _consents(relief));
        escrow.move(id, relief, new Consent[](0));
        assertEq(workers.lockedStake(_account(SPARE)), _job(line).lock, "locked once");
    }

    function test_move_ofTheLongestPipelineFitsATransaction() public {
        for (uint256 i = COUNT; i < 64; ++i) {
            if (i != SPARE) _hire(i);
        }
        Stage[] memory stages = _stages(64);
        bytes32 long = workers.createPipeline(modelId, stages, 3, _joins(stages, 3));
        stages[PLACE].worker = _account(70);
        _hire(70);
        bytes[] memory joins = _joins(stages, 4);
        joins[PLACE] = _join(stages, 4, 70);
        bytes32 other = workers.createPipeline(modelId, stages, 4, joins);
        Job memory job = _job(long);
        job.nonce = 2;
        id = _open(job);
        escrow.accept(id, _acceptances(id, 64));
        Consent[] memory consents = new Consent[](65);
        for (uint256 i; i < 64; ++i) {
            consents[i] = _consent(other, until, i);
        }
        consents[64] = _consent(other, until, 70);
        uint256 before = gasleft();
        escrow.move(id, other, consents);
        assertTrue(before - gasleft() < 1 << 24, "gas of a move");
        assertEq(workers.lockedStake(_account(70)), job.lock, "locked");
    }

    /// @dev The first COUNT workers, another at stage 1.
    function _relief(uint256 spare, uint64 nonce) private returns (bytes32) {
        Stage[] memory stages = _stages(COUNT);
        stages[PLACE].worker = _account(spare);
        bytes[] memory joins = _joins(stages, nonce);
        joins[PLACE] = _join(stages, nonce, spare);
        return workers.createPipeline(modelId, stages, nonce, joins);
    }

    function _join(Stage[] memory stages, uint64 nonce, uint256 who) private view returns (bytes memory) {
        bytes32 structHash = keccak256(abi.encode(keccak256("Join(bytes32 pipeline)"), _pipelineId(stages, nonce)));
        return _sign(address(workers), _key(who), structHash);
    }

    function _move() private {
        escrow.move(id, relief, _consents(relief));
        pipelineOf[id] = relief;
    }

    function _consents(bytes32 pipeline) private view returns (Consent[] memory consents) {
        consents = new Consent[](COUNT + 1);
        for (uint256 i; i < COUNT; ++i) {
            consents[i] = _consent(pipeline, until, i);
        }
        consents[COUNT] = _consent(pipeline, until, SPARE);
    }

    function _consent(bytes32 pipeline, uint64 end, uint256 who) private view returns (Consent memory) {
        bytes32 typehash = keccak256("Move(bytes32 job,bytes32 from,bytes32 pipeline,uint64 until)");
        bytes32 structHash = keccak256(abi.encode(typehash, id, pipelineOf[id], pipeline, end));
        return Consent(end, _sign(address(escrow), _key(who), structHash));
    }
}
