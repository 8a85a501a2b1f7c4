// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";

import {Demands} from "../../../contracts/src/Demands.sol";
import {Disputes} from "../../../contracts/src/Disputes.sol";
import {Games} from "../../../contracts/src/game/Games.sol";
import {Game, HandoffProof, IDisputes, Segment} from "../../../contracts/src/interfaces/IDisputes.sol";
import {Consent, IEscrow, Job} from "../../../contracts/src/interfaces/IEscrow.sol";
import {Model, Opening} from "../../../contracts/src/interfaces/IReferee.sol";
import {IWorkers, Stage} from "../../../contracts/src/interfaces/IWorkers.sol";
import {Referee} from "../../../contracts/src/referee/Referee.sol";
import {Tree} from "../../../contracts/src/referee/Tree.sol";
import {Market} from "../Market.t.sol";
import {Batch, Batches, Lie} from "./Batches.sol";
import {Answer, Board, Kind, Solver} from "./Solver.sol";
import {Case, Cases} from "./Cases.sol";
import {Forest} from "./Forest.sol";
import {Plan} from "./Plan.sol";

struct Log {
    bytes32[] topics;
    bytes data;
    address emitter;
}

interface Logs {
    function getRecordedLogs() external returns (Log[] memory);
}

/// @title Village: every contract as it is deployed, two workers, and whoever else wants to play
abstract contract Village is Market {
    uint256 internal constant STAGES = 2;
    uint8 internal constant NOBODY = 255;
    address internal constant WATCH = address(0x3A7C4); // the honest challenger
    address internal constant LIAR = address(0x11A2); // a challenger of what is right
    address internal constant COPIER = address(0xC0B1);
    address internal constant STRANGER = address(0x57A6);
    uint32 internal constant NO_TOKEN = type(uint32).max;

    Referee internal referee;
    Disputes internal disputes;
    Demands internal demands;
    uint256 internal constant SPARE = 2; // a worker that may take the last stage's place
    bytes32 internal line; // the pipeline
    bytes32 internal spareLine; // the same with the spare
    Model internal model;
    uint256 internal salts;
    uint64 internal nonces;

    function _settleIn() internal {
        // After Market's four: Referee, Disputes and Demands, nonces 5, 6 and 7 of this contract.
        _deploy(_created(hex"06"), _created(hex"07"));
        referee = new Referee();
        disputes = new Disputes(IERC20(token), IEscrow(escrow), IWorkers(workers), referee);
        demands = new Demands(IERC20(token), IEscrow(escrow), IWorkers(workers));
        assertEq(address(disputes), escrow.disputes(), "address of Disputes");
        assertEq(address(demands), escrow.demands(), "address of Demands");
        line = _pipeline(STAGES);
        model = Plan.model();
        address[3] memory bonded = [WATCH, LIAR, COPIER];
        for (uint256 i = 0; i < bonded.length; ++i) {
            token.mint(bonded[i], FUNDS);
            vm.prank(bonded[i]);
            token.approve(address(disputes), type(uint256).max);
        }
    }

    function _created(bytes1 nonce) private view returns (address) {
        return address(uint160(uint256(keccak256(abi.encodePacked(hex"d694", address(this), nonce)))));
    }

    function _model() internal pure override returns (Model memory) {
        return Plan.model();
    }

    function _stages(uint256) internal pure override returns (Stage[] memory stages) {
        stages = new Stage[](2);
        stages[0] = Stage(_account(0), 0, 1, 4000);
        stages[1] = Stage(_account(1), 1, 2, 6000);
    }

    // ---- jobs

    /// @notice 1 prompt token at 3, at most 2 tokens at 7: 17 at most.
    function _order(uint256 now_) internal returns (Job memory job) {
        job = _job(line);
        job.requestsRoot = Tree.leaf(Batches.request());
        job.requests = 1;
        job.promptTokens = 1;
        job.maxTokens = 2;
        job.nonce = ++nonces;
        job.acceptBy = uint64(now_ + 10);
        job.commitBy = uint64(now_ + 20);
    }

    /// @notice A job whose stages have committed to what `b` holds.
    function _serve(Batch memory b) internal returns (bytes32 id) {
        id = _open(_order(block.timestamp));
        escrow.accept(id, _acceptances(id, STAGES));
        _commitTo(id, b);
    }

    function _commitTo(bytes32 id, Batch memory b) internal {
        escrow.commit(id, _one(_claim(id, 0, Tree.leaf(b.nodes[0]), 0, 0, _keyOf(id, 0))));
        escrow.commit(id, _one(_claim(id, 1, Tree.leaf(b.nodes[1]), Tree.leaf(b.output), b.total, _keyOf(id, 1))));
    }

    // ---- a spare

    /// @notice Hires the spare, and has all sign the pipeline in which it has the last stage's place.
    function _hireSpare() internal {
        _hire(SPARE);
        Stage[] memory stages = _stages(STAGES);
        stages[1].worker = _account(SPARE);
        bytes32 joined = keccak256(abi.encode(keccak256("Join(bytes32 pipeline)"), _pipelineId(stages, 1)));
        bytes[] memory joins = new bytes[](STAGES);
        (joins[0], joins[1]) = (_sign(address(workers), _key(0), joined), _sign(address(workers), _key(SPARE), joined));
        spareLine = workers.createPipeline(modelId, stages, 1, joins);
    }

    /// @notice The call by which a job moves to the spare, with everybody's consent, or without that of party `missing`: 0 and 1 the
    /// stages, 2 the spare.
    function _moveCall(bytes32 id, uint256 missing) internal view returns (bytes memory) {
        bytes32 typehash = keccak256("Move(bytes32 job,bytes32 from,bytes32 pipeline,uint64 until)");
        uint64 until = uint64(block.timestamp + 30);
        bytes32 content = keccak256(abi.encode(typehash, id, line, spareLine, until));
        Consent[] memory consents = new Consent[](3);
        for (uint256 i = 0; i < 3; ++i) {
            consents[i] = Consent(until, _sign(address(escrow), _key(i == missing ? 7 : i), content));
        }
        return abi.encodeCall(IEscrow.move, (id, spareLine, consents));
    }

    /// @notice Which worker has a stage of a job.
    function _holder(bytes32 id, uint256 stage) internal view returns (uint256) {
        return stage == 1 && pipelineOf[id] == spareLine ? SPARE : stage;
    }

    function _keyOf(bytes32 id, uint256 stage) internal view returns (uint256) {
        return _key(_holder(id, stage));
    }

    // ---- what is wrong

    /// @notice The segment that convicts, `which` of those of accomplices.
    function _fault(bytes32 id, Batch memory b, uint256 which) internal pure returns (Segment memory) {
        Lie lie = b.lie;
        if (lie == Lie.BOTH) lie = which == 0 ? Lie.MLP_FIRST : Lie.MLP_LAST;
        if (lie == Lie.MLP_FIRST) return Segment(id, 0, Plan.MLP, 0, 0, 1, 0);
        if (lie == Lie.MLP_LAST) return Segment(id, 1, Plan.MLP, 0, 1, 0, 0);
        if (lie == Lie.NAN) return Segment(id, 1, Plan.MLP, 0, 1, 0, 0);
        if (lie == Lie.BLOCK) return Segment(id, 0, Plan.K, 0, 0, 0, 1);
        if (lie == Lie.EMBED) return Segment(id, 0, Plan.EMBED, 0, 0, 0, 1);
        if (lie == Lie.LINK_RECEIVER || lie == Lie.LINK_SENDER) {
            return Segment(id, 1, Plan.LINK, 0, 0, 1, uint32(Plan.ALTERED_COLUMN));
        }
        if (lie == Lie.OUT) return Segment(id, 1, Plan.LINK, 0, 1, 0, uint32(Plan.ALTERED_COLUMN));
        if (lie == Lie.STOP) return Segment(id, 1, Plan.STOP, 0, 0, 0, NO_TOKEN);
        if (lie == Lie.BILL) return Segment(id, 1, Plan.BILL, 0, 0, 0, 0);
        if (lie == Lie.LENGTH) return Segment(id, 1, Plan.LENGTH, 0, 0, Batches.POSITIONS, 0);
        if (lie == Lie.TOKEN_SENDER) return Segment(id, 0, Plan.EMBED, 0, 0, 1, 1);
        return Segment(id, 1, Plan.TOKEN, 0, 1, 0, _best(b));
    }

    /// @dev The token that the logits of position 0 choose.
    function _best(Batch memory b) internal pure returns (uint32 best) {
        int256[] memory x = Batches.normed(Batches.served(Batches.row(b.tensors[1][Plan.OUT], 0)));
        for (uint32 unit = 1; unit < Plan.VOCABULARY; ++unit) {
            if (Batches.logit(x, unit) > Batches.logit(x, best)) best = unit;
        }
    }

    function _shown(uint8 kind) internal pure returns (bool) {
        return kind == Plan.EMBED || kind == Plan.LINK || kind >= Plan.STOP;
    }

    // ---- games

    /// @notice The game that a commitment of `sender` would open.
    function _gameId(address sender, Segment memory s, bytes32 salt) internal pure returns (bytes32) {
        return keccak256(abi.encode(sender, s, salt));
    }

    /// @notice The call that opens a game on a segment, claiming what `c` holds (unread where a fault is shown).
    function _openingCall(Batch memory b, Segment memory s, bytes32 salt, bytes memory steps)
        internal
        view
        returns (bytes memory)
    {
        if (_shown(s.kind)) return abi.encodeCall(IDisputes.show, (s, salt, model, Solver.exhibits(b, s)));
        return abi.encodeCall(IDisputes.challenge, (s, salt, model, Solver.evidence(b, s), steps));
    }

    /// @notice What a LINK wants before it is shown, which anyone may send.
    function _prepare(address sender, Batch memory b, Segment memory s) internal {
        if (s.kind == Plan.LINK) _send(sender, abi.encodeCall(IDisputes.prepare, (s, model, Solver.premises(b, s))));
    }

    /// @notice The call by which a mover answers; empty if it has none.
    function _answerCall(bytes32 id, Board memory board, Case memory c) internal view returns (bytes memory) {
        Answer memory answer = Solver.solve(board, c);
        answer.proof.model = model;
        if (answer.kind == Kind.MOVE) {
            return abi.encodeCall(IDisputes.descend, (id, Games.pack(board.game), answer.move));
        }
        if (answer.kind == Kind.PROOF) {
            return abi.encodeCall(IDisputes.prove, (id, Games.pack(board.game), answer.proof));
        }
        return "";
    }

    /// @notice The call by which an honest receiver shows what it was sent.
    function _deflectionCall(bytes32 id, Game memory game, Batch memory b) internal view returns (bytes memory) {
        return abi.encodeCall(IDisputes.deflect, (id, Games.pack(game), _handoff(game.segment, b)));
    }

    function _handoff(Segment memory s, Batch memory b) internal view returns (HandoffProof memory) {
        uint8 sender = s.kind == Plan.EMBED ? 1 : s.stage - 1;
        bytes32 root = Tree.leaf(b.handoff);
        bytes32 typehash = keccak256("Handoff(bytes32 job,uint8 stage,bytes32 root,uint32 leaves)");
        bytes32 content = keccak256(abi.encode(typehash, s.job, sender, root, uint32(1)));
        bytes memory signature = _sign(address(escrow), _keyOf(s.job, sender), content);
        return HandoffProof(root, 1, 0, b.handoff, new bytes32[](0), signature);
    }

    /// @notice Sends, and keeps the logs.
    function _send(address sender, bytes memory call) internal returns (bool done, bytes memory answer) {
        vm.recordLogs();
        vm.prank(sender);
        (done, answer) = address(disputes).call(call);
    }

    struct Seen {
        bool moved;
        Game game;
        bytes list;
        bool ended;
        uint8 convicted;
        uint8 reason;
    }

    /// @notice A game's state from its bytes, which are read from calldata only.
    function read(bytes calldata state) external pure returns (Game memory) {
        return Games.read(state);
    }

    /// @notice What Disputes said since the last `_send`.
    function _seen() internal returns (Seen memory seen) {
        Log[] memory logs = Logs(address(vm)).getRecordedLogs();
        for (uint256 i = 0; i < logs.length; ++i) {
            if (logs[i].emitter != address(disputes)) continue;
            if (logs[i].topics[0] == IDisputes.GameMoved.selector) {
                seen.moved = true;
                bytes memory state;
                (state, seen.list) = abi.decode(logs[i].data, (bytes, bytes));
                seen.game = this.read(state);
            } else if (logs[i].topics[0] == IDisputes.GameEnded.selector) {
                seen.ended = true;
                (, seen.convicted, seen.reason) = abi.decode(logs[i].data, (uint8, uint8, uint8));
            }
        }
    }

    function _steps(Case memory c) internal pure returns (bytes memory) {
        return Forest.bytesOf(Cases.roots(c));
    }
}
