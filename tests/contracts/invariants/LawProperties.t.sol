// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Games} from "../../../contracts/src/game/Games.sol";
import {HandoffProof, IDisputes, Segment} from "../../../contracts/src/interfaces/IDisputes.sol";
import {Acceptance, Claim, IEscrow, Job} from "../../../contracts/src/interfaces/IEscrow.sol";
import {Opening} from "../../../contracts/src/interfaces/IReferee.sol";
import {IWorkers, Stage} from "../../../contracts/src/interfaces/IWorkers.sol";
import {Tree} from "../../../contracts/src/referee/Tree.sol";
import {Batch, Batches, Lie} from "../village/Batches.sol";
import {Case, Cases} from "../village/Cases.sol";
import {Plan} from "../village/Plan.sol";
import {Scene, Table} from "../village/Scene.sol";

/// @title What the laws promise of single calls (docs/laws.md)
contract LawProperties is Scene {
    /// @dev What a signature says, and by whom.
    struct Said {
        uint256 chain;
        address contract_;
        bytes32 job;
        uint8 stage;
        bytes32 model;
        uint256 key;
        bytes32 pipeline;
    }

    uint256 private constant FIELDS = 6; // the pipeline besides, in a commitment

    // ---- law 1

    /// @dev Nobody can put other code in a contract's place or destroy it: no DELEGATECALL, CALLCODE or SELFDESTRUCT in any of them.
    function test_law1_noContractCanBeUpgradedOrDestroyed() external view {
        address[8] memory all = [
            address(models),
            address(workers),
            address(escrow),
            address(disputes),
            address(disputes.evidence()),
            address(demands),
            address(referee),
            address(referee.sampler())
        ];
        for (uint256 k = 0; k < all.length; ++k) {
            bytes memory code = all[k].code;
            assertTrue(code.length > 0, "code");
            bool runs = true;
            for (uint256 i = 0; i < code.length; ++i) {
                uint8 op = uint8(code[i]);
                // Constants lie behind the code. What follows STOP, JUMP, RETURN, REVERT or INVALID never runs, up to the next JUMPDEST.
                if (op == 0x5b) runs = true;
                assertTrue(!runs || (op != 0xf4 && op != 0xf2 && op != 0xff), "delegates, or destroys itself");
                if (op == 0x00 || op == 0x56 || op == 0xf3 || op == 0xfd || op == 0xfe) runs = false;
                if (op >= 0x60 && op <= 0x7f) i += op - 0x5f; // what PUSH pushes
            }
        }
    }

    /// @dev Whoever deployed the contracts has no more rights in them than anybody else.
    function test_law1_theDeployerIsAStranger() external {
        Batch memory b = Batches.build(Lie.NONE);
        bytes32 job = _serve(b);
        bytes[8] memory calls = [
            abi.encodeCall(escrow.settle, (job)),
            abi.encodeCall(escrow.expire, (job)),
            abi.encodeCall(escrow.release, (job)),
            abi.encodeCall(escrow.gameOpened, (job, 0)),
            abi.encodeCall(escrow.gameClosed, (job, 0, 0, address(this), 0, 0)),
            abi.encodeCall(escrow.demandOpened, (job, 0)),
            abi.encodeCall(escrow.demandClosed, (job, 0, true, address(this), 0, 0)),
            abi.encodeCall(escrow.withdraw, ())
        ];
        for (uint256 i = 0; i < calls.length; ++i) {
            (bool done,) = address(escrow).call(calls[i]);
            assertTrue(!done, "Escrow obeyed");
        }
        bytes[4] memory more = [
            abi.encodeCall(workers.lock, (_account(0), 1)),
            abi.encodeCall(workers.unlock, (_account(0), 1)),
            abi.encodeCall(workers.slash, (_account(0), 1)),
            abi.encodeCall(workers.withdraw, ())
        ];
        for (uint256 i = 0; i < more.length; ++i) {
            (bool done,) = address(workers).call(more[i]);
            assertTrue(!done, "Workers obeyed");
        }
    }

    // ---- law 6

    /// @dev Either side falls silent at any move of a whole game: the other wins by the flag, which anybody calls.
    function test_law6_whoeverFallsSilentAtAnyMoveLoses() external {
        Batch memory b = Batches.build(Lie.MLP_FIRST);
        Segment memory s = _fault(_serve(b), b, 0);
        Case memory watch = Cases.truth(b, s);
        Case memory worker = _lying(b, s, 1, 0, false);
        for (uint256 moves = 0; moves < 3; ++moves) {
            Table memory t = _challenged(WATCH, b, s, watch);
            for (uint256 i = 0; i < moves; ++i) {
                assertTrue(_moves(t, t.seen.game.workerTurn ? worker : watch), "moved");
            }
            bool workerSilent = t.seen.game.workerTurn;
            _runsOut(t);
            assertEq(t.seen.convicted, workerSilent ? 0 : NOBODY, "who was silent loses");
            vm.warp(START);
        }
    }

    // ---- law 8

    function _said(bytes32 job, uint8 stage) private view returns (Said memory) {
        return Said(block.chainid, address(escrow), job, stage, modelId, _key(stage), pipelineOf[job]);
    }

    /// @dev The same said of another chain, contract, job, stage or model, or by another worker.
    function _replayed(Said memory said, uint256 field) private view returns (Said memory other) {
        other = Said(said.chain, said.contract_, said.job, said.stage, said.model, said.key, said.pipeline);
        if (field == 0) other.chain += 1;
        if (field == 1) other.contract_ = address(workers);
        if (field == 2) other.job = keccak256("another job");
        if (field == 3) other.stage ^= 1;
        if (field == 4) other.model = keccak256("another model");
        if (field == 5) other.key = _key(other.stage ^ 1);
        if (field == 6) other.pipeline = keccak256("another pipeline");
    }

    function _sign(Said memory said, bytes32 content) private pure returns (bytes memory) {
        bytes32 domain = keccak256(
            abi.encode(
                keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"),
                keccak256("Plumb"),
                keccak256("1"),
                said.chain,
                said.contract_
            )
        );
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(said.key, keccak256(abi.encodePacked(hex"1901", domain, content)));
        return abi.encodePacked(r, s, v);
    }

    function _accept(Said memory said) private pure returns (bytes memory) {
        bytes32 typehash = keccak256("Accept(bytes32 job,uint8 stage,bytes32 model)");
        return _sign(said, keccak256(abi.encode(typehash, said.job, said.stage, said.model)));
    }

    function _commit(Said memory said, bytes32 root) private pure returns (bytes memory) {
        bytes32 typehash = keccak256(
            "Commit(bytes32 job,bytes32 pipeline,uint8 stage,bytes32 model,bytes32 root,bytes32 outputs,uint64 tokens)"
        );
        bytes32 none = 0;
        bytes memory content =
            abi.encode(typehash, said.job, said.pipeline, said.stage, said.model, root, none, uint64(0));
        return _sign(said, keccak256(content));
    }

    function test_law8_anAcceptanceBindsChainContractJobStageModelAndWorker() external {
        bytes32 job = _open(_order(block.timestamp));
        for (uint256 field = 0; field < FIELDS; ++field) {
            Acceptance[] memory list = _one(Acceptance(0, _accept(_replayed(_said(job, 0), field))));
            vm.expectRevert(abi.encodeWithSelector(IEscrow.BadSignature.selector, 0));
            escrow.accept(job, list);
        }
        escrow.accept(job, _one(Acceptance(0, _accept(_said(job, 0)))));
        assertTrue(escrow.lockHeld(job, 0), "the right one");
    }

    function test_law8_aCommitmentBindsChainContractJobPipelineStageModelAndWorker() external {
        bytes32 job = _open(_order(block.timestamp));
        escrow.accept(job, _acceptances(job, STAGES));
        bytes32 root = keccak256("root");
        for (uint256 field = 0; field <= FIELDS; ++field) {
            Claim[] memory list = _one(Claim(0, root, 0, 0, _commit(_replayed(_said(job, 0), field), root)));
            vm.expectRevert(abi.encodeWithSelector(IEscrow.BadSignature.selector, 0));
            escrow.commit(job, list);
        }
        Claim[] memory changed = _one(Claim(0, keccak256("another root"), 0, 0, _commit(_said(job, 0), root)));
        vm.expectRevert(abi.encodeWithSelector(IEscrow.BadSignature.selector, 0));
        escrow.commit(job, changed);
        escrow.commit(job, _one(Claim(0, root, 0, 0, _commit(_said(job, 0), root))));
        assertEq(escrow.root(job, 0), root, "the right one");
    }

    function test_law8_aHandoffBindsChainContractJobStageAndWorker() external {
        Batch memory b = Batches.build(Lie.LINK_SENDER);
        bytes32 job = _serve(b);
        Table memory t = _started(WATCH, b, _fault(job, b, 0), "");
        bytes32 root = Tree.leaf(b.handoff);
        for (uint256 field = 0; field <= FIELDS; ++field) {
            if (field == 4) continue; // the job implies the model
            bool right = field == FIELDS;
            Said memory said = right ? _said(job, 0) : _replayed(_said(job, 0), field);
            bytes32 typehash = keccak256("Handoff(bytes32 job,uint8 stage,bytes32 root,uint32 leaves)");
            bytes32 content = keccak256(abi.encode(typehash, said.job, said.stage, root, uint32(1)));
            HandoffProof memory proof = HandoffProof(root, 1, 0, b.handoff, new bytes32[](0), _sign(said, content));
            bytes memory call = abi.encodeCall(IDisputes.deflect, (t.id, Games.pack(t.seen.game), proof));
            if (right) _do(t, _account(1), call);
            else _refused(_account(1), call, IDisputes.BadHandoff.selector);
        }
        assertEq(t.seen.convicted, 0, "the right one");
    }

    function test_law8_aJoinBindsChainContractPipelineAndWorker() external {
        Stage[] memory stages = _stages(STAGES);
        bytes32 pipeline = _pipelineId(stages, 77);
        bytes32 typehash = keccak256("Join(bytes32 pipeline)");
        for (uint256 field = 0; field <= 3; ++field) {
            Said memory said = Said(block.chainid, address(workers), 0, 0, 0, _key(0), 0);
            if (field == 0) said.chain += 1;
            if (field == 1) said.contract_ = address(escrow);
            if (field == 2) said.key = _key(1);
            bytes32 named = field == 3 ? _pipelineId(stages, 78) : pipeline;
            bytes[] memory joins = _joins(stages, 77);
            joins[0] = _sign(said, keccak256(abi.encode(typehash, named)));
            vm.expectRevert(abi.encodeWithSelector(IWorkers.BadSignature.selector, 0));
            workers.createPipeline(modelId, stages, 77, joins);
        }
        bytes[] memory right = _joins(stages, 77);
        assertEq(workers.createPipeline(modelId, stages, 77, right), pipeline, "the right one");
    }

    /// @dev The names of jobs, pipelines and games hold all that they stand for: a copy under another name is another thing.
    function test_law8_namesHoldWhatTheyStandFor() external {
        bytes32 job = _open(_order(block.timestamp));
        nonces -= 1;
        token.mint(STRANGER, FUNDS);
        vm.prank(STRANGER);
        token.approve(address(escrow), FUNDS);
        Job memory order = _order(block.timestamp);
        vm.prank(STRANGER);
        bytes32 copied = escrow.open(order);
        assertTrue(copied != job, "the requester is part of a job's name");
        Segment memory s = Segment(job, 0, Plan.MLP, 0, 0, 0, 0);
        bytes32 id = _gameId(WATCH, s, 0);
        assertTrue(id != _gameId(COPIER, s, 0), "the challenger is part of a game's");
        s.position = 1;
        assertTrue(id != _gameId(WATCH, s, 0), "and so is the segment");
    }

    // ---- law 9

    /// @dev No party is ever called: every account of a party reverts when it is, and everything ends as it must.
    function test_law9_noPartyIsEverCalled() external {
        address[5] memory parties = [REQUESTER, _account(0), _account(1), WATCH, LIAR];
        Batch memory b = Batches.build(Lie.LINK_SENDER);
        Batch memory right = Batches.build(Lie.NONE);
        bytes32[2] memory served = [_serve(b), _serve(right)];
        for (uint256 i = 0; i < parties.length; ++i) {
            vm.etch(parties[i], hex"fe");
        }
        Table memory t = _started(WATCH, b, _fault(served[0], b, 0), "");
        _do(t, _account(1), _deflectionCall(t.id, t.seen.game, b));
        Segment memory s = Segment(served[1], 0, Plan.MLP, 0, 0, 0, 0);
        Case memory truth = Cases.truth(right, s);
        Case memory claim = _lying(right, s, 1, 0, true);
        assertEq(_playOut(_challenged(LIAR, right, s, claim), truth, claim), NOBODY, "a whole game");
        vm.warp(escrow.windowEnd(served[1]) + 1);
        escrow.release(served[0]);
        escrow.settle(served[1]);
        for (uint256 i = 0; i < 4; ++i) {
            if (escrow.credit(parties[i]) == 0) continue;
            vm.prank(parties[i]);
            escrow.withdraw();
        }
        assertEq(escrow.credit(REQUESTER) + escrow.credit(_account(1)) + escrow.credit(WATCH), 0, "paid out");
    }

    /// @dev What is too long, cut off or no call at all costs little more than its own calldata.
    function testFuzz_law9_malformedCalldataIsRefusedCheaply(uint256 seed) external {
        Segment memory s = Segment(keccak256("no such job"), 0, Plan.MLP, 0, 0, 0, 0);
        bytes memory sent = abi.encodeCall(
            IDisputes.challenge, (s, 0, model, new Opening[](0), new bytes(seed % 3 == 0 ? 60_000 : 160))
        );
        if (seed % 3 == 1) {
            uint256 length = 4 + (seed >> 8) % (sent.length - 4);
            assembly ("memory-safe") {
                mstore(sent, length)
            }
        } else if (seed % 3 == 2) {
            // A word of the head names another place.
            uint256 word = (seed >> 8) % 24;
            assembly ("memory-safe") {
                mstore(add(add(sent, 36), mul(word, 32)), shr(16, seed))
            }
        }
        uint256 gas = gasleft();
        vm.prank(WATCH);
        (bool done,) = address(disputes).call(sent);
        gas -= gasleft();
        assertTrue(!done, "refused");
        assertTrue(gas < 100_000, "cheaply");
    }

    /// @dev Neither can an inner node pass for a leaf, nor a leaf for a node.
    function testFuzz_law9_leavesAndNodesAreOfDifferentDomains(bytes32 left, bytes32 right, bytes memory data)
        external
        pure
    {
        assertTrue(Tree.leaf(abi.encodePacked(left, right)) != Tree.node(left, right), "two hashes as a leaf");
        assertTrue(Tree.leaf(data) != Tree.node(left, right), "anything");
    }
}
