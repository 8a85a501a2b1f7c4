// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";

import {Disputes} from "../../contracts/src/Disputes.sol";
import {Token} from "../../contracts/src/dev/Token.sol";
import {Evidence} from "../../contracts/src/game/Evidence.sol";
import {Rows} from "../../contracts/src/game/Rows.sol";
import {Descent} from "../../contracts/src/game/Descent.sol";
import {Games} from "../../contracts/src/game/Games.sol";
import {Game, HandoffProof, IDisputes, Move, Phase, Proof, Segment} from "../../contracts/src/interfaces/IDisputes.sol";
import {IEscrow, Job} from "../../contracts/src/interfaces/IEscrow.sol";
import {IReferee, Model, Opening} from "../../contracts/src/interfaces/IReferee.sol";
import {IWorkers, Stage} from "../../contracts/src/interfaces/IWorkers.sol";
import {Codec} from "../../contracts/src/referee/Codec.sol";
import {Tree} from "../../contracts/src/referee/Tree.sol";
import {Base} from "./Base.t.sol";
import {Forest} from "./village/Forest.sol";
import {EscrowMock, RefereeMock, WorkersMock} from "./mocks/Chambers.sol";

struct Log {
    bytes32[] topics;
    bytes data;
    address emitter;
}

interface Logs {
    function getRecordedLogs() external returns (Log[] memory);
}

