// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Brief, Job} from "../../../contracts/src/interfaces/IEscrow.sol";
import {Cell, Proof} from "../../../contracts/src/interfaces/IReferee.sol";
import {IWorkers, Stage} from "../../../contracts/src/interfaces/IWorkers.sol";

/// @title What Disputes asks of Escrow, with answers that a test sets
contract EscrowMock {
    Job private _job;
    mapping(uint8 stage => bytes32) public roots;
    mapping(uint8 stage => uint256) public games;
    bytes32 public outputsRoot;
    uint64 public tokens;

    // The last gameClosed.
    uint256 public closed;
    uint8 public convicted;
    address public challenger;
    uint64 public committedAt;
    uint256 public gasUnits;

    function setJob(Job calldata job_) external {
        _job = job_;
    }

    function setRoot(uint8 stage, bytes32 root_) external {
        roots[stage] = root_;
    }

    function setGames(uint8 stage, uint256 open) external {
        games[stage] = open;
    }

    function gameOpened(bytes32, uint8 stage) external returns (uint256 alreadyOpen) {
        alreadyOpen = games[stage]++;
    }

    function gameClosed(
        bytes32,
        uint8 stage,
        uint8 convicted_,
        address challenger_,
        uint64 committedAt_,
        uint256 gasUnits_
    ) external {
        games[stage]--;
        closed++;
        convicted = convicted_;
        challenger = challenger_;
        committedAt = committedAt_;
        gasUnits = gasUnits_;
    }

    function job(bytes32) external view returns (Job memory) {
        return _job;
    }

    function brief(bytes32, uint8 stage) external view returns (Brief memory) {
        return Brief(_job.model, _job.pipeline, roots[stage], _job.gasRate, _job.requests, _job.clock, _job.grace);
    }

    function root(bytes32, uint8 stage) external view returns (bytes32) {
        return roots[stage];
    }

    function openGames(bytes32, uint8 stage) external view returns (uint256) {
        return games[stage];
    }

    function outputs(bytes32) external view returns (bytes32, uint64) {
        return (outputsRoot, tokens);
    }
}

/// @title One pipeline, the same under every id
contract WorkersMock {
    Stage[] private _stages;
    mapping(address account => address) public signerOf;

    function add(Stage calldata stage, address signer) external {
        _stages.push(stage);
        signerOf[stage.worker] = signer;
    }

    function pipelineStage(bytes32, uint256 index) external view returns (Stage memory) {
        if (index >= _stages.length) revert IWorkers.UnknownStage(index);
        return _stages[index];
    }

    function pipelineStages(bytes32) external view returns (Stage[] memory) {
        return _stages;
    }
}

/// @title A referee that finds what a test tells it
contract RefereeMock {
    int256 public answer;

    function set(int256 answer_) external {
        answer = answer_;
    }

    function judge(Cell calldata, uint64, uint32, Proof calldata) external view returns (int256) {
        return answer;
    }

    function finish(uint8, int256 total, uint64) external pure returns (int256) {
        return total;
    }
}
