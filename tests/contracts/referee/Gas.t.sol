// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Cell, Instruction, Model, Opening, Operand, Proof, Trace} from "../../../contracts/src/interfaces/IReferee.sol";
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
        int256 sum = referee.judge(cell, 3, 4, Proof(model, _record(ins), 0, "", _siblings(0), steps, openings));
        vm.snapshotGasLastCall("Referee", "LINEAR of 256 terms");
        assertTrue(sum != 0, "a sum");
    }

    /// @dev MASS of 128 logits of a vocabulary of 128,256: two leaves of logits, the judged one's, the largest, the margin.
    function test_MassChunkStaysBelowItsBudget() public {
        bytes memory x;
        for (uint256 i = 0; i < 128; ++i) {
            x = bytes.concat(x, Codec.encodeValue(int256((i * 7919 % 1000) << 24), false));
        }
        bytes memory largest = Codec.encodeValue(20 << 30, false);
        bytes memory margin = abi.encodePacked(uint32(1), uint32(1), uint64(1 << 26));
        Model memory model;
        (model.layers, model.profileLeaves) = (32, 2561);
        Opening[] memory openings = new Opening[](4);
        bytes32[] memory steps = new bytes32[](2);
        (steps[0], openings[0], openings[1]) = _logits(x);
        openings[2] = Opening(largest, _siblings(0));
        steps[1] = Tree.leaf(largest);
        openings[3] = Opening(margin, _siblings(_used(model.profileLeaves, 2560)));
        model.profileRoot = Tree.rootOfRange(Tree.leaves(margin, 16), 2560, model.profileLeaves, openings[3].siblings);

        Instruction memory ins;
        (ins.op, ins.wide, ins.rows, ins.cols, ins.terms) = (20, 1, 1, 1, 128256);
        ins.x = Operand(1, 0, 1, 0, 0, 128256);
        ins.y = Operand(1, 1, 1, 0, 0, 1);
        ins.z = Operand(5, 0, 2560, 0, 0, 0);
        Cell memory cell;
        (cell.position, cell.token, cell.unit) = (8191, 7, 150);
        cell.sampling = bytes32(abi.encodePacked(uint32(65536), uint32(0), uint32(60000), uint64(1), uint32(1)));
        bytes memory call = abi.encodeCall(
            referee.judge, (cell, 0, 1, Proof(model, _record(ins), 0, "", _siblings(0), steps, openings))
        );
        uint256 before = gasleft();
        (bool done, bytes memory answer) = address(referee).staticcall(call);
        uint256 gas = before - gasleft();
        assertTrue(done, "the step is judged");
        assertTrue(abi.decode(answer, (int256)) != 0, "and yields a mass");
        // Measured 158k: 128 powers of two 38k, the rest as above, and a call to Sampler.
        assertTrue(gas < 165_000, vm.toString(gas));
    }

    /// @dev The root of a vector of 128,256 logits with `x` as chunk 1, the opening of that chunk and of its first leaf.
    function _logits(bytes memory x) private pure returns (bytes32 root, Opening memory chunk, Opening memory one) {
        chunk = Opening(x, _siblings(_used(1002, 1)));
        root = Tree.rootOfRange(Tree.leaves(x, 512), 2, 2004, chunk.siblings);
        bytes memory leaf = new bytes(512);
        for (uint256 i = 0; i < 512; ++i) {
            leaf[i] = x[i];
        }
        one = Opening(leaf, new bytes32[](1 + chunk.siblings.length));
        one.siblings[0] = Tree.leaves(x, 512)[1];
        for (uint256 i = 0; i < chunk.siblings.length; ++i) {
            one.siblings[1 + i] = chunk.siblings[i];
        }
    }

    function _record(Instruction memory ins) private pure returns (bytes memory) {
        bytes memory head =
            abi.encodePacked(ins.op, ins.wide, ins.rows, ins.cols, ins.limit, ins.terms, ins.a, ins.b, bytes2(0));
        return bytes.concat(head, _operand(ins.x), _operand(ins.y), _operand(ins.z));
    }

    function _operand(Operand memory o) private pure returns (bytes memory) {
        return abi.encodePacked(o.source, o.id, o.base, o.layerStride, o.unitStride, o.width, bytes6(0));
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
