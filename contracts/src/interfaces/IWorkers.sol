// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IModels} from "./IModels.sol";

struct Worker {
    address signer; // signs joins, acceptances, commitments and hand-offs; may also move in games
    bytes32 tls; // SHA-256 of the DER certificate
    string url; // http(s)://host:port, at most 200 bytes
}

struct Stage {
    address worker;
    uint32 firstLayer;
    uint32 endLayer;
    uint16 shareBps; // of the pay, in 1/10000
}

/// @title Stake, keys, addresses and pipelines of the workers
interface IWorkers {
    event WorkerRegistered(address indexed account, address signer, bytes32 tls, string url);
    event StakeAdded(address indexed account, uint256 amount);
    event WithdrawalRequested(address indexed account, uint256 amount, uint64 availableAt);
    event StakeWithdrawn(address indexed account, uint256 amount);
    event PipelineCreated(bytes32 indexed id, bytes32 indexed model, Stage[] stages, uint64 nonce);
    event StakeLocked(address indexed account, uint256 amount);
    event StakeUnlocked(address indexed account, uint256 amount);
    event StakeSlashed(address indexed account, uint256 amount);

    error NotRegistered(address account);
    error UrlTooLong(uint256 length);
    error InvalidWorker(string what);
    error InsufficientStake(address account, uint256 free, uint256 needed);
    error WithdrawalNotReady(uint64 availableAt);
    error NotEscrow(address sender);
    error UnknownModel(bytes32 model);
    error InvalidPartition(uint256 stage, uint32 expectedFirst, uint32 firstLayer);
    error InvalidShares(uint256 total);
    error BadSignature(uint256 stage);
    error PipelineExists(bytes32 id);
    error UnknownStage(uint256 index);

    function register(Worker calldata worker) external;
    function stake(uint256 amount) external;
    function requestWithdrawal(uint256 amount) external;
    function withdraw() external;

    /// @notice Creates a pipeline: contiguous layer ranges from 0 to the model's layers, at most 64 stages, shares that sum to 10000, one `Join` signature a stage.
    function createPipeline(bytes32 model, Stage[] calldata stages, uint64 nonce, bytes[] calldata signatures)
        external
        returns (bytes32 id);

    /// @notice Escrow only.
    function lock(address account, uint256 amount) external;
    function unlock(address account, uint256 amount) external;
    /// @notice Escrow only. Sends `amount` of locked stake to Escrow.
    function slash(address account, uint256 amount) external;

    function models() external view returns (IModels);
    function worker(address account) external view returns (Worker memory);
    function signerOf(address account) external view returns (address);
    function freeStake(address account) external view returns (uint256);
    function lockedStake(address account) external view returns (uint256);
    function pipelineModel(bytes32 id) external view returns (bytes32);
    function pipelineStages(bytes32 id) external view returns (Stage[] memory);
    function pipelineStage(bytes32 id, uint256 index) external view returns (Stage memory);
}
