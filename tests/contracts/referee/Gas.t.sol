// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Cell, Instruction, Model, Opening, Operand, Trace} from "../../../contracts/src/interfaces/IReferee.sol";
import {Codec} from "../../../contracts/src/referee/Codec.sol";
import {Referee} from "../../../contracts/src/referee/Referee.sol";
import {Tree} from "../../../contracts/src/referee/Tree.sol";
import {Base} from "../Base.t.sol";

/// @title What the dearest step costs, in the shape of Llama-3-8B
contract GasTest is Base {
    Referee private referee = new Referee();

    /// @dev 256 terms of down_proj: four leaves of the activations' vector, one of the weights.
    function test_LinearChunk() public {
        bytes memory x;
        for (uint256 i = 0; i < 256; ++i) {
            x = bytes.concat(x, Codec.encodeValue(int256(i * 7919) - 1000000, false));
        }
        bytes memory y;
        for (uint256 i = 0; i < 256; ++i) {
            y = bytes.concat(y, bytes2(uint16(((i * 37) % 256 << 8) | (0x3c + (i & 128)))));
        }
        Model memory model;
        model.weightsLeaves = 31_370_496;
        model.layers = 32;
        Opening[] memory openings = new Opening[](2);
        openings[0] = Opening(x, _siblings(6));
        openings[1] = Opening(y, _siblings(_used(model.weightsLeaves, 12345)));
        bytes32[] memory steps = new bytes32[](1);
        steps[0] = Tree.rootOfRange(Tree.leaves(x, 512), 16, 224, openings[0].siblings);
        model.weightsRoot = Tree.rootOfRange(Tree.leaves(y, 512), 12345, model.weightsLeaves, openings[1].siblings);

        Instruction memory ins;
        (ins.op, ins.rows, ins.cols, ins.terms, ins.a) = (5, 1, 256, 14336, 24);
        ins.x = Operand(1, 0, 1, 0, 0, 14336);
        ins.y = Operand(3, 0, 12344 - 3 * 56 - 3, 0, 0, 14336);
        Cell memory cell;
        int256 sum = referee.step(model, cell, steps, ins, 3, 4, openings);
        vm.snapshotGasLastCall("Referee", "LINEAR of 256 terms");
        assertTrue(sum != 0, "a sum");
    }

    function _siblings(uint256 count) private pure returns (bytes32[] memory siblings) {
        siblings = new bytes32[](count);
        for (uint256 i = 0; i < count; ++i) {
            siblings[i] = keccak256(abi.encode(i));
        }
    }

    /// @dev Siblings that one leaf's proof takes.
    function _used(uint256 count, uint256 first) private pure returns (uint256 used) {
        for (; count > 1; (first, count) = (first >> 1, (count + 1) >> 1)) {
            if (first & 1 == 1 || first + 1 < count) ++used;
        }
    }
}
