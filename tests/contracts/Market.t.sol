// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";

import {Escrow} from "../../contracts/src/Escrow.sol";
import {Models} from "../../contracts/src/Models.sol";
import {Workers} from "../../contracts/src/Workers.sol";
import {Token} from "../../contracts/src/dev/Token.sol";
import {Acceptance, Claim, Job} from "../../contracts/src/interfaces/IEscrow.sol";
import {IModels} from "../../contracts/src/interfaces/IModels.sol";
import {Model} from "../../contracts/src/interfaces/IReferee.sol";
import {IWorkers, Stage, Worker} from "../../contracts/src/interfaces/IWorkers.sol";
import {Base} from "./Base.t.sol";

/// @title Deployed contracts, a pipeline of staked workers and a funded requester. The test itself plays Disputes.
abstract contract Market is Base {
    uint256 internal constant STAKE = 1e30;
    uint256 internal constant FUNDS = 1e30;
    uint32 internal constant DELAY_SECONDS = 1 days;
    uint64 internal constant START = 1_800_000_000;
    address internal constant REQUESTER = address(0xA11CE);
    uint32 internal constant LAYERS = 64;
    address internal constant BURN = 0x000000000000000000000000000000000000dEaD;

    Token internal token;
    Models internal models;
    Workers internal workers;
    Escrow internal escrow;
    bytes32 internal modelId;
    mapping(bytes32 => bytes32) internal pipelineOf; // by job; kept here because a call would use up an expected revert

    /// @param disputes who may open and close games, and demands
    function _deploy(address disputes) internal {
        _deploy(disputes, disputes);
    }

    /// @param demands who may open and close demands
    function _deploy(address disputes, address demands) internal {
        vm.warp(START);
        token = new Token();
        models = new Models();
        // Workers and Escrow name each other: Escrow's address follows from the deployer and its fourth nonce.
        address predicted = address(uint160(uint256(keccak256(abi.encodePacked(hex"d694", address(this), hex"04")))));
        workers = new Workers(IERC20(token), IModels(models), predicted, DELAY_SECONDS);
        escrow = new Escrow(IERC20(token), IWorkers(workers), disputes, demands);
        assertEq(address(escrow), predicted, "address of the escrow");
        modelId = models.register(_model());
        token.mint(REQUESTER, FUNDS);
        vm.prank(REQUESTER);
        token.approve(address(escrow), type(uint256).max);
    }

    function _model() internal pure virtual returns (Model memory) {
        return Model({
            weightsRoot: bytes32(uint256(1)),
            weightsLeaves: 1,
            programRoot: bytes32(uint256(2)),
            programLeaves: 1,
            profileRoot: bytes32(uint256(3)),
            profileLeaves: 1,
            layers: LAYERS,
            hidden: 64,
            queryWidth: 64,
            kvWidth: 32,
            vocabulary: 100,
            maxPositions: 128,
            weightDtype: 0,
            servedDtype: 0
        });
    }

    function _key(uint256 i) internal pure returns (uint256) {
        return 0xBEEF + i;
    }

    function _account(uint256 i) internal pure returns (address) {
        return address(uint160(0xC0FFEE00 + i));
    }

    function _worker(uint256 i) internal pure returns (Worker memory) {
        return Worker(vm.addr(_key(i)), bytes32(i + 1), "https://worker.example:8443");
    }

    function _hire(uint256 i) internal {
        address account = _account(i);
        token.mint(account, STAKE);
        vm.startPrank(account);
        token.approve(address(workers), type(uint256).max);
        workers.register(_worker(i));
        workers.stake(STAKE);
        vm.stopPrank();
    }

    /// @notice Stages of equal numbers of layers; shares 10000 / count, the last one takes what is left over.
    function _stages(uint256 count) internal pure virtual returns (Stage[] memory stages) {
        stages = new Stage[](count);
        for (uint256 i; i < count; ++i) {
            stages[i] = Stage({
                worker: _account(i),
                firstLayer: uint32(i * LAYERS / count),
                endLayer: uint32((i + 1) * LAYERS / count),
                shareBps: uint16(i + 1 == count ? 10_000 - 10_000 / count * (count - 1) : 10_000 / count)
            });
        }
    }

    function _pipelineId(Stage[] memory stages, uint64 nonce) internal view returns (bytes32) {
        return keccak256(abi.encode(block.chainid, address(workers), modelId, stages, nonce));
    }

    function _joins(Stage[] memory stages, uint64 nonce) internal view returns (bytes[] memory signatures) {
        bytes32 structHash = keccak256(abi.encode(keccak256("Join(bytes32 pipeline)"), _pipelineId(stages, nonce)));
        signatures = new bytes[](stages.length);
        for (uint256 i; i < stages.length; ++i) {
            signatures[i] = _sign(address(workers), _key(i), structHash);
        }
    }

    /// @notice Workers 0..count-1, staked, and their pipeline.
    function _pipeline(uint256 count) internal returns (bytes32) {
        for (uint256 i; i < count; ++i) {
            _hire(i);
        }
        Stage[] memory stages = _stages(count);
        return workers.createPipeline(modelId, stages, 0, _joins(stages, 0));
    }

    /// @notice 100 prompt tokens at 3, at most 50 tokens at 7: 650 at most.
    function _job(bytes32 pipeline) internal view returns (Job memory) {
        return Job({
            model: modelId,
            pipeline: pipeline,
            requestsRoot: bytes32(uint256(9)),
            requests: 10,
            promptTokens: 100,
            maxTokens: 50,
            promptPrice: 3,
            tokenPrice: 7,
            lock: 2 * (650 + 2_000_000 * 2),
            gasRate: 2,
            acceptBy: START + 100,
            commitBy: START + 200,
            window: 60,
            clock: 30,
            grace: 5,
            nonce: 1
        });
    }

    function _open(Job memory job) internal returns (bytes32 id) {
        vm.prank(REQUESTER);
        id = escrow.open(job);
        pipelineOf[id] = job.pipeline;
    }

    function _acceptance(bytes32 id, uint8 stage, uint256 key) internal view returns (Acceptance memory) {
        bytes32 typehash = keccak256("Accept(bytes32 job,uint8 stage,bytes32 model)");
        return Acceptance(stage, _sign(address(escrow), key, keccak256(abi.encode(typehash, id, stage, modelId))));
    }

    function _acceptances(bytes32 id, uint256 count) internal view returns (Acceptance[] memory list) {
        list = new Acceptance[](count);
        for (uint8 i; i < count; ++i) {
            list[i] = _acceptance(id, i, _key(i));
        }
    }

    function _claim(bytes32 id, uint8 stage, bytes32 root, bytes32 outputs, uint64 tokens, uint256 key)
        internal
        view
        returns (Claim memory)
    {
        bytes32 typehash = keccak256(
            "Commit(bytes32 job,bytes32 pipeline,uint8 stage,bytes32 model,bytes32 root,bytes32 outputs,uint64 tokens)"
        );
        bytes32 structHash = keccak256(abi.encode(typehash, id, pipelineOf[id], stage, modelId, root, outputs, tokens));
        return Claim(stage, root, outputs, tokens, _sign(address(escrow), key, structHash));
    }

    function _root(uint256 stage) internal pure returns (bytes32) {
        return bytes32(0x1000 + stage);
    }

    /// @notice Every stage's claim; the last one claims `tokens`.
    function _claims(bytes32 id, uint256 count, uint64 tokens) internal view returns (Claim[] memory list) {
        list = new Claim[](count);
        for (uint8 i; i < count; ++i) {
            bool last = i + 1 == count;
            list[i] = _claim(id, i, _root(i), last ? bytes32(uint256(0x2000)) : bytes32(0), last ? tokens : 0, _key(i));
        }
    }

    function _one(Acceptance memory item) internal pure returns (Acceptance[] memory list) {
        list = new Acceptance[](1);
        list[0] = item;
    }

    function _one(Claim memory item) internal pure returns (Claim[] memory list) {
        list = new Claim[](1);
        list[0] = item;
    }

    /// @notice EIP-712 by hand, so that a wrong domain or type string in a contract shows.
    function _sign(address verifying, uint256 key, bytes32 structHash) internal view returns (bytes memory) {
        bytes32 domain = keccak256(
            abi.encode(
                keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"),
                keccak256("Plumb"),
                keccak256("1"),
                block.chainid,
                verifying
            )
        );
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(key, keccak256(abi.encodePacked(hex"1901", domain, structHash)));
        return abi.encodePacked(r, s, v);
    }
}