/// @title One small program and both its players
/// @dev Kind Q has three instructions: a sum of 33 chunks with 100 elements (two leaves), 64 elements at once, the verdict.
abstract contract DisputesTable is Base {
    address internal constant CHALLENGER = address(0xC4A1);
    address internal constant WORKER = address(0x3013);
    address internal constant STRANGER = address(0x57A6);
    uint256 internal constant SIGNER_KEY = 0x5163;
    bytes32 internal constant JOB = keccak256("job");
    uint32 internal constant CLOCK = 1000;
    uint32 internal constant GRACE = 100;
    uint128 internal constant GAS_RATE = 3;
    uint256 internal constant BOND = 6_000_000;
    uint256 internal constant MOVE_GAS = 350_000;
    uint64 internal constant START = 1_800_000_000;

    Disputes internal disputes;
    Token internal token;
    EscrowMock internal escrow;
    WorkersMock internal workers;
    RefereeMock internal referee;
    Model internal model;
    bytes32[] internal program; // leaf hashes
    bytes[3] internal records;
    bytes internal node;
    uint256 internal salts;

    function setUp() public virtual {
        vm.warp(START);
        token = new Token();
        escrow = new EscrowMock();
        workers = new WorkersMock();
        referee = new RefereeMock();
        disputes = new Disputes(
            IERC20(token), IEscrow(address(escrow)), IWorkers(address(workers)), IReferee(address(referee))
        );
        token.mint(CHALLENGER, 1e30);
        vm.prank(CHALLENGER);
        token.approve(address(disputes), type(uint256).max);

        records[0] = _record(5, 1, 100, 33 * 256, 0);
        records[1] = _record(4, 1, 64, 0, 0);
        records[2] = _record(14, 1, 1, 0, 0);
        for (uint256 kind = 0; kind < 8; ++kind) {
            program.push(Tree.leaf(abi.encodePacked(uint32(8), uint32(3), uint32(4), uint32(0))));
        }
        for (uint256 i = 0; i < 3; ++i) {
            program.push(Tree.leaf(records[i]));
        }
        model.programRoot = _root(program);
        model.programLeaves = uint32(program.length);
        model.layers = 4;
        model.vocabulary = 100;
        node = abi.encodePacked(uint32(0), uint32(10), keccak256("tensors"));
        workers.add(Stage(WORKER, 0, 2, 5000), vm.addr(SIGNER_KEY));
        workers.add(Stage(address(0xBEEF), 2, 4, 5000), vm.addr(SIGNER_KEY + 1));
        escrow.setRoot(0, Tree.leaf(node));
        escrow.setJob(_job());
    }

    function _job() internal view returns (Job memory job) {
        job.model = keccak256(abi.encode(model));
        job.requests = 1;
        job.gasRate = GAS_RATE;
        job.clock = CLOCK;
        job.grace = GRACE;
    }

    function _record(uint8 op, uint32 rows, uint32 cols, uint32 terms, uint8 stepOperand)
        internal
        pure
        returns (bytes memory)
    {
        bytes32 x = bytes32(abi.encodePacked(stepOperand > 0 ? uint8(1) : uint8(0), stepOperand));
        return abi.encodePacked(
            op, uint8(0), rows, cols, uint32(0), terms, uint64(0), uint32(0), uint16(0), x, bytes32(0), bytes32(0)
        );
    }

    // ---- trees

    function _root(bytes32[] memory leaves) internal pure returns (bytes32) {
        bytes32[] memory copy = new bytes32[](leaves.length);
        for (uint256 i = 0; i < copy.length; ++i) {
            copy[i] = leaves[i];
        }
        return Tree.fold(copy);
    }

    function _read(bytes memory record) internal pure returns (bytes32[] memory) {
        return Forest.readRoots(Codec.instruction(record), _steps());
    }

    function _prove(bytes32[] memory leaves, uint256 index) internal pure returns (bytes32[] memory siblings) {
        bytes32[] memory level = leaves;
        bytes32[] memory found = new bytes32[](32);
        uint256 count;
        while (level.length > 1) {
            uint256 other = index ^ 1;
            if (other < level.length) found[count++] = level[other];
            bytes32[] memory above = new bytes32[]((level.length + 1) / 2);
            for (uint256 i = 0; i < above.length; ++i) {
                above[i] = 2 * i + 1 < level.length ? Tree.node(level[2 * i], level[2 * i + 1]) : level[2 * i];
            }
            level = above;
            index >>= 1;
        }
        siblings = new bytes32[](count);
        for (uint256 i = 0; i < count; ++i) {
            siblings[i] = found[i];
        }
    }

    // ---- the challenger's openings

    function _segment() internal pure returns (Segment memory) {
        return Segment(JOB, 0, 1, 0, 1, 5, 2);
    }

    function _evidence() internal view returns (Opening[] memory evidence) {
        evidence = new Opening[](2);
        evidence[0] = Opening(node, new bytes32[](0));
        evidence[1] = Opening(abi.encodePacked(uint32(8), uint32(3), uint32(4), uint32(0)), _prove(program, 1));
    }

    /// @dev Roots of: 100 zeros, 64 zeros, the verdict wrong.
    function _steps() internal pure returns (bytes memory) {
        return abi.encodePacked(_fold(_zeroNodes()), Tree.leaf(new bytes(512)), Tree.leaf(abi.encodePacked(uint64(2))));
    }

    function _zeroNodes() internal pure returns (bytes memory) {
        return abi.encodePacked(Tree.leaf(new bytes(512)), Tree.leaf(new bytes(288)));
    }

    function _fold(bytes memory list) internal pure returns (bytes32) {
        return Tree.fold(abi.decode(abi.encodePacked(uint256(32), list.length / 32, list), (bytes32[])));
    }

    function _commit(Segment memory segment) internal returns (bytes32 salt, bytes32 id) {
        salt = bytes32(++salts);
        id = keccak256(abi.encode(CHALLENGER, segment, salt));
        vm.prank(CHALLENGER);
        disputes.commit(id);
        vm.roll(block.number + 1);
    }

    function _open() internal returns (bytes32 id, Game memory game) {
        return _openWith(_steps());
    }

    function _openWith(bytes memory steps) internal returns (bytes32 id, Game memory game) {
        bytes32 salt;
        (salt, id) = _commit(_segment());
        vm.recordLogs();
        _challenge(CHALLENGER, _segment(), salt, model, _evidence(), steps);
        (game,) = _last();
        assertEq(disputes.stateOf(id), keccak256(Games.pack(game)), "state");
    }

    /// @dev State and list of the last GameMoved.
    function _last() internal returns (Game memory game, bytes memory list) {
        Log[] memory logs = Logs(address(vm)).getRecordedLogs();
        for (uint256 i = logs.length; i > 0; --i) {
            if (logs[i - 1].topics[0] == IDisputes.GameMoved.selector) {
                bytes memory state;
                (state, list) = abi.decode(logs[i - 1].data, (bytes, bytes));
                return (this.read(state), list);
            }
        }
        revert Untrue("a move was made");
    }

    function read(bytes calldata state) external pure returns (Game memory) {
        return Games.read(state);
    }

    function _descend(address mover, bytes32 id, Game memory game, Move memory move)
        internal
        returns (Game memory next)
    {
        vm.recordLogs();
        vm.prank(mover);
        disputes.descend(id, Games.pack(game), move);
        (next,) = _last();
        assertEq(disputes.stateOf(id), keccak256(Games.pack(next)), "state");
    }

    function _pickStep(uint64 pick, bytes memory list) internal view returns (Move memory) {
        return Move(records[pick], _prove(program, 8 + pick), pick, _steps(), list);
    }

    /// @dev The worker's nodes for instruction 0: its second leaf differs.
    function _workerNodes() internal pure returns (bytes memory) {
        return abi.encodePacked(Tree.leaf(new bytes(512)), keccak256("another leaf"));
    }

    function _refuse(bytes memory expected, address mover, bytes32 id, Game memory game, Move memory move) internal {
        vm.expectRevert(expected);
        vm.prank(mover);
        disputes.descend(id, Games.pack(game), move);
    }

    /// @dev As the parameters are already in memory, the call is the next one that the cheat codes see (sha256 is a call too).
    function _challenge(
        address sender,
        Segment memory segment,
        bytes32 salt,
        Model memory model_,
        Opening[] memory evidence,
        bytes memory steps
    ) internal {
        vm.prank(sender);
        disputes.challenge(segment, salt, model_, evidence, steps);
    }

    function _refuseChallenge(bytes memory expected, address sender, bytes32 salt, Model memory model_) internal {
        Opening[] memory evidence = _evidence();
        bytes memory steps = _steps();
        if (expected.length > 0) vm.expectRevert(expected);
        else vm.expectRevert();
        vm.prank(sender);
        disputes.challenge(_segment(), salt, model_, evidence, steps);
    }

    function _prove(address sender, bytes32 id, Game memory game, Proof memory proof) internal {
        vm.prank(sender);
        disputes.prove(id, Games.pack(game), proof);
    }

    function _refuseProof(bytes memory expected, address sender, bytes32 id, Game memory game, Proof memory proof)
        internal
    {
        if (expected.length > 0) vm.expectRevert(expected);
        else vm.expectRevert();
        vm.prank(sender);
        disputes.prove(id, Games.pack(game), proof);
    }

    /// @dev A move that disputes entry `pick` of a list of elements or sums of `size` bytes each.
    function _quoting(uint256 record, uint64 pick, bytes memory list, uint256 size, bytes memory answer)
        internal
        view
        returns (Move memory)
    {
        bytes32[] memory none = new bytes32[](0);
        if (list.length == 0) return Move(records[record], none, pick, list, answer);
        uint256 index = pick * size / Descent.PIECE_BYTES;
        bytes memory piece = Forest.cut(list, index * Descent.PIECE_BYTES, Descent.pieceBytes(list.length, index));
        return Move(records[record], Forest.otherPieces(list, index), pick, piece, answer);
    }

    function _claim(bytes memory list, uint256 index, bytes memory value) internal pure returns (bytes memory changed) {
        changed = bytes.concat(list);
        for (uint256 i = 0; i < value.length; ++i) {
            changed[index * value.length + i] = value[i];
        }
    }
}

