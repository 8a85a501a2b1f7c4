// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";

import {IModels} from "./interfaces/IModels.sol";
import {IWorkers, Stage, Worker} from "./interfaces/IWorkers.sol";

/// @title See IWorkers
contract Workers is IWorkers, EIP712 {
    using SafeERC20 for IERC20;

    bytes32 public constant JOIN_TYPEHASH = keccak256("Join(bytes32 pipeline)");
    uint256 public constant MAX_STAGES = 64;
    uint256 public constant MAX_URL_BYTES = 200;
    uint256 private constant ALL_SHARES_BPS = 10_000;

    IERC20 public immutable token;
    /// @inheritdoc IWorkers
    IModels public immutable models;
    address public immutable escrow;
    /// @notice Seconds between the request and the withdrawal of stake.
    uint32 public immutable withdrawalDelay;

    /// @notice One worker's stake. INVARIANT: the balance of this contract covers the sum of free, locked and leaving over all accounts.
    struct Stake {
        uint256 free;
        uint256 locked;
        uint256 leaving; // requested back: neither free nor locked
        uint64 availableAt; // when `leaving` may be withdrawn; 0 if nothing is leaving
    }

    mapping(address account => Worker) private _workers;
    mapping(address account => Stake) private _stakes;
    mapping(bytes32 id => Stage[]) private _stages;
    /// @inheritdoc IWorkers
    mapping(bytes32 id => bytes32) public pipelineModel;

    modifier onlyEscrow() {
        if (msg.sender != escrow) revert NotEscrow(msg.sender);
        _;
    }

    constructor(IERC20 token_, IModels models_, address escrow_, uint32 withdrawalDelay_) EIP712("Plumb", "1") {
        token = token_;
        models = models_;
        escrow = escrow_;
        withdrawalDelay = withdrawalDelay_;
    }

    /// @inheritdoc IWorkers
    function register(Worker calldata worker_) external {
        uint256 urlBytes = bytes(worker_.url).length;
        if (worker_.signer == address(0)) revert InvalidWorker("signer");
        if (worker_.tls == 0) revert InvalidWorker("tls");
        if (urlBytes == 0) revert InvalidWorker("url");
        if (urlBytes > MAX_URL_BYTES) revert UrlTooLong(urlBytes);
        // SAFETY: a hand-off is proved against the signer on chain. Were a key replaced while a job runs, its owner could disown what it
        // had signed and have an honest neighbour convicted.
        if (worker_.signer != _workers[msg.sender].signer && _stakes[msg.sender].locked != 0) {
            revert InvalidWorker("signer changed while stake is locked");
        }

        _workers[msg.sender] = worker_;
        emit WorkerRegistered(msg.sender, worker_.signer, worker_.tls, worker_.url);
    }

    /// @inheritdoc IWorkers
    function stake(uint256 amount) external {
        _requireRegistered(msg.sender);

        _stakes[msg.sender].free += amount;
        emit StakeAdded(msg.sender, amount);

        token.safeTransferFrom(msg.sender, address(this), amount);
    }

    /// @inheritdoc IWorkers
    /// @dev Stake on its way out backs no new lock. A new request replaces the earlier one and restarts the delay; an amount of 0 cancels it.
    function requestWithdrawal(uint256 amount) external {
        Stake storage held = _stakes[msg.sender];
        uint256 free = held.free + held.leaving;
        if (amount > free) revert InsufficientStake(msg.sender, free, amount);

        uint64 availableAt = amount == 0 ? 0 : uint64(block.timestamp) + withdrawalDelay;
        held.free = free - amount;
        held.leaving = amount;
        held.availableAt = availableAt;
        emit WithdrawalRequested(msg.sender, amount, availableAt);
    }

    /// @inheritdoc IWorkers
    /// @dev Reverts with availableAt = 0 if nothing was requested.
    function withdraw() external {
        Stake storage held = _stakes[msg.sender];
        uint64 availableAt = held.availableAt;
        if (availableAt == 0 || block.timestamp < availableAt) revert WithdrawalNotReady(availableAt);

        uint256 amount = held.leaving;
        held.leaving = 0;
        held.availableAt = 0;
        emit StakeWithdrawn(msg.sender, amount);

        token.safeTransfer(msg.sender, amount);
    }

    /// @inheritdoc IWorkers
    function createPipeline(bytes32 model, Stage[] calldata stages, uint64 nonce, bytes[] calldata signatures)
        external
        returns (bytes32 id)
    {
        uint32 layers = models.layers(model);
        if (layers == 0) revert UnknownModel(model);
        _requirePartition(stages, layers);
        if (signatures.length != stages.length) revert BadSignature(signatures.length);
        id = keccak256(abi.encode(block.chainid, address(this), model, stages, nonce));
        if (pipelineModel[id] != 0) revert PipelineExists(id);
        bytes32 digest = _hashTypedDataV4(keccak256(abi.encode(JOIN_TYPEHASH, id)));
        for (uint256 i; i < stages.length; ++i) {
            _requireRegistered(stages[i].worker);
            (address signer,,) = ECDSA.tryRecoverCalldata(digest, signatures[i]);
            // A registered signer is never zero, so a failed recovery never matches.
            if (signer != _workers[stages[i].worker].signer) revert BadSignature(i);
        }

        pipelineModel[id] = model;
        for (uint256 i; i < stages.length; ++i) {
            _stages[id].push(stages[i]);
        }
        emit PipelineCreated(id, model, stages, nonce);
    }

    /// @inheritdoc IWorkers
    function lock(address account, uint256 amount) external onlyEscrow {
        Stake storage held = _stakes[account];
        uint256 free = held.free;
        if (amount > free) revert InsufficientStake(account, free, amount);

        // INVARIANT: locks are disjoint: what one job locks has left `free`, so no other job can count on it.
        held.free = free - amount;
        held.locked += amount;
        emit StakeLocked(account, amount);
    }

    /// @inheritdoc IWorkers
    function unlock(address account, uint256 amount) external onlyEscrow {
        Stake storage held = _stakes[account];
        held.locked -= amount;
        held.free += amount;
        emit StakeUnlocked(account, amount);
    }

    /// @inheritdoc IWorkers
    function slash(address account, uint256 amount) external onlyEscrow {
        _stakes[account].locked -= amount;
        emit StakeSlashed(account, amount);

        token.safeTransfer(escrow, amount);
    }

    /// @inheritdoc IWorkers
    function worker(address account) external view returns (Worker memory) {
        return _workers[account];
    }

    /// @inheritdoc IWorkers
    function signerOf(address account) external view returns (address) {
        return _workers[account].signer;
    }

    /// @inheritdoc IWorkers
    function freeStake(address account) external view returns (uint256) {
        return _stakes[account].free;
    }

    /// @inheritdoc IWorkers
    function lockedStake(address account) external view returns (uint256) {
        return _stakes[account].locked;
    }

    /// @notice Stake that was requested back, and when it may be withdrawn (0: nothing was).
    function withdrawalOf(address account) external view returns (uint256 amount, uint64 availableAt) {
        return (_stakes[account].leaving, _stakes[account].availableAt);
    }

    /// @inheritdoc IWorkers
    function pipelineStages(bytes32 id) external view returns (Stage[] memory) {
        return _stages[id];
    }

    /// @inheritdoc IWorkers
    function pipelineStage(bytes32 id, uint256 index) external view returns (Stage memory) {
        if (index >= _stages[id].length) revert UnknownStage(index);
        return _stages[id][index];
    }

    function _requireRegistered(address account) private view {
        if (_workers[account].signer == address(0)) revert NotRegistered(account);
    }

    /// @dev INVARIANT: every layer belongs to exactly one stage, so every segment has exactly one owner to accuse.
    function _requirePartition(Stage[] calldata stages, uint32 layers) private pure {
        if (stages.length == 0 || stages.length > MAX_STAGES) revert InvalidPartition(stages.length, 0, 0);
        uint32 next;
        uint256 shares;
        for (uint256 i; i < stages.length; ++i) {
            Stage calldata stage = stages[i];
            if (stage.firstLayer != next || stage.endLayer <= next) revert InvalidPartition(i, next, stage.firstLayer);
            next = stage.endLayer;
            shares += stage.shareBps;
        }
        if (next != layers) revert InvalidPartition(stages.length, layers, next);
        if (shares != ALL_SHARES_BPS) revert InvalidShares(shares);
    }
}
