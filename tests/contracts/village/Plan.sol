// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Instruction, Model, Opening, Operand} from "../../../contracts/src/interfaces/IReferee.sol";
import {Op} from "../../../contracts/src/referee/Ops.sol";
import {Tree} from "../../../contracts/src/referee/Tree.sol";
import {Forest} from "./Forest.sol";

/// @title Plan: a model small enough to be built, served and judged within a test, by the real Referee
/// @notice Two layers of width 320 (a whole block and a short one), four tokens, bfloat16. Its programs are the Llama family's with the
/// products left out: what is in dispute is the game, and tests/twin judges the arithmetic.
library Plan {
    uint256 internal constant WIDTH = 320;
    uint256 internal constant BLOCK = 256;
    uint256 internal constant ALTERED_COLUMN = 300;
    uint256 internal constant ROW_BYTES = 2 * WIDTH;
    uint32 internal constant VOCABULARY = 4;
    uint32 internal constant LAYERS = 2;
    /// @dev Fraction bits of weights.
    uint64 internal constant GAIN_BITS = 24;

    uint8 internal constant EMBED = 0;
    uint8 internal constant K = 2;
    uint8 internal constant MLP = 5;
    uint8 internal constant LINK = 6;
    uint8 internal constant TOKEN = 7;
    uint8 internal constant STOP = 8;
    uint8 internal constant BILL = 9;
    uint8 internal constant LENGTH = 10;

    // Served tensors.
    uint8 internal constant H = 0;
    uint8 internal constant KEYS = 2;
    uint8 internal constant ATTN = 4;
    uint8 internal constant MLP_OUT = 5;
    uint8 internal constant OUT = 6;

    // Operand sources.
    uint8 private constant STEP = 1;
    uint8 private constant SERVED = 2;
    uint8 private constant WEIGHT = 3;
    uint8 private constant PROFILE = 5;

    /// @dev Weight leaves: the gain's two, then two a token.
    uint64 internal constant GAIN_LEAF = 0;
    uint64 internal constant TOKEN_LEAF = 2;
    /// @dev Profile cells: the MLP's, one a block of k, the token margin.
    uint64 internal constant MLP_CELL = 0;
    uint64 internal constant K_CELL = 1;
    uint64 internal constant MARGIN_CELL = 3;
    uint64 internal constant MARGIN_Q30 = 1 << 24;
    uint64 private constant EPS_60 = 1152921504606; // 1e-6
    uint64 private constant OVERFLOW_BOUND = 1 << 49;
    uint256 private constant HEADERS = 12;

    // ---- programs

    /// @notice A kind's instructions.
    function program(uint8 kind) internal pure returns (Instruction[] memory steps) {
        if (kind == EMBED) {
            steps = new Instruction[](1);
            steps[0] = _ins(Op.SAME, 1, 0, 0, _blocks(H), _weight(TOKEN_LEAF), _none());
        } else if (kind == K) {
            steps = new Instruction[](2);
            steps[0] = _ins(Op.ADD, uint32(BLOCK), 0, 0, _blocks(H), _blocks(ATTN), _none());
            steps[0].limit = uint32(WIDTH);
            Operand memory limits = Operand(PROFILE, 0, K_CELL, 0, 1, 0);
            steps[1] = _ins(Op.VERDICT, 1, 0, OVERFLOW_BOUND, _step(steps, 0), _blocks(KEYS), limits);
        } else if (kind == MLP) {
            steps = new Instruction[](5);
            steps[0] = _ins(Op.ADD, uint32(WIDTH), 0, 0, _row(H), _row(ATTN), _none());
            _norm(steps, 1, _step(steps, 0));
            Operand memory limits = Operand(PROFILE, 0, MLP_CELL, 0, 0, 0);
            steps[4] = _ins(Op.VERDICT, 1, 0, OVERFLOW_BOUND, _step(steps, 3), _row(MLP_OUT), limits);
        } else if (kind == TOKEN) {
            steps = new Instruction[](5);
            _norm(steps, 0, _row(OUT));
            steps[3] = _ins(Op.LOGIT, 2, uint32(WIDTH), GAIN_BITS, _step(steps, 2), _weight(TOKEN_LEAF), _none());
            Operand memory limits = Operand(PROFILE, 0, MARGIN_CELL, 0, 0, 0);
            steps[4] = _ins(Op.COMPARE, 1, 0, 0, _step(steps, 3), _none(), limits);
        }
    }

    /// @dev SUMSQ, RSQRT and NORM of x from place `place` on.
    function _norm(Instruction[] memory steps, uint256 place, Operand memory x) private pure {
        steps[place] = _ins(Op.SUMSQ, 1, uint32(WIDTH), 0, x, _none(), _none());
        steps[place].wide = 1;
        steps[place + 1] = _ins(Op.RSQRT, 1, 0, EPS_60, _step(steps, place), _none(), _none());
        steps[place + 1].b = uint32(WIDTH);
        steps[place + 2] = _ins(Op.NORM, uint32(WIDTH), 0, GAIN_BITS, x, _step(steps, place + 1), _weight(GAIN_LEAF));
    }

    function units(uint8 kind) internal pure returns (uint32) {
        if (kind == EMBED || kind == K) return 2;
        if (kind == MLP) return 1;
        return kind == TOKEN ? VOCABULARY : 0;
    }

    /// @notice Leaf of a kind's first instruction in the program tree.
    function first(uint8 kind) internal pure returns (uint256 leaf) {
        leaf = HEADERS;
        for (uint8 i = 0; i < kind; ++i) {
            leaf += program(i).length;
        }
    }

    function header(uint8 kind) internal pure returns (bytes memory) {
        return abi.encodePacked(uint32(first(kind)), uint32(program(kind).length), units(kind), uint32(0));
    }

    function record(Instruction memory ins) internal pure returns (bytes memory) {
        return bytes.concat(
            abi.encodePacked(ins.op, ins.wide, ins.rows, ins.cols, ins.limit, ins.terms, ins.a, ins.b, uint16(0)),
            _operand(ins.x),
            _operand(ins.y),
            _operand(ins.z)
        );
    }

    function programLeaves() internal pure returns (bytes32[] memory leaves) {
        leaves = new bytes32[](first(uint8(HEADERS)));
        uint256 place = HEADERS;
        for (uint8 kind = 0; kind < HEADERS; ++kind) {
            leaves[kind] = Tree.leaf(header(kind));
            Instruction[] memory steps = program(kind);
            for (uint256 i = 0; i < steps.length; ++i) {
                leaves[place++] = Tree.leaf(record(steps[i]));
            }
        }
    }

    // ---- weights and tolerances

    /// @notice Row `token` of the embedding, which is also the head. Its last 64 columns are a sixteenth of the others: what goes wrong
    /// there hides in a distance over the whole row.
    /// Tokens 2 and 3 differ in one bit: their logits tie within the margin.
    function embedding(uint256 token) internal pure returns (bytes memory data) {
        data = noise(keccak256(abi.encode("embedding", token < 3 ? token : 2)));
        if (token == 3) data[2 * ALTERED_COLUMN] ^= 0x01;
    }

    function twin(uint32 token) internal pure returns (uint32) {
        return token < 2 ? token : token ^ 1;
    }

    /// @notice A row of plausible bfloat16 numbers, 0.5 to 2 in magnitude, then a sixteenth of that.
    function noise(bytes32 seed) internal pure returns (bytes memory data) {
        bytes32 numbers = 0xff80ff80ff80ff80ff80ff80ff80ff80ff80ff80ff80ff80ff80ff80ff80ff80; // little-endian: mantissa, sign
        bytes32 large = 0x003f003f003f003f003f003f003f003f003f003f003f003f003f003f003f003f;
        bytes32 small = 0x003d003d003d003d003d003d003d003d003d003d003d003d003d003d003d003d;
        bytes32[] memory words = new bytes32[](ROW_BYTES / 32);
        for (uint256 i = 0; i < words.length; ++i) {
            seed = keccak256(abi.encode(seed));
            words[i] = seed & numbers | (i < 2 * BLOCK / 32 ? large : small);
        }
        return abi.encodePacked(words);
    }

    /// @notice All ones.
    function gain() internal pure returns (bytes memory data) {
        bytes32[] memory words = new bytes32[](ROW_BYTES / 32);
        for (uint256 i = 0; i < words.length; ++i) {
            words[i] = 0x803f803f803f803f803f803f803f803f803f803f803f803f803f803f803f803f;
        }
        return abi.encodePacked(words);
    }

    function weightLeaves() internal pure returns (bytes32[] memory leaves) {
        leaves = new bytes32[](TOKEN_LEAF + 2 * VOCABULARY);
        for (uint256 row = 0; row < leaves.length / 2; ++row) {
            bytes32[] memory two = Tree.leaves(row == 0 ? gain() : embedding(row - 1), 2 * BLOCK);
            (leaves[2 * row], leaves[2 * row + 1]) = (two[0], two[1]);
        }
    }

    /// @notice num u32 | den u32 | floor u64.
    function cell(uint256 index) internal pure returns (bytes memory) {
        if (index == MARGIN_CELL) return abi.encodePacked(uint32(1), uint32(1), MARGIN_Q30);
        return abi.encodePacked(uint32(1), uint32(8), uint64(1 << 20));
    }

    function profileLeaves() internal pure returns (bytes32[] memory leaves) {
        leaves = new bytes32[](4);
        for (uint256 i = 0; i < leaves.length; ++i) {
            leaves[i] = Tree.leaf(cell(i));
        }
    }

    function model() internal pure returns (Model memory) {
        bytes32[] memory weights = weightLeaves();
        bytes32[] memory programs = programLeaves();
        bytes32[] memory cells = profileLeaves();
        return Model({
            weightsRoot: Forest.root(weights),
            weightsLeaves: uint64(weights.length),
            programRoot: Forest.root(programs),
            programLeaves: uint32(programs.length),
            profileRoot: Forest.root(cells),
            profileLeaves: uint32(cells.length),
            layers: LAYERS,
            hidden: uint32(WIDTH),
            queryWidth: uint32(WIDTH),
            kvWidth: uint32(WIDTH),
            vocabulary: VOCABULARY,
            maxPositions: 16,
            weightDtype: 0,
            servedDtype: 0
        });
    }

    /// @notice A leaf of the program tree.
    function opened(bytes memory data, uint256 index) internal pure returns (Opening memory) {
        return Opening(data, Forest.siblings(programLeaves(), index, 1));
    }

    // ---- records of instructions

    function _ins(Op op, uint32 cols, uint32 terms, uint64 a, Operand memory x, Operand memory y, Operand memory z)
        private
        pure
        returns (Instruction memory)
    {
        return Instruction(uint8(op), 0, 1, cols, 0, terms, a, 0, x, y, z);
    }

    function _none() private pure returns (Operand memory none) {}

    function _row(uint8 tensor) private pure returns (Operand memory) {
        return Operand(SERVED, tensor, 0, 0, 0, uint32(WIDTH));
    }

    function _blocks(uint8 tensor) private pure returns (Operand memory) {
        return Operand(SERVED, tensor, 0, 0, uint32(BLOCK), uint32(WIDTH));
    }

    function _weight(uint64 leaf) private pure returns (Operand memory) {
        return Operand(WEIGHT, 0, leaf, 0, 0, uint32(WIDTH));
    }

    function _step(Instruction[] memory steps, uint256 i) private pure returns (Operand memory) {
        Instruction memory ins = steps[i];
        return Operand(STEP, uint8(i), ins.rows, ins.wide, ins.limit, ins.cols);
    }

    function _operand(Operand memory o) private pure returns (bytes32) {
        return bytes32(abi.encodePacked(o.source, o.id, o.base, o.layerStride, o.unitStride, o.width, uint48(0)));
    }
}
