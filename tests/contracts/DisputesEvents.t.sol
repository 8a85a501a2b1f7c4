// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Games} from "../../contracts/src/game/Games.sol";
import {Game, IDisputes, Move} from "../../contracts/src/interfaces/IDisputes.sol";
import {DisputesTable, Log, Logs} from "./Disputes.t.sol";

/// @notice Hands calls on to Disputes.
contract Middleman {
    fallback() external {
        (bool done, bytes memory answer) = address(bytes20(msg.data)).call(msg.data[20:]);
        if (!done) {
            assembly ("memory-safe") {
                revert(add(answer, 32), mload(answer))
            }
        }
    }
}

/// @title What a move's event tells of its list: where it stands in the mover's own transaction, or all of it
contract DisputesEventsTest is DisputesTable {
    bytes32 private id;
    bytes private descent; // the worker's call
    bytes private list;

    function setUp() public override {
        super.setUp();
        Game memory game;
        (id, game) = _open();
        list = _workerNodes();
        descent = abi.encodeCall(IDisputes.descend, (id, Games.pack(game), _pickStep(0, list)));
    }

    /// @dev The only GameMoved since the logs were last looked at.
    function _told() private returns (bytes memory told, uint32 place) {
        Log[] memory logs = Logs(address(vm)).getRecordedLogs();
        for (uint256 i = 0; i < logs.length; ++i) {
            if (logs[i].topics[0] == IDisputes.GameMoved.selector) {
                (, told, place) = abi.decode(logs[i].data, (bytes, bytes, uint32));
                return (told, place);
            }
        }
        revert Untrue("a move was made");
    }

    function _sliced(bytes memory data, uint32 place) private pure returns (bytes memory slice) {
        uint256 length;
        assembly ("memory-safe") {
            length := mload(add(data, place))
        }
        slice = new bytes(length);
        for (uint256 i = 0; i < length; ++i) {
            slice[i] = data[place + i];
        }
    }

    function _sent(address sender, address origin, address to, bytes memory call) private {
        vm.recordLogs();
        vm.prank(sender, origin);
        (bool done,) = to.call(call);
        assertTrue(done, "expected a success, got a revert");
    }

    function test_a_movers_own_transaction_tells_the_list() external {
        _sent(WORKER, WORKER, address(disputes), descent);
        (bytes memory told, uint32 place) = _told();
        assertEq(told, "", "not repeated");
        assertEq(_sliced(descent, place), list, "where the event says");
    }

    /// @dev Offsets in calldata may point anywhere, back before the move too.
    function test_the_place_is_told_however_the_calldata_is_laid_out() external {
        uint256 words = (descent.length - 4) / 32;
        uint256 move;
        bytes memory before = descent;
        assembly ("memory-safe") {
            move := mload(add(before, 100)) // the third argument's offset
        }
        // The list once more behind everything; its offset, the fifth word of the move, leads there.
        bytes memory moved = bytes.concat(before, bytes32(list.length), list);
        uint256 there = 32 * words - move;
        assembly ("memory-safe") {
            mstore(add(add(moved, 36), add(move, 128)), there)
        }
        _sent(WORKER, WORKER, address(disputes), moved);
        (, uint32 place) = _told();
        assertEq(place, descent.length + 32, "where it was read");
        assertEq(_sliced(moved, place), list, "and it is the list");
    }

    /// @dev The same list in front of the move, at no word's start: within the state that was posted, where nobody looks for it.
    function test_the_place_is_told_of_a_list_that_stands_before_its_move() external {
        bytes memory before = descent;
        uint256 move;
        assembly ("memory-safe") {
            move := mload(add(before, 100))
        }
        // State and move are pushed back; what is put between them begins with a byte that shifts all words.
        bytes memory put = bytes.concat(hex"ff", bytes32(list.length), list, new bytes(31 - list.length % 32));
        bytes memory moved = bytes.concat(_cut(before, 0, 4 + move), put, _cut(before, 4 + move, before.length));
        uint256 behind = move + put.length;
        uint256 back = type(uint256).max - (put.length - 1) + 1; // from the move to the length of the list
        assembly ("memory-safe") {
            mstore(add(moved, 100), behind)
            mstore(add(add(moved, 36), add(behind, 128)), back)
        }
        _sent(WORKER, WORKER, address(disputes), moved);
        (, uint32 place) = _told();
        assertEq(place, 4 + move + 1 + 32, "where it was read");
        assertEq(_sliced(moved, place), list, "and it is the list");
    }

    /// @dev A list that begins in the function's selector, or before the call itself, is no list.
    function test_a_list_begins_within_the_call() external {
        uint256 move;
        bytes memory moved = descent;
        assembly ("memory-safe") {
            move := mload(add(moved, 100))
        }
        uint256[3] memory backs = [move + 4, move + 3, move + 36];
        for (uint256 i = 0; i < backs.length; ++i) {
            uint256 back = type(uint256).max - backs[i] + 1;
            assembly ("memory-safe") {
                mstore(add(add(moved, 36), add(move, 128)), back)
            }
            vm.prank(WORKER, WORKER);
            (bool done,) = address(disputes).call(moved);
            assertTrue(!done, "refused");
        }
    }

    function _cut(bytes memory data, uint256 from, uint256 to) private pure returns (bytes memory part) {
        part = new bytes(to - from);
        for (uint256 i = 0; i < part.length; ++i) {
            part[i] = data[from + i];
        }
    }

    function test_a_challenge_tells_where_its_roots_stand() external {
        (bytes32 salt,) = _commit(_segment());
        bytes memory call = abi.encodeCall(IDisputes.challenge, (_segment(), salt, model, _evidence(), _steps()));
        _sent(CHALLENGER, CHALLENGER, address(disputes), call);
        (bytes memory told, uint32 place) = _told();
        assertEq(told, "", "not repeated");
        assertEq(_sliced(call, place), _steps(), "where the event says");
    }

    function test_a_contracts_move_is_told_whole() external {
        vm.etch(WORKER, type(Middleman).runtimeCode);
        _sent(STRANGER, STRANGER, WORKER, bytes.concat(bytes20(address(disputes)), descent));
        (bytes memory told, uint32 place) = _told();
        assertEq(place, 0, "no place");
        assertEq(told, list, "the list");
    }

    /// @dev EIP-7702: an account that delegates may be its own transaction's callee, whose calldata says nothing.
    function test_a_move_that_an_origin_makes_through_itself_is_told_whole() external {
        vm.etch(WORKER, bytes.concat(hex"ef0100", bytes20(address(new Middleman()))));
        _sent(WORKER, WORKER, WORKER, bytes.concat(bytes20(address(disputes)), descent));
        (bytes memory told, uint32 place) = _told();
        assertEq(place, 0, "no place");
        assertEq(told, list, "the list");
    }
}
