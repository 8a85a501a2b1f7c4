// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Game, Phase, Segment} from "../interfaces/IDisputes.sol";
import {Trace} from "../interfaces/IReferee.sol";

/// @title Games: a game's state as bytes, each field in its own width
/// @notice docs/protocol.md, "A game's state"; the Python twin is Game.encode and Game.decode in verifier/game.py.
/// @dev Rationale: the state is carried by every call and every event of a game. ABI encoding would triple it with zeros.
library Games {
    uint256 internal constant BYTES = 422;

    function pack(Game memory game) internal pure returns (bytes memory) {
        Segment memory s = game.segment;
        Trace memory t = game.trace;
        bytes memory place =
            abi.encodePacked(s.job, s.stage, s.kind, s.request, s.layer, s.position, s.unit, game.challenger);
        bytes memory terms = abi.encodePacked(
            game.committedAt, game.worker, game.grace, game.token, game.programLeaves, game.bond, game.gasRate
        );
        bytes memory roots = abi.encodePacked(
            game.modelId,
            game.programRoot,
            t.root,
            game.steps,
            t.positions,
            t.firstLayer,
            t.endLayer,
            game.firstInstruction
        );
        bytes memory clocks = abi.encodePacked(
            game.workerSeconds,
            game.challengerSeconds,
            game.workerMoves,
            game.challengerMoves,
            game.phase,
            game.step,
            game.level,
            game.workerTurn,
            game.turnStarted
        );
        bytes memory turn =
            abi.encodePacked(game.index, game.firstChunk, game.endChunk, game.instruction, game.list, game.sampling);
        return bytes.concat(place, terms, roots, clocks, turn);
    }

    /// @dev SAFETY: whoever calls this has checked that `pack` made the bytes; others may read as nonsense.
    function read(bytes calldata data) internal pure returns (Game memory game) {
        Segment memory s = game.segment;
        s.job = bytes32(_word(data, 0));
        uint256 word = _word(data, 32);
        s.stage = uint8(word >> 248);
        s.kind = uint8(word >> 240);
        s.request = uint32(word >> 208);
        s.layer = uint32(word >> 176);
        s.position = uint32(word >> 144);
        s.unit = uint32(word >> 112);
        word = _word(data, 50);
        game.challenger = address(uint160(word >> 96));
        game.committedAt = uint64(word >> 32);
        word = _word(data, 78);
        game.worker = address(uint160(word >> 96));
        game.grace = uint32(word >> 64);
        game.token = uint32(word >> 32);
        game.programLeaves = uint32(word);
        word = _word(data, 110);
        game.bond = uint128(word >> 128);
        game.gasRate = uint128(word);
        game.modelId = bytes32(_word(data, 142));
        game.programRoot = bytes32(_word(data, 174));
        game.steps = bytes32(_word(data, 238));
        word = _word(data, 270);
        game.trace = Trace(bytes32(_word(data, 206)), uint32(word >> 224), uint32(word >> 192), uint32(word >> 160));
        game.firstInstruction = uint32(word >> 128);
        game.workerSeconds = uint32(word >> 96);
        game.challengerSeconds = uint32(word >> 64);
        game.workerMoves = uint16(word >> 48);
        game.challengerMoves = uint16(word >> 32);
        game.phase = Phase(uint8(word >> 24));
        game.step = uint8(word >> 16);
        game.level = uint8(word >> 8);
        game.workerTurn = uint8(word) != 0;
        word = _word(data, 302);
        game.turnStarted = uint64(word >> 192);
        game.index = uint64(word >> 128);
        game.firstChunk = uint32(word >> 96);
        game.endChunk = uint32(word >> 64);
        game.instruction = bytes32(_word(data, 326));
        game.list = bytes32(_word(data, 358));
        game.sampling = bytes32(_word(data, 390));
    }

    /// @dev What lies behind the end of calldata reads as zero.
    function _word(bytes calldata data, uint256 offset) private pure returns (uint256 word) {
        assembly ("memory-safe") {
            word := calldataload(add(data.offset, offset))
        }
    }
}
