// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Games} from "../../../contracts/src/game/Games.sol";
import {IDisputes, Segment} from "../../../contracts/src/interfaces/IDisputes.sol";
import {Batch} from "./Batches.sol";
import {Case, Cases} from "./Cases.sol";
import {Board} from "./Solver.sol";
import {Village} from "./Village.sol";

/// @notice One game as a test sees it.
struct Table {
    bytes32 id;
    Batch batch;
    Segment segment;
    bytes32 salt;
    bytes steps;
    address challenger;
    Village.Seen seen;
}

/// @title Scene: one game, move by move
abstract contract Scene is Village {
    function setUp() public virtual {
        _settleIn();
    }

    // ---- opening

    /// @notice Commits to a challenge and waits a block. The game is not open yet.
    function _prepared(address challenger, Batch memory b, Segment memory s, bytes memory steps)
        internal
        returns (Table memory t)
    {
        t.batch = b;
        t.segment = s;
        t.salt = bytes32(++salts);
        t.steps = steps;
        t.challenger = challenger;
        t.id = _gameId(challenger, s, t.salt);
        vm.prank(challenger);
        disputes.commit(t.id);
        vm.roll(block.number + 1);
        _prepare(challenger, b, s);
    }

    function _started(address challenger, Batch memory b, Segment memory s, bytes memory steps)
        internal
        returns (Table memory t)
    {
        t = _prepared(challenger, b, s, steps);
        _do(t, challenger, _openingCall(b, s, t.salt, steps));
    }

    /// @notice A challenge by the honest watch of what is wrong with a batch, or by the liar of what is right.
    function _challenged(address challenger, Batch memory b, Segment memory s, Case memory claim)
        internal
        returns (Table memory t)
    {
        return _started(challenger, b, s, _shown(s.kind) ? bytes("") : _steps(claim));
    }

    // ---- moves

    /// @notice A call that must succeed.
    function _do(Table memory t, address sender, bytes memory call) internal {
        (bool done, bytes memory answer) = _send(sender, call);
        if (!done) assertEq(answer, "", "expected a success, got a revert");
        t.seen = _seen();
    }

    /// @notice A call that must be refused with that error.
    function _refused(address sender, bytes memory call, bytes4 selector) internal {
        (bool done, bytes memory answer) = _send(sender, call);
        assertTrue(!done, "expected a revert, got a success");
        assertEq(bytes32(bytes4(answer)), bytes32(selector), "error");
    }

    function _mover(Table memory t) internal pure returns (address) {
        return t.seen.game.workerTurn ? t.seen.game.worker : t.seen.game.challenger;
    }

    /// @notice What whoever is to move would send, if it held `c` true; empty for nothing.
    function _callOf(Table memory t, Case memory c) internal view returns (bytes memory) {
        return _answerCall(t.id, Board(t.seen.game, t.seen.list, t.steps, 0), c);
    }

    /// @notice The mover moves, if it can.
    function _moves(Table memory t, Case memory c) internal returns (bool done) {
        bytes memory call = _callOf(t, c);
        if (call.length == 0) return false;
        (done,) = _send(_mover(t), call);
        if (done) {
            Seen memory seen = _seen();
            // A proof ends a game and posts no state.
            if (!seen.moved) (seen.game, seen.list) = (t.seen.game, t.seen.list);
            t.seen = seen;
        }
    }

    /// @notice To the end. Who has no move, or only a false proof, runs out of time.
    function _playOut(Table memory t, Case memory worker, Case memory challenger) internal returns (uint8 convicted) {
        while (!t.seen.ended) {
            if (!_moves(t, t.seen.game.workerTurn ? worker : challenger)) _runsOut(t);
        }
        return t.seen.convicted;
    }

    function _runsOut(Table memory t) internal {
        vm.warp(_deadline(t) + 1);
        _do(t, STRANGER, _flagCall(t));
    }

    function _flagCall(Table memory t) internal pure returns (bytes memory) {
        return abi.encodeCall(IDisputes.flag, (t.id, Games.pack(t.seen.game)));
    }

    /// @notice The last second in which the mover may move.
    function _deadline(Table memory t) internal pure returns (uint256) {
        return
            t.seen.game.turnStarted
                + (t.seen.game.workerTurn ? t.seen.game.workerSeconds : t.seen.game.challengerSeconds);
    }

    // ---- sides

    function _lying(Batch memory b, Segment memory s, uint256 step, uint256 element, bool accuses)
        internal
        pure
        returns (Case memory c)
    {
        c = Cases.truth(b, s);
        Cases.lie(c, step, element, accuses);
    }
}
