// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Games} from "../../contracts/src/game/Games.sol";
import {Game, Move, Proof, Segment} from "../../contracts/src/interfaces/IDisputes.sol";
import {Opening} from "../../contracts/src/interfaces/IReferee.sol";
import {DisputesTable} from "./Disputes.t.sol";

/// @title What each kind of move costs in Disputes, escrow and referee set aside
/// @dev Without base fee and calldata, and with warm slots: `plumb bench dispute` measures whole transactions.
contract DisputesGasTest is DisputesTable {
    function _note(string memory name) private {
        vm.snapshotGasLastCall("Disputes", name);
    }

    function test_moves_by_kind() external {
        Segment memory segment = _segment();
        bytes32 id = keccak256(abi.encode(CHALLENGER, segment, bytes32(uint256(1))));
        Opening[] memory evidence = _evidence();
        bytes memory steps = _steps();
        vm.prank(CHALLENGER, CHALLENGER);
        disputes.commit(id);
        _note("commit");
        vm.roll(block.number + 1);
        vm.recordLogs();
        vm.prank(CHALLENGER, CHALLENGER);
        disputes.challenge(segment, bytes32(uint256(1)), model, evidence, steps);
        _note("challenge");
        (Game memory game,) = _last();

        bytes memory nodes = _workerNodes();
        game = _noted(WORKER, id, game, _pickStep(0, nodes), "descend to nodes");
        bytes32[] memory words = abi.decode(abi.encodePacked(uint256(32), uint256(2), nodes), (bytes32[]));
        Move memory move = Move(records[0], _prove(words, 1), 1, abi.encodePacked(words[1]), new bytes(288));
        game = _noted(CHALLENGER, id, game, move, "descend to elements");
        move = _quoting(0, 35, new bytes(288), 8, new bytes(32));
        move.list = _claim(move.list, 0, abi.encodePacked(uint128(2)));
        game = _noted(WORKER, id, game, move, "descend to partial sums");
        move = _quoting(0, 0, move.list, 16, new bytes(512));
        game = _noted(CHALLENGER, id, game, move, "descend to chunks");

        referee.set(-5);
        Move memory told = _quoting(0, 3, new bytes(512), 16, "");
        Proof memory proof = Proof(model, records[0], 3, told.claim, told.siblings, _read(records[0]), new Opening[](0));
        bytes memory state = Games.pack(game);
        vm.prank(WORKER, WORKER);
        disputes.prove(id, state, proof);
        _note("prove");
    }

    function test_a_flag() external {
        (bytes32 id, Game memory game) = _open();
        bytes memory state = Games.pack(game);
        vm.warp(block.timestamp + CLOCK + 1);
        disputes.flag(id, state);
        _note("flag");
    }

    function _noted(address mover, bytes32 id, Game memory game, Move memory move, string memory name)
        private
        returns (Game memory next)
    {
        bytes memory state = Games.pack(game);
        vm.recordLogs();
        vm.prank(mover, mover);
        disputes.descend(id, state, move);
        _note(name);
        (next,) = _last();
    }
}
