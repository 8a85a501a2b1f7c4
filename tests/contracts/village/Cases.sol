// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Segment} from "../../../contracts/src/interfaces/IDisputes.sol";
import {Instruction, Opening} from "../../../contracts/src/interfaces/IReferee.sol";
import {Codec} from "../../../contracts/src/referee/Codec.sol";
import {Floats} from "../../../contracts/src/referee/Floats.sol";
import {Op, Ops} from "../../../contracts/src/referee/Ops.sol";
import {Tree} from "../../../contracts/src/referee/Tree.sol";
import {Batch, Batches} from "./Batches.sol";
import {Forest} from "./Forest.sol";
import {Plan} from "./Plan.sol";

/// @notice One side's version of a segment's execution.
struct Case {
    Batch batch;
    Segment segment;
    Instruction[] program;
    int256[][] vectors;
    // The lie: one element, and the sum beneath it. step = type(uint256).max: the truth.
    uint256 lieStep;
    uint256 lieElement;
}

/// @title Cases: the truth of a segment, and lies that are consistent but for one element
library Cases {
    uint256 internal constant TRUTH = type(uint256).max;

    function truth(Batch memory b, Segment memory s) internal pure returns (Case memory c) {
        c.batch = b;
        c.segment = s;
        c.program = Plan.program(s.kind);
        c.lieStep = TRUTH;
        c.vectors = new int256[][](c.program.length);
        if (s.kind == Plan.K) {
            int256[] memory x = Batches.served(Batches.add(_row(c, Plan.H), _row(c, Plan.ATTN)));
            uint256 start = s.unit * Plan.BLOCK;
            c.vectors[0] = _part(x, start, Plan.WIDTH - start < Plan.BLOCK ? Plan.WIDTH - start : Plan.BLOCK);
            int256[] memory keys = _told(c, Plan.KEYS);
            c.vectors[1] = _verdict(c.vectors[0], _part(keys, start, c.vectors[0].length), Plan.K_CELL + s.unit);
        } else if (s.kind == Plan.MLP) {
            c.vectors[0] = Batches.served(Batches.add(_row(c, Plan.H), _row(c, Plan.ATTN)));
            _norm(c, 1, c.vectors[0]);
            c.vectors[4] = _verdict(c.vectors[3], _told(c, Plan.MLP_OUT), Plan.MLP_CELL);
        } else if (s.kind == Plan.TOKEN) {
            _norm(c, 0, Batches.served(_row(c, Plan.OUT)));
            c.vectors[3] = new int256[](2);
            c.vectors[3][0] = Batches.logit(c.vectors[2], chosen(b, s.position));
            c.vectors[3][1] = Batches.logit(c.vectors[2], s.unit);
            int256 margin = int256(uint256(Plan.MARGIN_Q30));
            c.vectors[4] = _one(c.vectors[3][1] - c.vectors[3][0] > margin ? int256(1) : int256(0));
        }
    }

    /// @notice The same but for one element of one step. A challenger also claims the verdict, a worker denies it.
    function lie(Case memory c, uint256 step, uint256 element, bool accuses) internal pure {
        uint256 last = c.vectors.length - 1;
        c.lieStep = step % c.vectors.length;
        c.lieElement = element % c.vectors[c.lieStep].length;
        if (c.lieStep < last) c.vectors[c.lieStep][c.lieElement] += 1;
        c.vectors[last][0] = accuses ? int256(1) : int256(0);
    }

    function verdict(Case memory c) internal pure returns (bool wrong) {
        return c.vectors[c.vectors.length - 1][0] != 0;
    }

    /// @notice The output token that follows a position.
    function chosen(Batch memory b, uint256 position) internal pure returns (uint32 id) {
        bytes memory tokens = b.tokens;
        for (uint256 i = 0; i < 4; ++i) {
            id = id << 8 | uint8(tokens[4 * position + i]);
        }
    }

    // ---- lists

    function encoded(Case memory c, uint256 step) internal pure returns (bytes memory data) {
        int256[] memory values = c.vectors[step];
        bool wide = c.program[step].wide != 0;
        data = new bytes(values.length * Codec.elementBytes(wide));
        for (uint256 i = 0; i < values.length; ++i) {
            uint256 zigzag = uint256((values[i] << 1) ^ (values[i] >> 255));
            assembly ("memory-safe") {
                switch wide
                case 0 { mstore(add(add(data, 32), mul(i, 8)), shl(192, zigzag)) }
                default { mstore(add(add(data, 32), mul(i, 16)), shl(128, zigzag)) }
            }
        }
    }

    function leaves(Case memory c, uint256 step) internal pure returns (bytes32[] memory) {
        return Tree.leaves(encoded(c, step), Codec.leafBytes(c.program[step].wide != 0));
    }

    function roots(Case memory c) internal pure returns (bytes32[] memory all) {
        all = new bytes32[](c.vectors.length);
        for (uint256 i = 0; i < all.length; ++i) {
            all[i] = Forest.root(leaves(c, i));
        }
    }

    function leaf(Case memory c, uint256 step, uint256 index) internal pure returns (bytes memory) {
        bytes memory data = encoded(c, step);
        uint256 size = Codec.leafBytes(c.program[step].wide != 0);
        uint256 start = index * size;
        return Forest.cut(data, start, data.length - start < size ? data.length - start : size);
    }

    /// @notice Partial sums of chunks first .. end-1 of an element, one a chunk: no sum of this model has more than two.
    function sums(Case memory c, uint256 step, uint256 element, uint256 first, uint256 end)
        internal
        pure
        returns (bytes memory list)
    {
        for (uint256 chunk = first; chunk < end; ++chunk) {
            list = bytes.concat(list, Codec.encodeValue(_chunk(c, step, element, chunk), true));
        }
    }

    function _chunk(Case memory c, uint256 step, uint256 element, uint256 chunk) private pure returns (int256 total) {
        uint256 first = chunk * 256;
        uint256 end = first + 256 < Plan.WIDTH ? first + 256 : Plan.WIDTH;
        bool lies = c.lieStep == step && c.lieElement == element && chunk == 1;
        if (c.program[step].op == uint8(Op.SUMSQ)) {
            int256[] memory x = c.segment.kind == Plan.TOKEN ? Batches.served(_row(c, Plan.OUT)) : c.vectors[0];
            return Batches.squares(x, first, end) + (lies ? int256(1) : int256(0));
        }
        uint32 token = element == 0 ? chosen(c.batch, c.segment.position) : c.segment.unit;
        // finish(sum + 2^a) = finish(sum) + 1
        return Batches.products(c.vectors[2], token, first, end) + (lies ? int256(1 << Plan.GAIN_BITS) : int256(0));
    }

    // ---- openings of one step, in the order in which the referee reads

    function openings(Case memory c, uint256 step, uint256 e, uint256 chunk)
        internal
        pure
        returns (Opening[] memory list)
    {
        Op op = Op(c.program[step].op);
        if (op == Op.ADD) {
            list = new Opening[](2);
            uint256 column = c.segment.kind == Plan.K ? c.segment.unit * Plan.BLOCK + e : e;
            list[0] = served(c, Plan.H, column, 1);
            list[1] = served(c, Plan.ATTN, column, 1);
        } else if (op == Op.SUMSQ) {
            list = new Opening[](1);
            uint256 count = chunk == 0 ? 256 : 64;
            bool fromServed = c.segment.kind == Plan.TOKEN;
            list[0] = fromServed ? served(c, Plan.OUT, chunk * 256, count) : _steps(c, 0, chunk * 256, count);
        } else if (op == Op.RSQRT) {
            list = new Opening[](1);
            list[0] = _steps(c, step - 1, 0, 1);
        } else if (op == Op.NORM) {
            list = new Opening[](3);
            list[0] = c.segment.kind == Plan.TOKEN ? served(c, Plan.OUT, e, 1) : _steps(c, 0, e, 1);
            list[1] = _steps(c, step - 1, 0, 1);
            list[2] = weight(Plan.GAIN_LEAF, Plan.gain(), e / 256);
        } else if (op == Op.LOGIT) {
            list = new Opening[](2);
            list[0] = _steps(c, 2, chunk * 256, chunk == 0 ? 256 : 64);
            uint32 token = e == 0 ? chosen(c.batch, c.segment.position) : c.segment.unit;
            list[1] = weight(Plan.TOKEN_LEAF + 2 * token, Plan.embedding(token), chunk);
        } else if (op == Op.VERDICT) {
            list = new Opening[](3);
            bool keys = c.segment.kind == Plan.K;
            uint256 count = c.vectors[step - 1].length;
            list[0] = _steps(c, step - 1, 0, count);
            list[1] = served(c, keys ? Plan.KEYS : Plan.MLP_OUT, c.segment.unit * Plan.BLOCK, count);
            list[2] = _cell(keys ? Plan.K_CELL + c.segment.unit : Plan.MLP_CELL);
        } else {
            list = new Opening[](2);
            list[0] = _steps(c, step - 1, 0, 2);
            list[1] = _cell(Plan.MARGIN_CELL);
        }
    }

    /// @notice Columns first .. first+count-1 of the judged position's row.
    function served(Case memory c, uint8 kind, uint256 first, uint256 count) internal pure returns (Opening memory) {
        return rowOf(c.batch, c.segment.layer, c.segment.position, kind, first, count);
    }

    function rowOf(Batch memory b, uint256 stage, uint256 position, uint8 kind, uint256 first, uint256 count)
        internal
        pure
        returns (Opening memory)
    {
        bytes memory rows = b.tensors[stage][kind];
        uint256 from = first / 256;
        count = (first + count - 1) / 256 - from + 1; // leaves
        bytes32[] memory above = Forest.siblings(Batches.tensorLeaves(b, stage), kind, 1);
        bytes32[] memory within = Forest.siblings(Batches.rowLeaves(rows), 2 * position + from, count);
        uint256 length = from + count == 2 ? Plan.ROW_BYTES - from * 512 : 512;
        return Opening(Forest.cut(rows, position * Plan.ROW_BYTES + from * 512, length), Forest.concat(within, above));
    }

    function weight(uint256 base, bytes memory data, uint256 part) internal pure returns (Opening memory) {
        return Opening(
            part == 0 ? Forest.cut(data, 0, 512) : Forest.cut(data, 512, 128),
            Forest.siblings(Plan.weightLeaves(), base + part, 1)
        );
    }

    function _steps(Case memory c, uint256 step, uint256 first, uint256 count) private pure returns (Opening memory) {
        bytes memory data = encoded(c, step);
        bool wide = c.program[step].wide != 0;
        uint256 size = Codec.leafBytes(wide);
        uint256 from = first / Codec.elementsPerLeaf(wide);
        uint256 to = (first + count - 1) / Codec.elementsPerLeaf(wide);
        uint256 end = (to + 1) * size < data.length ? (to + 1) * size : data.length;
        return Opening(
            Forest.cut(data, from * size, end - from * size), Forest.siblings(leaves(c, step), from, to - from + 1)
        );
    }

    function _cell(uint256 index) private pure returns (Opening memory) {
        return Opening(Plan.cell(index), Forest.siblings(Plan.profileLeaves(), index, 1));
    }

    // ---- values

    function _norm(Case memory c, uint256 first, int256[] memory x) private pure {
        int256 total = Batches.squares(x, 0, Plan.WIDTH);
        c.vectors[first] = _one(total);
        c.vectors[first + 1] = _one(Batches.inverseRoot(total));
        c.vectors[first + 2] = Batches.normed(x);
    }

    function _verdict(int256[] memory standard, int256[] memory told, uint256 cell)
        private
        pure
        returns (int256[] memory)
    {
        int256[][] memory args = new int256[][](3);
        (args[0], args[1], args[2]) = (standard, told, new int256[](3));
        uint256 word = uint256(bytes32(Plan.cell(cell)));
        args[2][0] = int256(word >> 224);
        args[2][1] = int256((word >> 192) & type(uint32).max);
        args[2][2] = int256((word >> 128) & type(uint64).max);
        return _one(Ops.verdict(args, 1 << 49));
    }

    /// @dev As a verdict reads it: what is no number shows.
    function _told(Case memory c, uint8 kind) private pure returns (int256[] memory values) {
        values = Floats.rawBits(_row(c, kind), 0, Plan.WIDTH, 0);
        Floats.decodeServed(values, 0, Floats.INVALID);
    }

    function _row(Case memory c, uint8 kind) private pure returns (bytes memory) {
        return Batches.row(c.batch.tensors[c.segment.layer][kind], c.segment.position);
    }

    function _part(int256[] memory all, uint256 first, uint256 count) private pure returns (int256[] memory part) {
        part = new int256[](count);
        for (uint256 i = 0; i < count; ++i) {
            part[i] = all[first + i];
        }
    }

    function _one(int256 value) private pure returns (int256[] memory list) {
        list = new int256[](1);
        list[0] = value;
    }
}
