// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {SafeCast} from "@openzeppelin/contracts/utils/math/SafeCast.sol";

import {Grid, Grids} from "./demands/Grid.sol";
import {Records} from "./game/Records.sol";
import {Demand, Demanded, IDemands} from "./interfaces/IDemands.sol";
import {IEscrow, Job} from "./interfaces/IEscrow.sol";
import {Model, Opening} from "./interfaces/IReferee.sol";
import {IWorkers, Stage} from "./interfaces/IWorkers.sol";
import {Tree} from "./referee/Tree.sol";

/// @title Demands: withheld data, posted on chain or lost
/// @notice See IDemands and docs/protocol.md, "Demands".
/// SAFETY: outside calls go to Escrow, Workers and the token alone, after the state is written.
contract Demands is IDemands {
    using SafeERC20 for IERC20;
    using Grids for Grid;

    /// @notice Most bytes of leaves that one demand may ask for.
    // Rationale: 40 gas a byte of calldata (EIP-7623) make 2.6M gas, which fits any block; what is hashed and logged of them stays below that floor.
    uint256 public constant MAX_ANSWER_BYTES = 64 * 1024;
    /// @notice Most leaves that one demand may ask for.
    // Rationale: so many roots are 64 KB. Of leaves of two bytes those would be 32,768, which take more gas to hash than one transaction has
    // (EIP-7825): whoever is asked for them could not answer.
    uint256 public constant MAX_ANSWER_LEAVES = 2048;
    /// @dev Besides the leaves: the state, the model, a record and up to some fifty siblings.
    uint256 public constant MAX_CALLDATA_BYTES = MAX_ANSWER_BYTES + 8 * 1024;
    /// @notice What an answer's pay counts: the call with its proofs, each leaf, and each byte of leaves.
    // Measured: tests/contracts/DemandsGasTest.t.sol.
    uint256 public constant ANSWER_GAS = 250_000;
    uint256 public constant LEAF_GAS = 2_000;
    uint256 public constant BYTE_GAS = 40;
    /// @notice Gas of answers queued against a stage that doubles the price of the next.
    // Rationale: three full answers. Whoever wants to shut others out by price must burn about what they would have to pay.
    uint256 public constant DOUBLING_GAS = 10_000_000;
    uint256 private constant MAX_DOUBLINGS = 100; // nobody can pay so much
    /// @notice What a demander that convicts by silence is paid for, besides what it burned: its two calls.
    uint256 public constant DEMAND_GAS = 350_000;
    address public constant BURN = 0x000000000000000000000000000000000000dEaD;

    // Kinds.
    uint8 private constant PROMPT = 0;
    uint8 private constant OUTPUT = 1;
    uint8 private constant TENSORS = 2;
    uint8 private constant LEAVES = 3;

    uint256 private constant REQUEST_BYTES = 100;
    uint256 private constant LAYER_TENSORS = 6;
    uint256 private constant BLOCK = 256;
    uint256 private constant TILE_ROWS = 8;
    uint256 private constant TILE_COLUMNS = 32;
    // Places among a layer's six tensors.
    uint256 private constant Q = 1;
    uint256 private constant K = 2;
    uint256 private constant V = 3;
    uint8 private constant FLOAT32 = 2;

    /// @dev State of a demand that is over. No state hashes to it.
    bytes32 private constant ENDED = keccak256("plumb.demand.ended");

    IERC20 public immutable token;
    IEscrow public immutable escrow;
    IWorkers public immutable workers;

    struct Queue {
        uint32 open;
        uint128 gas; // of the open demands' answers
    }

    /// @dev What a demand asks for, as far as job and model tell.
    struct Target {
        Job job;
        Stage stage;
        Grid grid; // rows: 0 where only the record tells
        uint256 tensors; // of a request at this stage
    }

    mapping(bytes32 id => bytes32) private _slots;
    mapping(bytes32 job => mapping(uint256 stage => Queue)) private _queues;
    /// @dev The job's window before any answer moved it.
    mapping(bytes32 job => uint64) private _closes;
    /// @inheritdoc IDemands
    mapping(address account => uint256) public credit;

    constructor(IERC20 token_, IEscrow escrow_, IWorkers workers_) {
        token = token_;
        escrow = escrow_;
        workers = workers_;
    }

    /// @inheritdoc IDemands
    function demand(Demand calldata demand_, Model calldata model, uint256 most) external returns (bytes32 id) {
        id = keccak256(abi.encode(demand_));
        if (_slots[id] != 0) revert DemandExists(id);
        Target memory target = _target(demand_, model);
        Queue storage queue = _queues[demand_.job][demand_.stage];
        uint256 units = _answerGas(demand_, target);
        uint256 pay = units * target.job.gasRate;
        uint256 price = _price(pay, queue.gas);
        if (price > most) revert PriceTooHigh(price, most);

        uint256 alreadyOpen = queue.open;
        Demanded memory demanded = Demanded({
            demand: demand_,
            demander: msg.sender,
            openedAt: uint64(block.timestamp),
            deadline: uint64(block.timestamp) + target.job.clock + uint64(alreadyOpen) * target.job.grace,
            pay: SafeCast.toUint128(pay),
            burned: SafeCast.toUint128(price - pay)
        });
        queue.open = uint32(alreadyOpen + 1);
        queue.gas += uint128(units);
        _slots[id] = keccak256(abi.encode(demanded));
        emit DemandOpened(id, demand_.job, demanded);

        _requireOpen(demand_.job, escrow.demandOpened(demand_.job, demand_.stage));
        token.safeTransferFrom(msg.sender, address(this), price);
        token.safeTransfer(BURN, price - pay);
    }

    /// @inheritdoc IDemands
    function answer(bytes32 id, Demanded calldata demanded, Model calldata model, Opening[] calldata openings)
        external
    {
        if (msg.data.length > MAX_CALLDATA_BYTES) revert CalldataTooLong(msg.data.length);
        _requireState(id, demanded);
        if (block.timestamp > demanded.deadline) revert TooLate(demanded.deadline);
        Demand calldata asked = demanded.demand;
        Target memory target = _target(asked, model);
        address worker = target.stage.worker;
        if (msg.sender != worker && msg.sender != workers.signerOf(worker)) revert NotYourTurn(msg.sender);
        _requireAnswered(asked, target, openings);

        _end(id, demanded, target.job.gasRate);
        _credit(worker, demanded.pay, id);
        emit DemandAnswered(id, asked.job, openings);

        escrow.demandClosed(asked.job, asked.stage, false, demanded.demander, demanded.openedAt, 0);
    }

    /// @inheritdoc IDemands
    function lapse(bytes32 id, Demanded calldata demanded) external {
        _requireState(id, demanded);
        if (block.timestamp <= demanded.deadline) revert TooEarly(demanded.deadline + 1);
        Demand calldata asked = demanded.demand;
        uint256 gasRate = escrow.job(asked.job).gasRate;

        _end(id, demanded, gasRate);
        _credit(demanded.demander, demanded.pay, id);
        emit DemandLapsed(id, asked.job, asked.stage, demanded.demander);

        uint256 units = DEMAND_GAS + demanded.burned / gasRate;
        escrow.demandClosed(asked.job, asked.stage, true, demanded.demander, demanded.openedAt, units);
    }

    /// @inheritdoc IDemands
    function withdraw() external {
        uint256 amount = credit[msg.sender];
        if (amount == 0) revert NothingToWithdraw();

        credit[msg.sender] = 0;
        emit Withdrawn(msg.sender, amount);

        token.safeTransfer(msg.sender, amount);
    }

    // ---- views

    /// @inheritdoc IDemands
    function stateOf(bytes32 id) external view returns (bytes32) {
        return _slots[id];
    }

    /// @inheritdoc IDemands
    function openDemands(bytes32 job, uint8 stage) external view returns (uint256) {
        return _queues[job][stage].open;
    }

    /// @inheritdoc IDemands
    function priceOf(Demand calldata demand_, Model calldata model) external view returns (uint256) {
        Target memory target = _target(demand_, model);
        uint256 pay = _answerGas(demand_, target) * target.job.gasRate;
        return _price(pay, _queues[demand_.job][demand_.stage].gas);
    }

    // ---- what is asked for

    function _target(Demand calldata asked, Model calldata model) private view returns (Target memory target) {
        target.job = escrow.job(asked.job);
        bytes32 modelId = keccak256(abi.encode(model));
        if (modelId != target.job.model) revert WrongModel(target.job.model, modelId);
        if (asked.request >= target.job.requests) revert WrongDemand("request");
        // Reverts with UnknownStage for a stage that the pipeline does not have.
        target.stage = workers.pipelineStage(target.job.pipeline, asked.stage);
        bool last = target.stage.endLayer == model.layers;
        target.tensors = LAYER_TENSORS * (target.stage.endLayer - target.stage.firstLayer) + (last ? 1 : 0);

        if (asked.kind == LEAVES) {
            if (asked.tensor >= target.tensors) revert WrongDemand("tensor");
            target.grid = _tensorGrid(asked.tensor, model);
            return target;
        }
        if (asked.tensor != 0) revert WrongDemand("tensor");
        if (asked.kind == TENSORS) {
            target.grid = Grid(target.tensors, 1, 1, 1, 32);
            return target;
        }
        if (asked.kind > TENSORS) revert WrongDemand("kind");
        // Every stage holds the prompts; for the outputs the last one answers, which committed to them.
        if (asked.kind == OUTPUT && !last) revert WrongDemand("stage");
        target.grid = Grid(0, 1, Records.TOKENS_PER_LEAF, 1, 4);
    }

    /// @param place among the request's tensors; the one behind the last layer's six is `out`
    function _tensorGrid(uint256 place, Model calldata model) private pure returns (Grid memory) {
        uint256 kind = place % LAYER_TENSORS;
        uint256 elementBytes = model.servedDtype == FLOAT32 ? 4 : 2;
        if (kind == V) return Grid(0, model.kvWidth, TILE_ROWS, TILE_COLUMNS, elementBytes);
        uint256 width = kind == Q ? model.queryWidth : kind == K ? model.kvWidth : model.hidden;
        return Grid(0, width, 1, BLOCK, elementBytes);
    }

    function _answerGas(Demand calldata asked, Target memory target) private pure returns (uint256) {
        uint256 leafBytes = target.grid.leafBytes();
        if (asked.count == 0 || asked.count > MAX_ANSWER_LEAVES || asked.count * leafBytes > MAX_ANSWER_BYTES) {
            revert WrongDemand("count");
        }
        return ANSWER_GAS + asked.count * (LEAF_GAS + BYTE_GAS * leafBytes);
    }

    /// @dev A quarter more than the pay, doubled by what is queued: what goes beyond the pay burns, so nobody can demand of itself for nothing.
    function _price(uint256 pay, uint256 queuedGas) private pure returns (uint256) {
        uint256 doublings = queuedGas / DOUBLING_GAS;
        if (doublings > MAX_DOUBLINGS) doublings = MAX_DOUBLINGS;
        return (pay + pay / 4 + 1) << doublings;
    }

    // ---- answers

    /// @dev Reverts unless the openings are what was asked for.
    function _requireAnswered(Demand calldata asked, Target memory target, Opening[] calldata openings) private view {
        if (openings.length == 0) revert OpeningCount(1, 0);
        (bytes32 root, uint256 rows) = _record(asked, target.job, openings[0]);
        Grid memory grid = target.grid;
        if (asked.kind != TENSORS) grid.rows = rows;
        uint256 leaves = grid.leaves();
        bool beyond = asked.first >= leaves;
        if (openings.length != (beyond ? 1 : 2)) revert OpeningCount(beyond ? 1 : 2, openings.length);
        if (beyond) return;

        bytes32 top = _topOf(asked, target, openings[1], leaves);
        if (top != root) revert RootMismatch(root, top);
    }

    /// @dev The root that the posted leaves imply, of a grid of `leaves` leaves. Every sibling must be used.
    function _topOf(Demand calldata asked, Target memory target, Opening calldata opening, uint256 leaves)
        private
        view
        returns (bytes32 top)
    {
        uint256 rest = leaves - asked.first;
        bytes32[] memory siblings = opening.siblings;
        uint256 used;
        (top, used) = Tree.climb(
            target.grid.hashes(asked.first, rest < asked.count ? rest : asked.count, opening.data),
            asked.first,
            leaves,
            siblings,
            0
        );
        if (asked.kind == LEAVES) {
            (top, used) = Tree.climb(_one(bytes.concat(top)), asked.tensor, target.tensors, siblings, used);
        }
        if (used != siblings.length) revert Tree.ProofLength(used, siblings.length);
    }

    /// @return root of the tree that the record names
    /// @return rows of its table: prompt tokens, output tokens or positions
    function _record(Demand calldata asked, Job memory job, Opening calldata opening)
        private
        view
        returns (bytes32 root, uint256 rows)
    {
        bytes memory record = opening.data;
        uint256 size;
        bytes32 committed;
        if (asked.kind == PROMPT) {
            (size, committed) = (REQUEST_BYTES, job.requestsRoot);
            (root, rows) = (Records.promptRoot(record), Records.promptCount(record));
        } else if (asked.kind == OUTPUT) {
            size = Records.OUTPUT_BYTES;
            (committed,) = escrow.outputs(asked.job);
            (root, rows) = (Records.tokensRoot(record), Records.count(record));
        } else {
            (size, committed) = (Records.TRACE_NODE_BYTES, escrow.root(asked.job, asked.stage));
            (root, rows) = (Records.tensorsRoot(record), Records.positions(record));
        }
        if (record.length != size) revert DataLength(size, record.length);
        if (Records.index(record) != asked.request) revert WrongRecord(asked.request, Records.index(record));
        bytes32 actual = Tree.rootOfRange(_one(record), asked.request, job.requests, opening.siblings);
        if (actual != committed) revert RootMismatch(committed, actual);
    }

    /// @dev The hash of a single leaf, as a list.
    function _one(bytes memory leaf) private pure returns (bytes32[] memory hashes) {
        hashes = new bytes32[](1);
        hashes[0] = Tree.leaf(leaf);
    }

    // ---- state and money

    function _requireState(bytes32 id, Demanded calldata demanded) private view {
        if (_slots[id] != keccak256(abi.encode(demanded))) revert WrongState(id);
    }

    function _end(bytes32 id, Demanded calldata demanded, uint256 gasRate) private {
        Queue storage queue = _queues[demanded.demand.job][demanded.demand.stage];
        _slots[id] = ENDED;
        queue.open -= 1;
        queue.gas -= uint128(demanded.pay / gasRate);
    }

    /// @dev Answers move the window so that games can follow; were demands to follow as well, there would be no end.
    function _requireOpen(bytes32 job, uint64 windowEnd) private {
        uint64 closes = _closes[job];
        if (closes == 0) {
            // INVARIANT: an answer alone moves the window, and none comes before the first demand.
            _closes[job] = windowEnd;
        } else if (block.timestamp > closes) {
            revert TooLate(closes);
        }
    }

    function _credit(address account, uint256 amount, bytes32 id) private {
        credit[account] += amount;
        emit Credited(account, amount, id);
    }
}
