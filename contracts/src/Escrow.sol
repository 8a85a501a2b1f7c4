// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";

import {Acceptance, Brief, Claim, Consent, IEscrow, Job, Status} from "./interfaces/IEscrow.sol";
import {IWorkers, Stage} from "./interfaces/IWorkers.sol";
import {Counts} from "./game/Counts.sol";
import {_all, _bit, _contains} from "./game/Sets.sol";
import {Terms} from "./game/Terms.sol";
import {MAX_WINNERS, Winner, Winners} from "./game/Winners.sol";

/// @title See IEscrow
/// @dev Over 500 lines: a job's whole life, so that "a job ends exactly once" is read in one file.
/// SAFETY: besides the token, the only outside calls go to Workers, which calls nobody but the token; state is written first all the same.
contract Escrow is IEscrow, EIP712 {
    using SafeERC20 for IERC20;
    using Counts for uint64;

    bytes32 public constant ACCEPT_TYPEHASH = keccak256("Accept(bytes32 job,uint8 stage,bytes32 model)");
    bytes32 public constant MOVE_TYPEHASH = keccak256("Move(bytes32 job,bytes32 from,bytes32 pipeline,uint64 until)");
    bytes32 public constant COMMIT_TYPEHASH = keccak256(
        "Commit(bytes32 job,bytes32 pipeline,uint8 stage,bytes32 model,bytes32 root,bytes32 outputs,uint64 tokens)"
    );

    /// @notice Gas that a job's lock must cover besides its price.
    // Rationale: twice and more what the dearest game takes (docs/protocol.md, "What a game costs").
    uint256 public constant GAME_GAS = 2_000_000;
    /// @notice Gas of having one byte of a withheld history posted, price of the demand included (Demands: 5/4 of 506,000 + 40 a byte, for 64 KB).
    uint256 public constant HISTORY_GAS = 60;
    /// @notice A lock must be worth so often the posting of one layer's k and v.
    // Rationale: whoever convicts alone gets at least a quarter of the lock, so a demander of all that ATTEND reads ends no poorer, but
    // where rows of k are narrower than a leaf or the history is short (docs/protocol.md, "A job's life").
    uint256 public constant HISTORY_LOCKS = 4;
    uint256 public constant NO_SHOW_BPS = 100;
    address public constant BURN_ADDRESS = 0x000000000000000000000000000000000000dEaD;
    uint8 private constant NOBODY = 255;
    uint256 private constant BPS = 10_000;

    IERC20 public immutable token;
    IWorkers public immutable workers;
    address public immutable disputes;
    address public immutable demands;

    struct Record {
        // One slot: all that a conviction writes of the job.
        address requester;
        Status status;
        uint8 stages; // how many
        uint64 openGames; // see Counts
        bool refunded; // of a void job: the price was credited
        uint16 openDemands; // against all stages
        uint40 windowEnd; // 0 until committed; an answered demand may move it
        // Sets of stages, bit i for stage i.
        uint64 lockedSet; // INVARIANT: the bit is set exactly while the stage's lock is held in Workers for this job
        uint64 committedSet;
        uint64 tokens;
        bytes32 outputs;
        Job job;
        mapping(uint256 stage => bytes32) roots;
        mapping(uint256 stage => Winner[MAX_WINNERS]) winners; // from the front; an empty place has no challenger
    }

    mapping(bytes32 id => Record) private _records;
    /// @inheritdoc IEscrow
    mapping(address account => uint256) public credit;

    modifier onlyDisputes() {
        if (msg.sender != disputes) revert NotDisputes(msg.sender);
        _;
    }

    modifier onlyDemands() {
        if (msg.sender != demands) revert NotDemands(msg.sender);
        _;
    }

    constructor(IERC20 token_, IWorkers workers_, address disputes_, address demands_) EIP712("Plumb", "1") {
        token = token_;
        workers = workers_;
        disputes = disputes_;
        demands = demands_;
    }

    // ---- a job's life ----

    /// @inheritdoc IEscrow
    function open(Job calldata job_) external returns (bytes32 id) {
        uint256 maximum = Terms.requireValid(job_);
        id = keccak256(abi.encode(block.chainid, address(this), msg.sender, job_));
        Record storage record = _records[id];
        if (record.status != Status.None) revert JobExists(id);
        bytes32 model = workers.pipelineModel(job_.pipeline);
        if (model == 0) revert InvalidJob("pipeline");
        if (model != job_.model) revert InvalidJob("model");
        if (job_.lock < leastLock(job_)) revert InvalidJob("lock");

        record.requester = msg.sender;
        record.status = Status.Open;
        // Workers admits at most 64 stages, so the sets above have room for them.
        record.stages = uint8(workers.pipelineStages(job_.pipeline).length);
        record.job = job_;
        emit JobOpened(id, msg.sender, job_.pipeline, job_);

        token.safeTransferFrom(msg.sender, address(this), maximum);
    }

    /// @inheritdoc IEscrow
    /// @dev A repeated call on a job that got on in the meantime changes nothing, so that nobody can make an honest one revert.
    function accept(bytes32 id, Acceptance[] calldata acceptances) external {
        Record storage record = _records[id];
        Status actual = record.status;
        if (actual == Status.Accepted || actual == Status.Committed) return;
        if (actual != Status.Open) revert WrongStatus(id, Status.Open, actual);
        if (block.timestamp > record.job.acceptBy) revert TooLate(record.job.acceptBy);
        uint256 count = record.stages;
        // More entries than stages: one of them is there twice.
        if (acceptances.length > count) revert AlreadyDone(acceptances[count].stage);

        uint64 locked = record.lockedSet;
        for (uint256 i; i < acceptances.length; ++i) {
            uint8 stage = acceptances[i].stage;
            if (stage >= count) revert UnknownStage(stage);
            if (_contains(locked, stage)) continue;
            locked |= _bit(stage);
            record.lockedSet = locked;
            _acceptStage(id, record.job, acceptances[i]);
        }
        if (locked == _all(count)) {
            record.status = Status.Accepted;
            emit JobAccepted(id);
        }
    }

    /// @inheritdoc IEscrow
    /// @dev As `accept`, a repeated call changes nothing.
    /// SAFETY: whoever leaves has signed that too. A claim rests on what the stage before signed: where one was made, nobody leaves.
    function move(bytes32 id, bytes32 pipeline, Consent[] calldata consents) external {
        Record storage record = _records[id];
        bytes32 before = record.job.pipeline;
        if (pipeline == before) return;
        if (record.status != Status.Accepted) revert WrongStatus(id, Status.Accepted, record.status);
        if (block.timestamp > record.job.commitBy) revert TooLate(record.job.commitBy);
        if (record.committedSet != 0) revert AlreadyCommitted(id);
        if (workers.pipelineModel(pipeline) != record.job.model) revert InvalidJob("pipeline");
        Stage[] memory from = workers.pipelineStages(before);
        Stage[] memory to = workers.pipelineStages(pipeline);
        if (to.length != from.length) revert InvalidJob("stages");

        record.job.pipeline = pipeline;
        emit JobMoved(id, pipeline);
        uint256 used = from.length; // consents of those who come follow those of all who were there
        for (uint8 i; i < from.length; ++i) {
            _requireConsent(id, before, pipeline, from[i].worker, i, consents, i);
            if (to[i].worker == from[i].worker) continue;
            _requireConsent(id, before, pipeline, to[i].worker, i, consents, used++);
            emit StageAccepted(id, i, to[i].worker);
            workers.unlock(from[i].worker, record.job.lock);
            workers.lock(to[i].worker, record.job.lock);
        }
    }

    /// @inheritdoc IEscrow
    /// @dev As `accept`, a repeated call changes nothing.
    function commit(bytes32 id, Claim[] calldata claims) external {
        Record storage record = _records[id];
        Status actual = record.status;
        if (actual == Status.Committed) return;
        if (actual != Status.Accepted) revert WrongStatus(id, Status.Accepted, actual);
        if (block.timestamp > record.job.commitBy) revert TooLate(record.job.commitBy);
        uint256 count = record.stages;
        if (claims.length > count) revert AlreadyDone(claims[count].stage);

        uint64 committed = record.committedSet;
        for (uint256 i; i < claims.length; ++i) {
            uint8 stage = claims[i].stage;
            if (stage >= count) revert UnknownStage(stage);
            if (_contains(committed, stage)) continue;
            committed |= _bit(stage);
            _commitStage(id, record, claims[i]);
        }
        record.committedSet = committed;
        if (committed == _all(count)) {
            uint40 end = uint40(block.timestamp) + record.job.window;
            record.status = Status.Committed;
            record.windowEnd = end;
            emit JobCommitted(id, record.outputs, record.tokens, end);
        }
    }

    /// @inheritdoc IEscrow
    function settle(bytes32 id) external {
        Record storage record = _records[id];
        if (record.status != Status.Committed) revert WrongStatus(id, Status.Committed, record.status);
        _requireWindowOver(record);

        record.status = Status.Paid;
        record.lockedSet = 0;
        Stage[] memory stages = workers.pipelineStages(record.job.pipeline);
        uint256 price = _price(record);
        uint256 paid;
        for (uint256 i; i < stages.length; ++i) {
            uint256 pay = _payDown(price, stages[i]);
            paid += pay;
            _credit(stages[i].worker, pay, id);
        }
        // What the shares round off, less than one base unit a stage, returns as well.
        uint256 returned = Terms.maximumPriceOf(record.job) - paid;
        _credit(record.requester, returned, id);
        emit JobPaid(id, paid, returned);

        uint256 lock = record.job.lock;
        for (uint256 i; i < stages.length; ++i) {
            workers.unlock(stages[i].worker, lock);
        }
    }

    /// @inheritdoc IEscrow
    function expire(bytes32 id) external {
        Record storage record = _records[id];
        Status actual = record.status;
        if (actual != Status.Open && actual != Status.Accepted) revert WrongStatus(id, Status.Open, actual);
        uint64 deadline = actual == Status.Open ? record.job.acceptBy : record.job.commitBy;
        if (block.timestamp <= deadline) revert TooEarly(deadline + 1);

        uint64 locked = record.lockedSet;
        record.status = Status.Refunded;
        record.lockedSet = 0;
        uint256 price = Terms.maximumPriceOf(record.job);
        uint256 fee;
        uint256 broken = NOBODY; // the first stage without a root
        if (actual == Status.Accepted) {
            fee = price * NO_SHOW_BPS / BPS;
            broken = 0;
            while (_contains(record.committedSet, broken)) ++broken; // at most 63 times: a full set is status Committed
        }
        _credit(record.requester, price, id);
        emit JobRefunded(id, price, fee);

        Stage[] memory stages = workers.pipelineStages(record.job.pipeline);
        uint256 lock = record.job.lock;
        for (uint256 i; i < stages.length; ++i) {
            if (!_contains(locked, i)) continue;
            // The chain can't see whether the sender or the receiver broke the hand-off. Stage 0 has no sender.
            uint256 part;
            if (i == broken) part = i == 0 ? fee : fee - fee / 2;
            else if (i + 1 == broken) part = fee / 2;
            if (part != 0) workers.slash(stages[i].worker, part);
            // A lock is at least twice the price, so the fee never eats it up.
            workers.unlock(stages[i].worker, lock - part);
        }
        // SAFETY: burned. Were it the requester's, it and one stage that gives up could take it from the honest stage that is charged.
        if (fee != 0) token.safeTransfer(BURN_ADDRESS, fee);
    }

    /// @inheritdoc IEscrow
    /// @dev Rationale: at the conviction it would cost the winner of the game a slot of somebody else's.
    function refund(bytes32 id) external {
        Record storage record = _records[id];
        if (record.status != Status.Void) revert WrongStatus(id, Status.Void, record.status);
        _refund(id, record);
    }

    /// @inheritdoc IEscrow
    /// @dev Reverts with AlreadyDone(255) if the job was released before.
    function release(bytes32 id) external {
        Record storage record = _records[id];
        if (record.status != Status.Void) revert WrongStatus(id, Status.Void, record.status);
        if (record.lockedSet == 0) revert AlreadyDone(NOBODY);
        _requireWindowOver(record);

        record.lockedSet = 0;
        _refund(id, record);
        Stage[] memory stages = workers.pipelineStages(record.job.pipeline);
        uint64 guilty = _guilty(record);
        uint256 price = _price(record);
        uint256 owed; // to the stages without a conviction
        for (uint256 i; i < stages.length; ++i) {
            if (_contains(guilty, i)) continue;
            uint256 pay = _payDown(price, stages[i]);
            owed += pay;
            _credit(stages[i].worker, pay, id);
        }
        uint256 burned;
        for (uint256 i; i < stages.length; ++i) {
            if (!_contains(guilty, i)) continue;
            // INVARIANT: a lock covers the whole price twice, so `owed` is 0 after the first convicted stage.
            uint256 toStages = owed < record.job.lock ? owed : record.job.lock;
            owed -= toStages;
            burned += _slashed(id, record, uint8(i), toStages);
        }
        emit JobReleased(id);

        uint256 lock = record.job.lock;
        for (uint256 i; i < stages.length; ++i) {
            if (_contains(guilty, i)) workers.slash(stages[i].worker, lock);
            else workers.unlock(stages[i].worker, lock);
        }
        token.safeTransfer(BURN_ADDRESS, burned);
    }

    /// @inheritdoc IEscrow
    function withdraw() external {
        uint256 amount = credit[msg.sender];
        if (amount == 0) revert NothingToWithdraw();

        credit[msg.sender] = 0;
        emit Withdrawn(msg.sender, amount);

        token.safeTransfer(msg.sender, amount);
    }

    // ---- games ----

    /// @inheritdoc IEscrow
    function gameOpened(bytes32 id, uint8 stage) external onlyDisputes returns (uint256 alreadyOpen) {
        Record storage record = _records[id];
        _requireInWindow(id, record, stage);

        alreadyOpen = record.openGames.against(stage);
        record.openGames = record.openGames.opened(stage);
    }

    /// @inheritdoc IEscrow
    function gameClosed(bytes32 id, uint8 stage, uint8 guilty, address challenger, uint64 committedAt, uint256 gasUnits)
        external
        onlyDisputes
    {
        Record storage record = _records[id];
        if (guilty != NOBODY && guilty >= record.stages) revert UnknownStage(guilty);

        // INVARIANT: a job with an open game is Committed or Void: settle and release wait for all of them. A game that was never opened
        // is refused.
        record.openGames = record.openGames.closed(stage);
        if (guilty != NOBODY) _convict(id, record, guilty, Winner(challenger, committedAt, _units(gasUnits)));
    }

    // ---- demands ----

    /// @inheritdoc IEscrow
    function demandOpened(bytes32 id, uint8 stage) external onlyDemands returns (uint64 end) {
        Record storage record = _records[id];
        _requireInWindow(id, record, stage);
        end = record.windowEnd;

        // Checked: the price of a demand doubles with what is queued, so 2^16 can't be paid for.
        record.openDemands += 1;
    }

    /// @inheritdoc IEscrow
    function demandClosed(bytes32 id, uint8 stage, bool silent, address demander, uint64 openedAt, uint256 gasUnits)
        external
        onlyDemands
    {
        Record storage record = _records[id];

        // INVARIANT: as in gameClosed, the job is Committed or Void, and the demand was opened.
        record.openDemands -= 1;
        if (silent) {
            _convict(id, record, stage, Winner(demander, openedAt, _units(gasUnits)));
            return;
        }
        // What was posted in the last second must still be of use: there is time to challenge it.
        uint40 end = uint40(block.timestamp) + record.job.clock;
        if (end > record.windowEnd) record.windowEnd = end;
    }

    // ---- views ----

    /// @inheritdoc IEscrow
    function job(bytes32 id) external view returns (Job memory) {
        return _records[id].job;
    }

    /// @inheritdoc IEscrow
    function brief(bytes32 id, uint8 stage) external view returns (Brief memory) {
        Job storage job_ = _records[id].job;
        return Brief({
            model: job_.model,
            pipeline: job_.pipeline,
            root: _records[id].roots[stage],
            gasRate: job_.gasRate,
            requests: job_.requests,
            clock: job_.clock,
            grace: job_.grace
        });
    }

    /// @inheritdoc IEscrow
    function requester(bytes32 id) external view returns (address) {
        return _records[id].requester;
    }

    /// @inheritdoc IEscrow
    function status(bytes32 id) external view returns (Status) {
        return _records[id].status;
    }

    /// @inheritdoc IEscrow
    function root(bytes32 id, uint8 stage) external view returns (bytes32) {
        return _records[id].roots[stage];
    }

    /// @inheritdoc IEscrow
    function outputs(bytes32 id) external view returns (bytes32 outputsRoot, uint64 tokens) {
        return (_records[id].outputs, _records[id].tokens);
    }

    /// @inheritdoc IEscrow
    function windowEnd(bytes32 id) external view returns (uint64) {
        return _records[id].windowEnd;
    }

    /// @inheritdoc IEscrow
    function openGames(bytes32 id, uint8 stage) external view returns (uint256) {
        return _records[id].openGames.against(stage);
    }

    /// @inheritdoc IEscrow
    function convicted(bytes32 id, uint8 stage) external view returns (bool) {
        return _records[id].winners[stage][0].challenger != address(0);
    }

    /// @inheritdoc IEscrow
    function refunded(bytes32 id) external view returns (bool) {
        return _records[id].refunded;
    }

    /// @inheritdoc IEscrow
    function leastLock(Job calldata job_) public view returns (uint256 least) {
        least = 2 * (Terms.maximumPrice(job_) + GAME_GAS * job_.gasRate);
        (uint256 rowBytes, uint256 positions) = workers.models().history(job_.model);
        uint256 tokens = uint256(job_.promptTokens) + job_.maxTokens;
        if (tokens < positions) positions = tokens;
        uint256 history = HISTORY_LOCKS * HISTORY_GAS * rowBytes * positions * job_.gasRate;
        if (history > least) least = history;
    }

    /// @notice Whether `stage` has accepted and its lock is still held for this job.
    function lockHeld(bytes32 id, uint8 stage) external view returns (bool) {
        return _contains(_records[id].lockedSet, stage);
    }

    /// @notice The remembered winners against `stage`, in no particular order.
    function winners(bytes32 id, uint8 stage) external view returns (Winner[] memory) {
        return Winners.list(_records[id].winners[stage]);
    }

    // ---- one stage ----

    function _acceptStage(bytes32 id, Job storage job_, Acceptance calldata acceptance) private {
        uint8 stage = acceptance.stage;
        address account = workers.pipelineStage(job_.pipeline, stage).worker;
        bytes32 structHash = keccak256(abi.encode(ACCEPT_TYPEHASH, id, stage, job_.model));
        _requireSigned(account, stage, structHash, acceptance.signature);

        emit StageAccepted(id, stage, account);
        workers.lock(account, job_.lock);
    }

    function _commitStage(bytes32 id, Record storage record, Claim calldata claim) private {
        uint8 stage = claim.stage;
        if (claim.root == 0) revert InvalidJob("root");
        bool last = stage + 1 == record.stages;
        if (last) {
            if (claim.outputs == 0) revert InvalidJob("outputs");
            if (claim.tokens > record.job.maxTokens) revert TooManyTokens(claim.tokens, record.job.maxTokens);
        } else if (claim.outputs != 0 || claim.tokens != 0) {
            revert OutputsFromWrongStage(stage);
        }
        Job storage job_ = record.job;
        bytes32 structHash = keccak256(
            abi.encode(COMMIT_TYPEHASH, id, job_.pipeline, stage, job_.model, claim.root, claim.outputs, claim.tokens)
        );
        _requireSigned(workers.pipelineStage(record.job.pipeline, stage).worker, stage, structHash, claim.signature);

        record.roots[stage] = claim.root;
        if (last) {
            record.outputs = claim.outputs;
            record.tokens = claim.tokens;
        }
        emit StageCommitted(id, stage, claim.root);
    }

    function _convict(bytes32 id, Record storage record, uint8 guilty, Winner memory winner) private {
        Winners.remember(record.winners[guilty], winner);
        emit StageConvicted(id, guilty, winner.challenger);
        if (record.status == Status.Committed) {
            record.status = Status.Void;
            emit JobVoided(id);
        }
    }

    /// @dev A stage is convicted from its first winner on.
    function _guilty(Record storage record) private view returns (uint64 guilty) {
        for (uint256 i; i < record.stages; ++i) {
            if (record.winners[i][0].challenger != address(0)) guilty |= _bit(i);
        }
    }

    // ---- money ----

    /// @dev The price of a void job, once.
    function _refund(bytes32 id, Record storage record) private {
        if (record.refunded) return;
        record.refunded = true;
        _credit(record.requester, Terms.maximumPriceOf(record.job), id);
    }

    function _units(uint256 gasUnits) private pure returns (uint32) {
        return gasUnits < type(uint32).max ? uint32(gasUnits) : type(uint32).max;
    }

    /// @dev Credits the winners against a convicted stage from what its lock holds beyond `toStages`; returns what is burned.
    /// SAFETY: a cheat may convict itself through friends to save its lock. The scheduled gas is therefore paid, oldest commitment first, out of
    /// at most half of what is left, and half of the rest burns: a quarter of it is lost whoever wins.
    function _slashed(bytes32 id, Record storage record, uint8 stage, uint256 toStages)
        private
        returns (uint256 burned)
    {
        Winner[] memory list = Winners.list(record.winners[stage]);
        Winners.sortOldestFirst(list);
        uint256 rest = record.job.lock - toStages;
        uint256 gasLeft = rest / 2;
        uint256 toOldest;
        for (uint256 i; i < list.length; ++i) {
            uint256 amount = uint256(list[i].gasUnits) * record.job.gasRate;
            if (amount > gasLeft) amount = gasLeft;
            gasLeft -= amount;
            if (i == 0) toOldest = amount;
            else _credit(list[i].challenger, amount, id);
        }
        uint256 toGas = rest / 2 - gasLeft;
        rest -= toGas;
        uint256 toChallenger = rest / 2;
        burned = rest - toChallenger;
        _credit(list[0].challenger, toOldest + toChallenger, id);
        emit StageSlashed(id, stage, toStages, toGas, burned, toChallenger);
    }

    function _credit(address account, uint256 amount, bytes32 id) private {
        if (amount == 0) return;
        credit[account] += amount;
        emit Credited(account, amount, id);
    }

    function _price(Record storage record) private view returns (uint256) {
        return
            uint256(record.job.promptPrice) * record.job.promptTokens + uint256(record.job.tokenPrice) * record.tokens;
    }

    function _payDown(uint256 price, Stage memory stage) private pure returns (uint256) {
        return price * stage.shareBps / BPS;
    }

    // ---- rules ----

    function _requireSigned(address account, uint8 stage, bytes32 structHash, bytes calldata signature) private view {
        (address signer,,) = ECDSA.tryRecoverCalldata(_hashTypedDataV4(structHash), signature);
        // A registered signer is never zero, so a failed recovery never matches.
        if (signer != workers.signerOf(account)) revert BadSignature(stage);
    }

    function _requireConsent(
        bytes32 id,
        bytes32 before,
        bytes32 pipeline,
        address account,
        uint8 stage,
        Consent[] calldata consents,
        uint256 index
    ) private view {
        if (index >= consents.length) revert BadSignature(stage);
        uint64 until = consents[index].until;
        if (block.timestamp > until) revert TooLate(until);
        bytes32 structHash = keccak256(abi.encode(MOVE_TYPEHASH, id, before, pipeline, until));
        _requireSigned(account, stage, structHash, consents[index].signature);
    }

    function _requireInWindow(bytes32 id, Record storage record, uint8 stage) private view {
        Status actual = record.status;
        if (actual != Status.Committed && actual != Status.Void) revert WrongStatus(id, Status.Committed, actual);
        if (block.timestamp > record.windowEnd) revert TooLate(record.windowEnd);
        if (stage >= record.stages) revert UnknownStage(stage);
    }

    function _requireWindowOver(Record storage record) private view {
        if (block.timestamp <= record.windowEnd) revert TooEarly(record.windowEnd + 1);
        uint256 waiting = record.openGames.total() + record.openDemands;
        if (waiting != 0) revert GamesOpen(waiting);
    }
}
