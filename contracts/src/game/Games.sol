// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Game, Phase, Segment} from "../interfaces/IDisputes.sol";
import {Trace} from "../interfaces/IReferee.sol";

/// @title Games: a game's state as bytes, each field in its own width
/// @notice docs/protocol.md, "A game's state"; the Python twin is Game.encode and Game.decode in verifier/game.py.
/// @dev Rationale: the state is carried by every call and every event of a game. ABI encoding would triple it with zeros.
library Games {
    uint256 internal constant BYTES = 384;

    function pack(Game memory game) internal pure returns (bytes memory packed) {
        Segment memory s = game.segment;
        Trace memory t = game.trace;
        packed = new bytes(BYTES);
        // Each word runs on over the place of the next, which is written after it.
        _put(packed, 0, uint256(s.job));
        _put(packed, 32, _place(s) << 112);
        _put(packed, 50, uint256(uint160(game.challenger)) << 96 | uint256(game.committedAt) << 56);
        _put(
            packed,
            75,
            uint256(uint160(game.worker)) << 96 | uint256(game.grace) << 64 | uint256(game.token) << 32
                | game.programLeaves
        );
        _put(packed, 107, uint256(game.bond) << 128 | game.gasRate);
        _put(packed, 139, uint256(game.modelId));
        _put(packed, 171, uint256(game.rule));
        _put(packed, 203, uint256(t.root));
        _put(packed, 235, uint256(game.steps));
        _put(
            packed,
            267,
            uint256(t.positions) << 224 | uint256(t.firstLayer) << 192 | uint256(t.endLayer) << 160
                | uint256(game.firstInstruction) << 128 | _clocks(game)
        );
        _put(
            packed,
            299,
            uint256(game.turnStarted) << 216 | uint256(game.index) << 152 | uint256(game.firstChunk) << 120
                | uint256(game.endChunk) << 88
        );
        _put(packed, 320, uint256(game.list));
        _put(packed, 352, uint256(game.sampling));
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
        game.committedAt = uint40(word >> 56);
        word = _word(data, 75);
        game.worker = address(uint160(word >> 96));
        game.grace = uint32(word >> 64);
        game.token = uint32(word >> 32);
        game.programLeaves = uint32(word);
        word = _word(data, 107);
        game.bond = uint128(word >> 128);
        game.gasRate = uint128(word);
        game.modelId = bytes32(_word(data, 139));
        game.rule = bytes32(_word(data, 171));
        game.steps = bytes32(_word(data, 235));
        word = _word(data, 267);
        game.trace = Trace(bytes32(_word(data, 203)), uint32(word >> 224), uint32(word >> 192), uint32(word >> 160));
        game.firstInstruction = uint32(word >> 128);
        game.workerSeconds = uint32(word >> 96);
        game.challengerSeconds = uint32(word >> 64);
        game.workerMoves = uint16(word >> 48);
        game.challengerMoves = uint16(word >> 32);
        game.phase = Phase(uint8(word >> 24));
        game.step = uint8(word >> 16);
        game.level = uint8(word >> 8);
        game.workerTurn = uint8(word) != 0;
        word = _word(data, 299);
        game.turnStarted = uint40(word >> 216);
        game.index = uint64(word >> 152);
        game.firstChunk = uint32(word >> 120);
        game.endChunk = uint32(word >> 88);
        game.list = bytes32(_word(data, 320));
        game.sampling = bytes32(_word(data, 352));
    }

    function _place(Segment memory s) private pure returns (uint256) {
        return uint256(s.stage) << 136 | uint256(s.kind) << 128 | uint256(s.request) << 96 | uint256(s.layer) << 64
            | uint256(s.position) << 32 | s.unit;
    }

    function _clocks(Game memory game) private pure returns (uint256) {
        return uint256(game.workerSeconds) << 96 | uint256(game.challengerSeconds) << 64 | uint256(game.workerMoves)
            << 48 | uint256(game.challengerMoves) << 32 | uint256(uint8(game.phase)) << 24 | uint256(game.step) << 16
            | uint256(game.level) << 8 | (game.workerTurn ? 1 : 0);
    }

    /// @dev SAFETY: the last word ends where the bytes do.
    function _put(bytes memory data, uint256 offset, uint256 word) private pure {
        assembly ("memory-safe") {
            mstore(add(add(data, 32), offset), word)
        }
    }

    /// @dev What lies behind the end of calldata reads as zero.
    function _word(bytes calldata data, uint256 offset) private pure returns (uint256 word) {
        assembly ("memory-safe") {
            word := calldataload(add(data.offset, offset))
        }
    }
}