contract DisputesOpeningTest is DisputesTable {
    function test_commit_once() external {
        (, bytes32 id) = _commit(_segment());
        assertEq(disputes.commitmentOf(id), START, "time of the commitment");
        assertEq(disputes.stateOf(id), bytes32(0), "no game yet");
        vm.expectRevert(abi.encodeWithSelector(IDisputes.CommitmentExists.selector, id));
        disputes.commit(id);
    }

    function test_challenge_needs_the_senders_own_commitment_of_an_earlier_block() external {
        (bytes32 salt, bytes32 id) = _commit(_segment());
        vm.roll(block.number - 1);
        _refuseChallenge(abi.encodeWithSelector(IDisputes.CommitmentTooRecent.selector, id), CHALLENGER, salt, model);
        vm.roll(block.number + 1);
        bytes32 other = keccak256(abi.encode(STRANGER, _segment(), salt));
        _refuseChallenge(abi.encodeWithSelector(IDisputes.UnknownCommitment.selector, other), STRANGER, salt, model);
        _challenge(CHALLENGER, _segment(), salt, model, _evidence(), _steps());
        _refuseChallenge(abi.encodeWithSelector(IDisputes.GameExists.selector, id), CHALLENGER, salt, model);
    }

    function test_challenge_takes_a_bond_that_doubles_every_four_games() external {
        for (uint256 open = 0; open < 9; ++open) {
            uint256 before = token.balanceOf(CHALLENGER);
            uint256 expected = BOND << (open / 4);
            assertEq(disputes.bondFor(JOB, 0), expected, "announced bond");
            (, Game memory game) = _open();
            assertEq(before - token.balanceOf(CHALLENGER), expected, "bond taken");
            assertEq(game.bond, expected, "bond noted");
            assertEq(game.workerSeconds, CLOCK + open * GRACE, "the worker's clock");
        }
    }

    function test_a_bond_is_taken_from_credit_where_that_covers_it() external {
        token.mint(CHALLENGER, BOND);
        vm.prank(CHALLENGER);
        disputes.deposit(BOND);
        assertEq(disputes.credit(CHALLENGER), BOND, "deposited");
        uint256 before = token.balanceOf(CHALLENGER);
        _open();
        assertEq(disputes.credit(CHALLENGER), 0, "taken from the credit");
        assertEq(token.balanceOf(CHALLENGER), before, "not from the account");
        _open();
        assertEq(before - token.balanceOf(CHALLENGER), BOND, "what the credit can't cover comes from the account");
        assertEq(token.balanceOf(address(disputes)), 2 * BOND, "both held");
    }

    function test_challenge_refuses_bonds_beyond_128_bits_without_wrapping() external {
        escrow.setGames(0, 4 * 300);
        (bytes32 salt,) = _commit(_segment());
        _refuseChallenge("", CHALLENGER, salt, model);
    }

    function _refused(bytes memory expected, Segment memory segment, Opening[] memory evidence, bytes memory steps)
        internal
    {
        (bytes32 salt,) = _commit(segment);
        vm.expectRevert(expected);
        vm.prank(CHALLENGER);
        disputes.challenge(segment, salt, model, evidence, steps);
    }

    function _wrong(string memory what) internal pure returns (bytes memory) {
        return abi.encodeWithSelector(IDisputes.WrongSegment.selector, what);
    }

    function test_challenge_refuses_what_lies_outside() external {
        Segment memory s = _segment();
        s.request = 1;
        _refused(_wrong("request"), s, _evidence(), _steps());
        s = _segment();
        s.layer = 2;
        _refused(_wrong("layer"), s, _evidence(), _steps());
        s.stage = 1;
        s.layer = 1;
        _refused(_wrong("layer"), s, _evidence(), _steps());
        s = _segment();
        s.position = 10;
        _refused(_wrong("position"), s, _evidence(), _steps());
        s = _segment();
        s.unit = 4;
        _refused(_wrong("unit"), s, _evidence(), _steps());
        uint8[6] memory kinds = [0, 6, 8, 9, 10, 255];
        for (uint256 i = 0; i < kinds.length; ++i) {
            s = _segment();
            s.kind = kinds[i];
            _refused(_wrong("kind"), s, _evidence(), _steps());
        }
        s = _segment();
        s.stage = 2;
        _refused(abi.encodeWithSelector(IWorkers.UnknownStage.selector, 2), s, _evidence(), _steps());
    }

    function test_challenge_refuses_false_evidence_and_lists() external {
        _refused(abi.encodeWithSelector(Evidence.OpeningCount.selector, 2, 0), _segment(), new Opening[](0), _steps());
        Opening[] memory evidence = _evidence();
        evidence[0].data = bytes.concat(node, hex"00");
        bytes memory expected =
            abi.encodeWithSelector(Rows.RootMismatch.selector, Tree.leaf(node), Tree.leaf(evidence[0].data));
        _refused(expected, _segment(), evidence, _steps());
        bytes memory steps = bytes.concat(_steps(), bytes32(0));
        _refused(abi.encodeWithSelector(IDisputes.WrongListLength.selector, 96, 128), _segment(), _evidence(), steps);
        steps = _claim(_steps(), 2, abi.encodePacked(Tree.leaf(abi.encodePacked(uint64(0)))));
        _refused(abi.encodeWithSelector(IDisputes.VerdictNotWrong.selector), _segment(), _evidence(), steps);
    }

    function test_challenge_refuses_another_model() external {
        Model memory other = model;
        other.layers = 5;
        (bytes32 salt,) = _commit(_segment());
        bytes32 id = keccak256(abi.encode(model));
        bytes memory expected = abi.encodeWithSelector(IDisputes.WrongModel.selector, id, keccak256(abi.encode(other)));
        _refuseChallenge(expected, CHALLENGER, salt, other);
    }

    function test_a_trace_node_is_read_totally() external {
        node = abi.encodePacked(uint32(0), uint24(1)); // cut within the count: reads as 256 positions
        escrow.setRoot(0, Tree.leaf(node));
        (, Game memory game) = _open();
        assertEq(game.trace.positions, 256, "positions");
        assertEq(game.trace.root, bytes32(0), "root");
    }

    function test_calls_are_bounded() external {
        bytes memory steps = new bytes(24_577);
        Opening[] memory evidence = _evidence();
        bytes memory call = abi.encodeCall(IDisputes.challenge, (_segment(), 0, model, evidence, steps));
        vm.expectRevert(abi.encodeWithSelector(IDisputes.CalldataTooLong.selector, call.length));
        disputes.challenge(_segment(), 0, model, evidence, steps);
    }
}

