// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Demand, Demanded, IDemands} from "../../contracts/src/interfaces/IDemands.sol";
import {Model, Opening} from "../../contracts/src/interfaces/IReferee.sol";
import {Archive} from "./Demands.t.sol";

interface Cooler {
    function cool(address target) external;
}

/// @title The worker ends no poorer: what an answer costs against what it is paid, cold slots and calldata included
contract DemandsGasTest is Archive {
    uint256 private constant LONG = 128;

    function _model() internal pure override returns (Model memory model) {
        model = super._model();
        (model.hidden, model.kvWidth, model.maxPositions) = (256, 40, 100);
    }

    /// @dev One full leaf a position, so that 128 positions are 64 KB; no byte is zero.
    function _write() internal override {
        super._write();
        delete rows;
        delete roots;
        delete nodes;
        for (uint256 i; i < LONG; ++i) {
            rows.push(_noise("h", i, 512));
        }
        for (uint256 i; i < STAGE_TENSORS; ++i) {
            roots.push(bytes.concat(i == H ? _rootOf(rows) : keccak256(abi.encode("root", i))));
        }
        for (uint32 r; r < 3; ++r) {
            nodes.push(abi.encodePacked(r, uint32(LONG), r == R ? _rootOf(roots) : bytes32(uint256(1))));
        }
    }

    function test_demand_costs() public {
        Demand memory asked = _ask(0, LEAVES, H, 0, 128);
        _coolAll();
        vm.prank(ALICE);
        demands.demand(asked, _model(), type(uint256).max);
        vm.snapshotGasLastCall("Demands", "demand");
        Demanded memory demanded = Demanded(asked, ALICE, START, START + 30, 6_254_880, 1_563_721);
        vm.warp(START + 31);
        _coolAll();
        demands.lapse(keccak256(abi.encode(asked)), demanded);
        vm.snapshotGasLastCall("Demands", "lapse");
    }

    function test_answer_paysMoreThanItCosts() public {
        _worthIt(_ask(0, LEAVES, H, 0, 128), "answer 64 KB");
        _worthIt(_ask(0, LEAVES, H, 5, 16), "answer 8 KB");
        _worthIt(_ask(0, LEAVES, H, 5, 1), "answer one leaf");
        _worthIt(_ask(0, TENSORS, 0, 0, 192), "answer 192 tensors");
        _worthIt(_ask(0, TENSORS, 0, 100, 1), "answer one tensor");
        _worthIt(_ask(1, OUTPUT, 0, 0, 2), "answer outputs");
        _worthIt(_ask(0, PROMPT, 0, 1, 1), "answer prompt");
    }

    /// @dev A transaction's gas as EIP-7623 counts it: 4 a token of calldata and the execution, at least 10 a token; a byte is 4 tokens, a zero 1.
    function _worthIt(Demand memory asked, string memory name) private {
        (bytes32 key, Demanded memory demanded) = _demand(asked);
        bytes memory call = abi.encodeCall(demands.answer, (key, demanded, _model(), _openings(asked)));
        _coolAll();
        vm.prank(_account(asked.stage));
        (bool done,) = address(demands).call(call);
        uint256 execution = vm.snapshotGasLastCall("Demands", name);
        assertTrue(done, "answered");
        uint256 tokens;
        for (uint256 i; i < call.length; ++i) {
            tokens += call[i] == 0 ? 1 : 4;
        }
        uint256 standard = 21_000 + 4 * tokens + execution;
        uint256 least = 21_000 + 10 * tokens;
        uint256 spent = standard > least ? standard : least;
        uint256 paid = demanded.pay / GAS_RATE;
        assertTrue(
            spent <= paid,
            string.concat(name, ": ", vm.toString(spent), " gas of which ", vm.toString(paid), " are paid")
        );
    }

    function _coolAll() private {
        Cooler(address(vm)).cool(address(demands));
        Cooler(address(vm)).cool(address(escrow));
        Cooler(address(vm)).cool(address(workers));
        Cooler(address(vm)).cool(address(token));
    }
}

/// @title The most leaves that one demand may name, of a model whose rows are as short as can be
contract DemandsManyLeavesTest is Archive {
    uint256 private constant LEAVES_HELD = 4096;
    uint256 private constant TRANSACTION_GAS = 2 ** 24; // EIP-7825

    function _model() internal pure override returns (Model memory model) {
        model = super._model();
        (model.hidden, model.kvWidth, model.maxPositions) = (1, 1, 2 ** 20);
    }

    /// @dev Rows of one element, which is its position.
    function _write() internal override {
        super._write();
        delete roots;
        delete nodes;
        for (uint256 i; i < STAGE_TENSORS; ++i) {
            roots.push(bytes.concat(i == H ? _rootOf(_elements()) : keccak256(abi.encode("root", i))));
        }
        for (uint32 r; r < 3; ++r) {
            nodes.push(abi.encodePacked(r, uint32(LEAVES_HELD), r == R ? _rootOf(roots) : bytes32(uint256(1))));
        }
    }

    function _elements() private pure returns (bytes[] memory list) {
        list = new bytes[](LEAVES_HELD);
        for (uint256 i; i < LEAVES_HELD; ++i) {
            list[i] = abi.encodePacked(uint16(i));
        }
    }

    /// @dev Gas of answering the first `count` rows, as EIP-7623 counts what is dearer here: 4 a token of calldata and the execution.
    function _gasOf(uint32 count) private returns (uint256) {
        (bytes32 key, Demanded memory demanded) = _demand(_ask(0, LEAVES, H, 0, count));
        bytes memory data = new bytes(2 * count);
        bytes[] memory all = _elements();
        for (uint256 i; i < data.length; ++i) {
            data[i] = all[i / 2][i % 2];
        }
        bytes32[] memory below = _prove(all, 0, count);
        bytes32[] memory above = _prove(roots, H, 1);
        Opening[] memory openings = new Opening[](2);
        openings[0] = Opening(nodes[R], _prove(nodes, R, 1));
        openings[1] = Opening(data, new bytes32[](below.length + above.length));
        for (uint256 i; i < openings[1].siblings.length; ++i) {
            openings[1].siblings[i] = i < below.length ? below[i] : above[i - below.length];
        }
        bytes memory call = abi.encodeCall(demands.answer, (key, demanded, _model(), openings));
        vm.prank(_account(0));
        uint256 before = gasleft();
        (bool done,) = address(demands).call(call);
        uint256 execution = before - gasleft();
        assertTrue(done, "answered");
        return 21_000 + 16 * call.length + execution;
    }

    /// @dev Of rows of two bytes 32,768 are no more than 64 KB, and take 75M gas to hash.
    function test_answer_ofTheMostLeavesFitsATransaction() public {
        uint32 most = 2048;
        assertTrue(_gasOf(most) < TRANSACTION_GAS / 2, "the most that may be asked for is answered at once");
        vm.expectRevert(abi.encodeWithSelector(IDemands.WrongDemand.selector, "count"));
        demands.demand(_ask(0, LEAVES, H, 0, most + 1), _model(), type(uint256).max);
    }
}
