// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {SafeCast} from "@openzeppelin/contracts/utils/math/SafeCast.sol";

import {Descent} from "./game/Descent.sol";
import {Charge, Evidence} from "./game/Evidence.sol";
import {Games} from "./game/Games.sol";
import {Game, HandoffProof, IDisputes, Move, Phase, Segment} from "./interfaces/IDisputes.sol";
import {IEscrow} from "./interfaces/IEscrow.sol";
import {Cell, Instruction, IReferee, Model, Opening, Proof} from "./interfaces/IReferee.sol";
import {IWorkers} from "./interfaces/IWorkers.sol";
import {Codec} from "./referee/Codec.sol";
import {Ops} from "./referee/Ops.sol";
import {Tree} from "./referee/Tree.sol";

/// @title Disputes: the game that convicts a wrong segment
/// @notice See IDisputes and docs/protocol.md, "The game".
/// @dev Over 400 lines: moves, clocks and money are one state machine. What a segment is lies in game/Evidence.sol, the shape of lists in
/// game/Descent.sol.
contract Disputes is IDisputes {
    using SafeERC20 for IERC20;

    uint256 public constant GAME_GAS = 2_000_000;
    /// @notice What a winner's move is paid for.
    // Rationale: no move measured takes more (`plumb bench dispute`): the dearest, a VERDICT that convicts, about 0.3M at any shape.
    uint256 public constant MOVE_GAS = 350_000;
    /// @dev An honest move needs at most a list of 64 nodes, a leaf of 2048 bytes and its openings: under 7 KB at every shape measured.
    uint256 public constant MAX_CALLDATA_BYTES = 24 * 1024;

    /// @dev leaf(i64 1): the only verdict that a challenge may claim.
    bytes32 private constant WRONG = 0xd81f51781eeb8f46a0e112e86ca335896ccc12cee00e6cfcf58a3501129dfc24;
    /// @dev State of a game that is over. No state hashes to it.
    bytes32 private constant ENDED = keccak256("plumb.game.ended");
    /// @dev Open games against a stage that double the bond.
    uint256 private constant GAMES_PER_DOUBLING = 4;
    uint256 private constant MAX_DOUBLINGS = 107;
    uint8 private constant NOBODY = 255;

    // Reasons in GameEnded.
    uint8 private constant PROVED = 1;
    uint8 private constant FLAGGED = 2;
    uint8 private constant SHOWN = 3;
    uint8 private constant DEFLECTED = 4;

    IERC20 public immutable token;
    IEscrow public immutable escrow;
    IWorkers public immutable workers;
    IReferee public immutable referee;
    Evidence public immutable evidence;

    /// @dev One slot a game. 0: nothing; below 2^128: its commitment's block, 64 bits, and timestamp, 64 bits; else the hash of its state, at
    /// last ENDED.
    mapping(bytes32 id => bytes32) private _slots;
    /// @inheritdoc IDisputes
    mapping(address account => uint256) public credit;

    modifier bounded() {
        if (msg.data.length > MAX_CALLDATA_BYTES) revert CalldataTooLong(msg.data.length);
        _;
    }

    constructor(IERC20 token_, IEscrow escrow_, IWorkers workers_, IReferee referee_) {
        token = token_;
        escrow = escrow_;
        workers = workers_;
        referee = referee_;
        evidence = new Evidence(escrow_, workers_, referee_);
    }

    // ---- opening a game

    /// @inheritdoc IDisputes
    function commit(bytes32 id) external {
        if (_slots[id] != 0) revert CommitmentExists(id);

        _slots[id] = bytes32(block.number << 64 | uint64(block.timestamp));
        emit ChallengeCommitted(id, msg.sender);
    }

    /// @inheritdoc IDisputes
    function challenge(
        Segment calldata segment,
        bytes32 salt,
        Model calldata model,
        Opening[] calldata openings,
        bytes calldata steps
    ) external bounded returns (bytes32 id) {
        uint64 committedAt;
        (id, committedAt) = _reveal(segment, salt);
        Charge memory found = _found(Evidence.charge.selector);
        // `step` is a byte.
        if (found.steps == 0 || found.steps > type(uint8).max) revert WrongSegment("kind");
        _requireLength(steps, 32 * uint256(found.steps));
        if (bytes32(steps[steps.length - 32:]) != WRONG) revert VerdictNotWrong();

        Game memory game = _game(segment, model, found, committedAt);
        game.steps = keccak256(steps);
        game.phase = Phase.Steps;
        _start(id, game, found.clock, steps);
    }

    /// @inheritdoc IDisputes
    function prepare(Segment calldata segment, Model calldata model, Opening[] calldata openings) external bounded {
        evidence.prepare(segment, model, openings);
    }

    /// @inheritdoc IDisputes
    /// @dev Where nobody else can be to blame the game ends at once, and takes no bond.
    function show(Segment calldata segment, bytes32 salt, Model calldata model, Opening[] calldata openings)
        external
        bounded
        returns (bytes32 id)
    {
        uint64 committedAt;
        (id, committedAt) = _reveal(segment, salt);
        Charge memory found = _found(Evidence.find.selector);

        Game memory game = _game(segment, model, found, committedAt);
        if (found.deflectable) {
            game.phase = Phase.Handoff;
            // LINK's last opening is the leaf that holds the judged element.
            _start(id, game, found.clock, found.list == 0 ? msg.data[:0] : openings[openings.length - 1].data);
        } else {
            game.challenger = msg.sender;
            emit GameMoved(id, segment.job, msg.sender, Games.pack(game), "", 0);
            escrow.gameOpened(segment.job, segment.stage);
            _end(id, game, segment.stage, SHOWN);
        }
    }

    /// @dev Asks Evidence in the words of this very call, whose parameters it shares: decoding and encoding them anew would cost about as much as
    /// judging them.
    function _found(bytes4 selector) private view returns (Charge memory) {
        (bool done, bytes memory answer) = address(evidence).staticcall(bytes.concat(selector, msg.data[4:]));
        if (!done) {
            assembly ("memory-safe") {
                revert(add(answer, 32), mload(answer))
            }
        }
        return abi.decode(answer, (Charge));
    }

    function _game(Segment calldata segment, Model calldata model, Charge memory found, uint64 committedAt)
        private
        pure
        returns (Game memory game)
    {
        game.segment = segment;
        game.committedAt = committedAt;
        game.worker = found.worker;
        game.gasRate = found.gasRate;
        game.grace = found.grace;
        game.modelId = found.modelId;
        game.rule = model.programRoot;
        game.programLeaves = model.programLeaves;
        game.firstInstruction = found.firstInstruction;
        game.trace = found.trace;
        game.token = found.token;
        game.sampling = found.sampling;
        game.index = found.index;
        game.list = found.list;
        game.challengerMoves = found.moves;
    }

    /// @dev The worker is to move. It has `grace` more for each game already open against its stage.
    function _start(bytes32 id, Game memory game, uint32 clock, bytes calldata list) private {
        uint256 alreadyOpen = escrow.gameOpened(game.segment.job, game.segment.stage);
        uint256 workerSeconds = uint256(clock) + alreadyOpen * game.grace;
        game.workerSeconds = workerSeconds > type(uint32).max ? type(uint32).max : uint32(workerSeconds);
        game.challengerSeconds = clock;
        game.challenger = msg.sender;
        game.workerTurn = true;
        game.turnStarted = uint64(block.timestamp);
        game.bond = _bond(game.gasRate, alreadyOpen);
        uint256 held = credit[msg.sender];
        if (held >= game.bond) credit[msg.sender] = held - game.bond;
        _store(id, game, list);

        if (held < game.bond) token.safeTransferFrom(msg.sender, address(this), game.bond);
    }

    // ---- moves

    /// @inheritdoc IDisputes
    function descend(bytes32 id, bytes calldata posted, Move calldata move) external bounded {
        Game memory game = _resume(id, posted);
        if (game.phase == Phase.Steps) _pickStep(game, move);
        else if (game.phase == Phase.Nodes) _pickNode(game, move);
        else if (game.phase == Phase.Elements) _pickElement(game, move);
        else if (game.phase == Phase.Sums) _pickSum(game, move);
        else revert WrongPhase(game.phase);

        _passTurn(game);
        _store(id, game, move.list);
    }

    /// @inheritdoc IDisputes
    function prove(bytes32 id, bytes calldata posted, Proof calldata proof) external bounded {
        Game memory game = _resume(id, posted);
        if (game.phase != Phase.Elements && game.phase != Phase.Sums) revert WrongPhase(game.phase);
        _requireWithin(proof);
        Instruction memory ins = _instruction(game, proof.record);
        if (!Descent.readsEarlier(ins, game.step)) revert RecordMismatch();
        bytes32 modelId = Descent.modelId(proof.model);
        if (modelId != game.modelId) revert WrongModel(game.modelId, modelId);
        if (Descent.hashOf(proof.steps) != game.steps) revert ClaimMismatch();

        bytes calldata claimed = _claimed(game, ins, proof.pick, proof.claim, proof.siblings);
        uint256 element = game.index;
        uint256 chunk = 0;
        bool wide = true; // as partial sums are
        if (game.phase == Phase.Elements) {
            wide = ins.wide != 0;
            element = element * Codec.elementsPerLeaf(wide) + proof.pick;
            if (Codec.chunkCount(ins, game.segment.position) > 1) revert MustDescend();
        } else {
            uint256 end;
            (chunk, end) = Descent.sumRange(game.firstChunk, game.endChunk, proof.pick);
            if (end - chunk > 1) revert MustDescend();
        }
        int256 value = _step(game, proof, element, chunk);
        if (game.phase == Phase.Elements) value = Ops.finish(ins.op, value, ins.a);
        if (_equal(Codec.encodeValue(value, wide), claimed)) revert NotWrong();

        _end(id, game, game.workerTurn ? NOBODY : game.segment.stage, PROVED);
    }

    /// @inheritdoc IDisputes
    function deflect(bytes32 id, bytes calldata posted, HandoffProof calldata proof) external bounded {
        Game memory game = _resume(id, posted);
        if (game.phase != Phase.Handoff) revert WrongPhase(game.phase);

        _end(id, game, evidence.sender(game, proof), DEFLECTED);
    }

    /// @inheritdoc IDisputes
    function flag(bytes32 id, bytes calldata posted) external bounded {
        Game memory game = _load(id, posted);
        if (block.timestamp - game.turnStarted <= _seconds(game)) revert FlagNotFallen();

        _end(id, game, game.workerTurn ? game.segment.stage : NOBODY, FLAGGED);
    }

    /// @inheritdoc IDisputes
    function deposit(uint256 amount) external {
        credit[msg.sender] += amount;
        emit Credited(msg.sender, amount, 0);

        token.safeTransferFrom(msg.sender, address(this), amount);
    }

    /// @inheritdoc IDisputes
    function withdraw() external {
        uint256 amount = credit[msg.sender];
        if (amount == 0) revert NothingToWithdraw();

        credit[msg.sender] = 0;
        emit Withdrawn(msg.sender, amount);

        token.safeTransfer(msg.sender, amount);
    }

    // ---- views

    /// @inheritdoc IDisputes
    function stateOf(bytes32 id) external view returns (bytes32) {
        return uint256(_slots[id]) > type(uint128).max ? _slots[id] : bytes32(0);
    }

    /// @inheritdoc IDisputes
    function commitmentOf(bytes32 id) external view returns (uint64) {
        return uint256(_slots[id]) > type(uint128).max ? 0 : uint64(uint256(_slots[id]));
    }

    /// @inheritdoc IDisputes
    function bondFor(bytes32 job, uint8 stage) external view returns (uint256) {
        return _bond(escrow.job(job).gasRate, escrow.openGames(job, stage));
    }

    // ---- the descent

    function _pickStep(Game memory game, Move calldata move) private pure {
        if (keccak256(move.claim) != game.steps) revert ClaimMismatch();
        uint256 pick = move.pick;
        if (pick >= move.claim.length / 32) revert PickOutOfRange(pick, move.claim.length / 32);
        bytes32 root =
            Descent.rootOf(Tree.leaf(move.record), game.firstInstruction + pick, game.programLeaves, move.siblings);
        if (root != game.rule) revert RecordMismatch();
        game.step = uint8(pick);
        game.rule = keccak256(move.record);

        Instruction memory ins = Codec.instruction(move.record);
        game.steps = keccak256(Descent.readRoots(ins, pick, move.claim));
        bytes32 disputed = bytes32(move.claim[32 * pick:]);
        uint256 leaves = Codec.leafCount(_elements(game, ins), ins.wide != 0);
        if (leaves > 1) _postNodes(game, leaves, Tree.depth(leaves), 0, disputed, move.list);
        else _postLeaf(game, ins, 0, disputed, move.list);
    }

    function _pickNode(Game memory game, Move calldata move) private pure {
        Instruction memory ins = _instruction(game, move.record);
        uint256 leaves = Codec.leafCount(_elements(game, ins), ins.wide != 0);
        uint256 above = Descent.parentLevel(Tree.depth(leaves), game.level);
        uint256 length = Descent.children(leaves, game.level, above, game.index >> (above - game.level));
        if (move.pick >= length) revert PickOutOfRange(move.pick, length);
        if (move.claim.length != 32) revert WrongListLength(32, move.claim.length);
        bytes32 disputed = bytes32(move.claim);
        if (Descent.rootOf(disputed, move.pick, length, move.siblings) != game.list) revert ClaimMismatch();

        uint256 picked = game.index + move.pick;
        if (game.level > 0) _postNodes(game, leaves, game.level, picked, disputed, move.list);
        else _postLeaf(game, ins, picked, disputed, move.list);
    }

    function _pickElement(Game memory game, Move calldata move) private pure {
        Instruction memory ins = _instruction(game, move.record);
        bool wide = ins.wide != 0;
        bytes calldata disputed = _claimed(game, ins, move.pick, move.claim, move.siblings);
        uint256 chunks = Codec.chunkCount(ins, game.segment.position);
        if (chunks == 1) revert MustProve();
        _requireLength(move.list, Descent.SUM_BYTES * Descent.sums(chunks));
        if (_equal(Descent.finished(ins, move.list), disputed)) revert SameRoot();

        game.phase = Phase.Sums;
        game.index = uint64(game.index * Codec.elementsPerLeaf(wide) + move.pick);
        game.endChunk = uint32(chunks);
        game.list = Descent.told(move.list);
    }

    function _pickSum(Game memory game, Move calldata move) private pure {
        Instruction memory ins = _instruction(game, move.record);
        bytes calldata disputed = _claimed(game, ins, move.pick, move.claim, move.siblings);
        (uint256 first, uint256 end) = Descent.sumRange(game.firstChunk, game.endChunk, move.pick);
        if (end - first == 1) revert MustProve();
        _requireLength(move.list, Descent.SUM_BYTES * Descent.sums(end - first));
        if (Descent.combine(ins.op, move.list) == Codec.decodeValue(disputed, 0, true)) revert SameRoot();

        game.firstChunk = uint32(first);
        game.endChunk = uint32(end);
        game.list = Descent.told(move.list);
    }

    /// @dev Posts the nodes beneath node `parent` of level `above`.
    function _postNodes(
        Game memory game,
        uint256 leaves,
        uint256 above,
        uint256 parent,
        bytes32 disputed,
        bytes calldata list
    ) private pure {
        uint256 level = Descent.nextLevel(Tree.depth(leaves), above);
        uint256 length = Descent.children(leaves, level, above, parent);
        _requireLength(list, 32 * length);
        bytes32 fold = Tree.fold(Descent.words(list));
        if (fold == disputed) revert SameRoot();

        game.phase = Phase.Nodes;
        game.level = uint8(level);
        game.index = uint64(parent << (above - level));
        game.list = fold;
    }

    function _postLeaf(Game memory game, Instruction memory ins, uint256 index, bytes32 disputed, bytes calldata list)
        private
        pure
    {
        _requireLength(list, Descent.leafBytes(_elements(game, ins), ins.wide != 0, index));
        if (Tree.leaf(list) == disputed) revert SameRoot();

        game.phase = Phase.Elements;
        game.level = 0;
        game.index = uint64(index);
        game.list = Descent.told(list);
    }

    /// @dev Entry `pick` of the opponent's list of elements or sums, from the piece of the list that holds it.
    function _claimed(
        Game memory game,
        Instruction memory ins,
        uint256 pick,
        bytes calldata piece,
        bytes32[] calldata others
    ) private pure returns (bytes calldata) {
        bool wide = ins.wide != 0;
        bool sums = game.phase == Phase.Sums;
        uint256 size = sums ? Descent.SUM_BYTES : Codec.elementBytes(wide);
        uint256 length = sums
            ? Descent.SUM_BYTES * Descent.sums(game.endChunk - game.firstChunk)
            : Descent.leafBytes(_elements(game, ins), wide, game.index);
        if (pick >= length / size) revert PickOutOfRange(pick, length / size);
        (uint256 index, uint256 first) = (pick * size / Descent.PIECE_BYTES, pick * size % Descent.PIECE_BYTES);
        _requireLength(piece, Descent.pieceBytes(length, index));
        if (others.length != (length - 1) / Descent.PIECE_BYTES) revert ClaimMismatch();
        if (Descent.toldBy(piece, index, others) != game.list) revert ClaimMismatch();
        return piece[first:first + size];
    }

    function _instruction(Game memory game, bytes calldata record) private pure returns (Instruction memory) {
        if (keccak256(record) != game.rule) revert RecordMismatch();
        return Codec.instruction(record);
    }

    function _elements(Game memory game, Instruction memory ins) private pure returns (uint256) {
        return Codec.elementCount(ins, game.segment.position, game.segment.unit);
    }

    /// @dev SAFETY: offsets in calldata are signed. `_step` hands on what lies behind the proof's start; of what lies before it the referee would
    /// read other bytes than were hashed here.
    function _requireWithin(Proof calldata proof) private pure {
        bytes calldata record = proof.record;
        bytes32[] calldata steps = proof.steps;
        bool outside;
        assembly ("memory-safe") {
            let first := add(proof, 32) // an array begins behind its length
            outside := or(lt(record.offset, first), lt(steps.offset, first))
        }
        if (outside) revert ClaimMismatch();
    }

    /// @dev Hands the proof on as it stands in calldata: its hashes were checked, and all that was hashed lies within.
    function _step(Game memory game, Proof calldata proof, uint256 element, uint256 chunk)
        private
        view
        returns (int256 value)
    {
        Segment memory segment = game.segment;
        Cell memory cell = Cell(segment.layer, segment.position, segment.unit, game.token, game.trace, game.sampling);
        bytes memory head = abi.encode(cell, element, chunk);
        bytes4 selector = IReferee.judge.selector;
        address to = address(referee);
        assembly ("memory-safe") {
            let length := mload(head)
            let size := sub(calldatasize(), proof)
            let call_ := mload(0x40)
            mstore(call_, selector)
            mcopy(add(call_, 4), add(head, 32), length)
            mstore(add(call_, add(4, length)), add(length, 32))
            calldatacopy(add(call_, add(36, length)), proof, size)
            let done := staticcall(gas(), to, call_, add(add(36, length), size), 0, 32)
            if iszero(done) {
                returndatacopy(call_, 0, returndatasize())
                revert(call_, returndatasize())
            }
            value := mload(0)
        }
    }

    function _requireLength(bytes calldata list, uint256 expected) private pure {
        if (list.length != expected) revert WrongListLength(expected, list.length);
    }

    function _equal(bytes memory a, bytes calldata b) private pure returns (bool) {
        return keccak256(a) == keccak256(b);
    }

    // ---- state and clocks

    function _reveal(Segment calldata segment, bytes32 salt) private view returns (bytes32 id, uint64 committedAt) {
        id = keccak256(abi.encode(msg.sender, segment, salt));
        uint256 slot = uint256(_slots[id]);
        if (slot == 0) revert UnknownCommitment(id);
        if (slot > type(uint128).max) revert GameExists(id);
        if (slot >> 64 >= block.number) revert CommitmentTooRecent(id);
        committedAt = uint64(slot);
    }

    function _load(bytes32 id, bytes calldata posted) private view returns (Game memory) {
        if (_slots[id] != keccak256(posted)) revert WrongState(id);
        return Games.read(posted);
    }

    /// @dev Checks state, mover and clock, and charges the clock for the move.
    function _resume(bytes32 id, bytes calldata posted) private view returns (Game memory game) {
        game = _load(id, posted);
        bool mayMove = game.workerTurn
            ? msg.sender == game.worker || msg.sender == workers.signerOf(game.worker)
            : msg.sender == game.challenger;
        if (!mayMove) revert NotYourTurn(msg.sender);
        uint256 elapsed = block.timestamp - game.turnStarted;
        if (elapsed > _seconds(game)) revert FlagFallen();
        if (game.workerTurn) {
            game.workerSeconds -= uint32(elapsed);
            ++game.workerMoves;
        } else {
            game.challengerSeconds -= uint32(elapsed);
            ++game.challengerMoves;
        }
    }

    /// @dev Hands the turn over; whoever is to move has at least `grace`.
    function _passTurn(Game memory game) private view {
        game.workerTurn = !game.workerTurn;
        game.turnStarted = uint64(block.timestamp);
        if (game.workerTurn && game.workerSeconds < game.grace) game.workerSeconds = game.grace;
        if (!game.workerTurn && game.challengerSeconds < game.grace) game.challengerSeconds = game.grace;
    }

    function _seconds(Game memory game) private pure returns (uint256) {
        return game.workerTurn ? game.workerSeconds : game.challengerSeconds;
    }

    /// @dev A mover's own transaction holds the list for all to read, so that the event need not repeat it.
    function _store(bytes32 id, Game memory game, bytes calldata list) private {
        bytes memory packed = Games.pack(game);
        _slots[id] = keccak256(packed);
        uint32 place;
        // SAFETY: an origin without code is nobody's callee, so its transaction's calldata is this call's. One that delegates (EIP-7702) may have
        // called through itself.
        if (msg.sender == tx.origin && msg.sender.code.length == 0) {
            assembly ("memory-safe") {
                place := list.offset
            }
            list = msg.data[:0];
        }
        emit GameMoved(id, game.segment.job, msg.sender, packed, list, place);
    }

    // ---- money

    function _bond(uint128 gasRate, uint256 openGames) private pure returns (uint128) {
        uint256 doublings = openGames / GAMES_PER_DOUBLING;
        // Nobody can pay so much; a longer shift would wrap: GAME_GAS * gasRate has up to 149 bits.
        if (doublings > MAX_DOUBLINGS) doublings = MAX_DOUBLINGS;
        return SafeCast.toUint128((GAME_GAS * gasRate) << doublings);
    }

    /// @dev The loser's bond pays the worker's moves, the rest burns; a winner's returns. Payouts are pulled.
    /// @param convicted stage found guilty, or NOBODY: the challenger lost
    function _end(bytes32 id, Game memory game, uint8 convicted, uint8 reason) private {
        Segment memory segment = game.segment;
        _slots[id] = ENDED;
        if (convicted != NOBODY) {
            _credit(game.challenger, game.bond, id);
        } else {
            // SAFETY: what the moves leave of the bond burns: it is nobody's credit, so it stays here for ever.
            uint256 moves = game.workerMoves * MOVE_GAS * game.gasRate;
            _credit(game.worker, moves < game.bond ? moves : game.bond, id);
        }
        emit GameEnded(id, segment.job, segment.stage, convicted, reason);

        escrow.gameClosed(
            segment.job, segment.stage, convicted, game.challenger, game.committedAt, game.challengerMoves * MOVE_GAS
        );
    }

    function _credit(address account, uint256 amount, bytes32 id) private {
        if (amount == 0) return;
        credit[account] += amount;
        emit Credited(account, amount, id);
    }
}