contract DisputesMoveTest is DisputesTable {
    bytes32 internal id;
    Game internal stored;

    function setUp() public override {
        super.setUp();
        (bytes32 opened, Game memory game) = _open();
        id = opened;
        stored = game;
    }

    function test_move_exactly_at_remaining_is_in_time() external {
        vm.warp(START + CLOCK);
        vm.expectRevert(abi.encodeWithSelector(IDisputes.FlagNotFallen.selector));
        disputes.flag(id, Games.pack(stored));
        Game memory next = _descend(WORKER, id, stored, _pickStep(0, _workerNodes()));
        assertEq(next.workerSeconds, 0, "all of its time is used");
    }

    function test_one_second_later_the_flag_has_fallen() external {
        vm.warp(START + CLOCK + 1);
        _refuse(abi.encodeWithSelector(IDisputes.FlagFallen.selector), WORKER, id, stored, _pickStep(0, _workerNodes()));
        vm.prank(STRANGER);
        disputes.flag(id, Games.pack(stored));
        assertEq(uint256(escrow.convicted()), 0, "the worker is convicted");
        assertEq(escrow.gasUnits(), MOVE_GAS, "one move of the challenger");
        assertEq(escrow.challenger(), CHALLENGER, "challenger");
        assertEq(escrow.committedAt(), START, "commitment");
        assertEq(disputes.credit(CHALLENGER), BOND, "bond");
        vm.expectRevert(abi.encodeWithSelector(IDisputes.WrongState.selector, id));
        disputes.flag(id, Games.pack(stored));
        _refuse(
            abi.encodeWithSelector(IDisputes.WrongState.selector, id), WORKER, id, stored, _pickStep(0, _workerNodes())
        );
        vm.expectRevert(abi.encodeWithSelector(IDisputes.CommitmentExists.selector, id));
        disputes.commit(id);
        vm.prank(CHALLENGER);
        disputes.withdraw();
        assertEq(token.balanceOf(CHALLENGER), 1e30, "all money is back");
        vm.expectRevert(abi.encodeWithSelector(IDisputes.NothingToWithdraw.selector));
        vm.prank(CHALLENGER);
        disputes.withdraw();
    }

    function test_a_silent_challenger_pays_the_moves_and_the_rest_burns() external {
        Game memory game = _descend(WORKER, id, stored, _pickStep(0, _workerNodes()));
        vm.warp(START + CLOCK + 1);
        disputes.flag(id, Games.pack(game));
        assertEq(uint256(escrow.convicted()), 255, "nobody is convicted");
        assertEq(disputes.credit(WORKER), MOVE_GAS * GAS_RATE, "one move");
        assertEq(disputes.credit(CHALLENGER), 0, "nothing back");
        assertEq(token.balanceOf(address(disputes)), BOND, "the rest is nobody's: it stays for ever");
    }

    function test_grace_tops_up_and_clocks_add_up() external {
        vm.warp(START + 950);
        Game memory game = _descend(WORKER, id, stored, _pickStep(0, _workerNodes()));
        assertEq(game.workerSeconds, 50, "used");
        assertEq(game.challengerSeconds, CLOCK, "not started");
        bytes memory list = new bytes(288);
        Move memory move = Move(
            records[0], _prove(Forest.words(_workerNodes()), 1), 1, abi.encodePacked(keccak256("another leaf")), list
        );
        vm.warp(START + 950 + 300);
        game = _descend(CHALLENGER, id, game, move);
        assertEq(game.challengerSeconds, 700, "used");
        assertEq(game.workerSeconds, GRACE, "topped up");
        assertEq(uint256(game.workerMoves), 1, "worker's moves");
        assertEq(uint256(game.challengerMoves), 2, "challenger's moves");
    }

    function test_only_the_side_to_move_moves_and_the_signer_may() external {
        Move memory move = _pickStep(0, _workerNodes());
        _refuse(abi.encodeWithSelector(IDisputes.NotYourTurn.selector, CHALLENGER), CHALLENGER, id, stored, move);
        _refuse(abi.encodeWithSelector(IDisputes.NotYourTurn.selector, STRANGER), STRANGER, id, stored, move);
        Game memory game = _descend(vm.addr(SIGNER_KEY), id, stored, move);
        _refuse(abi.encodeWithSelector(IDisputes.NotYourTurn.selector, WORKER), WORKER, id, game, move);
    }

    function test_a_changed_state_is_refused() external {
        Game memory game = stored;
        game.workerSeconds += 1;
        _refuse(
            abi.encodeWithSelector(IDisputes.WrongState.selector, id), WORKER, id, game, _pickStep(0, _workerNodes())
        );
    }

    function test_steps_refusals() external {
        Move memory move = _pickStep(0, _workerNodes());
        move.claim = _claim(_steps(), 0, abi.encodePacked(bytes32(0)));
        _refuse(abi.encodeWithSelector(IDisputes.ClaimMismatch.selector), WORKER, id, stored, move);
        move = _pickStep(0, _workerNodes());
        move.pick = 3;
        _refuse(abi.encodeWithSelector(IDisputes.PickOutOfRange.selector, 3, 3), WORKER, id, stored, move);
        move = _pickStep(0, _workerNodes());
        move.record = records[1];
        _refuse(abi.encodeWithSelector(IDisputes.RecordMismatch.selector), WORKER, id, stored, move);
        _refuse(abi.encodeWithSelector(IDisputes.SameRoot.selector), WORKER, id, stored, _pickStep(0, _zeroNodes()));
        _refuse(
            abi.encodeWithSelector(IDisputes.WrongListLength.selector, 64, 96),
            WORKER,
            id,
            stored,
            _pickStep(0, new bytes(96))
        );
        _refuse(abi.encodeWithSelector(IDisputes.WrongListLength.selector, 8, 0), WORKER, id, stored, _pickStep(2, ""));
        _refuse(
            abi.encodeWithSelector(IDisputes.SameRoot.selector),
            WORKER,
            id,
            stored,
            _pickStep(2, abi.encodePacked(uint64(2)))
        );
        _refuseProof(
            abi.encodeWithSelector(IDisputes.WrongPhase.selector, Phase.Steps), WORKER, id, stored, _proof(0, 0, "", 8)
        );
        vm.expectRevert(abi.encodeWithSelector(IDisputes.WrongPhase.selector, Phase.Steps));
        vm.prank(WORKER);
        disputes.deflect(id, Games.pack(stored), HandoffProof(0, 1, 0, "", new bytes32[](0), ""));
    }

    function test_nodes_refusals_and_the_short_last_leaf() external {
        Game memory game = _descend(WORKER, id, stored, _pickStep(0, _workerNodes()));
        assertTrue(game.phase == Phase.Nodes, "nodes");
        bytes32[] memory nodes = Forest.words(_workerNodes());
        bytes memory claim = abi.encodePacked(nodes[1]);
        Move memory move = Move(records[1], _prove(nodes, 1), 1, claim, new bytes(288));
        _refuse(abi.encodeWithSelector(IDisputes.RecordMismatch.selector), CHALLENGER, id, game, move);
        move.record = records[0];
        move.pick = 2;
        _refuse(abi.encodeWithSelector(IDisputes.PickOutOfRange.selector, 2, 2), CHALLENGER, id, game, move);
        move.pick = 0;
        _refuse(abi.encodeWithSelector(IDisputes.ClaimMismatch.selector), CHALLENGER, id, game, move);
        move.pick = 1;
        move.claim = bytes.concat(claim, hex"00");
        _refuse(abi.encodeWithSelector(IDisputes.WrongListLength.selector, 32, 33), CHALLENGER, id, game, move);
        move.claim = claim;
        move.list = new bytes(512);
        _refuse(abi.encodeWithSelector(IDisputes.WrongListLength.selector, 288, 512), CHALLENGER, id, game, move);
        Move memory same = Move(records[0], _prove(nodes, 0), 0, abi.encodePacked(nodes[0]), new bytes(512));
        _refuse(abi.encodeWithSelector(IDisputes.SameRoot.selector), CHALLENGER, id, game, same);
        move.list = new bytes(288);
        game = _descend(CHALLENGER, id, game, move);
        assertTrue(game.phase == Phase.Elements, "elements");
        assertEq(game.index, 1, "leaf");
    }

    /// @dev The worker faces the challenger's second leaf of instruction 0, all zeros.
    function _atElements() internal returns (Game memory game) {
        game = _descend(WORKER, id, stored, _pickStep(0, _workerNodes()));
        bytes32[] memory nodes = Forest.words(_workerNodes());
        game = _descend(
            CHALLENGER, id, game, Move(records[0], _prove(nodes, 1), 1, abi.encodePacked(nodes[1]), new bytes(288))
        );
    }

    function test_elements_refusals() external {
        Game memory game = _atElements();
        bytes memory sums = abi.encodePacked(uint128(2), uint128(0)); // one, none: another total than 0
        Move memory move = _quoting(0, 35, new bytes(288), 8, sums);
        move.pick = 36;
        _refuse(abi.encodeWithSelector(IDisputes.PickOutOfRange.selector, 36, 36), WORKER, id, game, move);
        move.pick = 35;
        bytes memory piece = move.claim;
        move.claim = new bytes(33);
        _refuse(abi.encodeWithSelector(IDisputes.WrongListLength.selector, 32, 33), WORKER, id, game, move);
        move.claim = abi.encodePacked(uint256(1));
        _refuse(abi.encodeWithSelector(IDisputes.ClaimMismatch.selector), WORKER, id, game, move);
        move.claim = piece;
        move.pick = 15; // of another piece
        _refuse(abi.encodeWithSelector(IDisputes.WrongListLength.selector, 128, 32), WORKER, id, game, move);
        move.pick = 35;
        move.list = new bytes(16 * 33);
        _refuse(abi.encodeWithSelector(IDisputes.WrongListLength.selector, 32, 16 * 33), WORKER, id, game, move);
        move.list = abi.encodePacked(uint128(2), uint128(1)); // 1 and -1
        _refuse(abi.encodeWithSelector(IDisputes.SameRoot.selector), WORKER, id, game, move);
        _refuseProof(
            abi.encodeWithSelector(IDisputes.MustDescend.selector), WORKER, id, game, _proof(0, 35, new bytes(288), 8)
        );
        move.list = sums;
        game = _descend(WORKER, id, game, move);
        assertTrue(game.phase == Phase.Sums, "sums");
        assertEq(game.index, 99, "element");
        assertEq(game.endChunk, 33, "chunks");
    }

    function test_sums_descend_to_one_chunk_and_are_proved() external {
        Game memory game = _atElements();
        bytes memory sums = abi.encodePacked(uint128(2), uint128(0));
        game = _descend(WORKER, id, game, _quoting(0, 35, new bytes(288), 8, sums));
        // Entry 1 covers the last chunk alone.
        Move memory move = _quoting(0, 1, sums, 16, new bytes(16));
        _refuse(abi.encodeWithSelector(IDisputes.MustProve.selector), CHALLENGER, id, game, move);
        _refuseProof(
            abi.encodeWithSelector(IDisputes.MustDescend.selector), CHALLENGER, id, game, _proof(0, 0, sums, 16)
        );
        // Entry 0 covers 32.
        move.pick = 0;
        move.list = new bytes(16 * 31);
        _refuse(abi.encodeWithSelector(IDisputes.WrongListLength.selector, 512, 496), CHALLENGER, id, game, move);
        move.list = _claim(new bytes(512), 7, abi.encodePacked(uint128(2)));
        _refuse(abi.encodeWithSelector(IDisputes.SameRoot.selector), CHALLENGER, id, game, move);
        move.list = new bytes(512);
        game = _descend(CHALLENGER, id, game, move);
        assertEq(game.firstChunk, 0, "first chunk");
        assertEq(game.endChunk, 32, "end chunk");

        referee.set(0);
        _refuseProof(
            abi.encodeWithSelector(IDisputes.NotWrong.selector), WORKER, id, game, _proof(0, 3, new bytes(512), 16)
        );
        Proof memory beyond = _proof(0, 31, new bytes(512), 16);
        beyond.pick = 32;
        _refuseProof(abi.encodeWithSelector(IDisputes.PickOutOfRange.selector, 32, 32), WORKER, id, game, beyond);
        referee.set(-5);
        _prove(WORKER, id, game, _proof(0, 3, new bytes(512), 16));
        assertEq(uint256(escrow.convicted()), 255, "the challenger lied");
        assertEq(disputes.credit(WORKER), 3 * MOVE_GAS * GAS_RATE, "three moves");
    }

    function test_an_element_at_once_is_proved() external {
        bytes memory list = _claim(new bytes(512), 63, abi.encodePacked(uint64(4)));
        Game memory game = _descend(WORKER, id, stored, _pickStep(1, list));
        assertTrue(game.phase == Phase.Elements, "elements");
        Move memory move = _quoting(1, 63, list, 8, new bytes(16));
        _refuse(abi.encodeWithSelector(IDisputes.MustProve.selector), CHALLENGER, id, game, move);

        Proof memory proof = _proof(1, 63, list, 8);
        proof.steps = new bytes32[](1);
        _refuseProof(abi.encodeWithSelector(IDisputes.ClaimMismatch.selector), CHALLENGER, id, game, proof);
        proof = _proof(1, 63, list, 8);
        proof.model.layers = 9;
        _refuseProof("", CHALLENGER, id, game, proof);
        proof = _proof(0, 63, list, 8);
        _refuseProof(abi.encodeWithSelector(IDisputes.RecordMismatch.selector), CHALLENGER, id, game, proof);
        referee.set(2);
        _refuseProof(abi.encodeWithSelector(IDisputes.NotWrong.selector), CHALLENGER, id, game, _proof(1, 63, list, 8));
        referee.set(3);
        _prove(CHALLENGER, id, game, _proof(1, 63, list, 8));
        assertEq(uint256(escrow.convicted()), 0, "the worker lied");
        assertEq(escrow.gasUnits(), 2 * MOVE_GAS, "two moves");
    }

    function test_a_step_reads_only_earlier_ones() external {
        records[1] = _record(4, 1, 64, 0, 1); // reads its own vector
        program[9] = Tree.leaf(records[1]);
        model.programRoot = _root(program);
        escrow.setJob(_job());
        (bytes32 opened, Game memory game) = _open();
        bytes memory list = _claim(new bytes(512), 0, abi.encodePacked(uint64(4)));
        game = _descend(WORKER, opened, game, _pickStep(1, list));
        referee.set(3);
        _refuseProof(
            abi.encodeWithSelector(IDisputes.RecordMismatch.selector), CHALLENGER, opened, game, _proof(1, 0, list, 8)
        );
    }

    /// @dev Entries of `size` bytes.
    function _proof(uint256 record, uint64 pick, bytes memory list, uint256 size) internal view returns (Proof memory) {
        Move memory move = _quoting(record, pick, list, size, "");
        return Proof(model, move.record, pick, move.claim, move.siblings, _read(move.record), new Opening[](0));
    }
}
