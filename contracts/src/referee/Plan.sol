// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Cell, Instruction, Model, Operand} from "../interfaces/IReferee.sol";
import {Codec} from "./Codec.sol";
import {Op, Ops} from "./Ops.sol";

/// @dev How an op sees the floats it reads: decoded with invalid ones as 0, or as INVALID, or as raw bits.
enum View {
    VALUE,
    CHECKED,
    RAW
}

/// @dev One operand's part of a step: columns first .. first+count-1 of `row`, or `rows` rows of one column. Rows are positions (SERVED)
/// or rows of a tensor (WEIGHT), before the unit's stride; vectors and tables have none.
struct Read {
    Operand operand;
    uint256 row;
    uint256 rows;
    uint256 first;
    uint256 count;
    View view_;
    bool ends; // only the first and the last element of the range are used
}

/// @dev What every read of a step needs.
struct Place {
    Model model;
    Cell cell;
    bytes32[] steps;
}

/// @title Plan: what a step reads
/// @notice docs/canonical.md, "Ops"; the Python twin is in verifier/referee/referee.py. All follows from the instruction and the cell.
library Plan {
    /// @dev The op cannot read an operand from this source.
    error UnknownSource(uint8 op, uint8 source);

    // Operand sources, as in the instruction.
    uint8 internal constant STEP = 1;
    uint8 internal constant SERVED = 2;
    uint8 internal constant WEIGHT = 3;
    uint8 internal constant TABLE = 4;
    uint8 internal constant PROFILE = 5;

    /// @dev The served tensor that only the stage of the last layer has.
    uint8 internal constant OUT = 6;

    /// @dev The reads of one chunk of element e, one for each opening; none for the padding of a row of positions.
    function reads(Place memory place, Instruction memory ins, uint256 e, uint256 chunk)
        internal
        pure
        returns (Read[] memory planned)
    {
        Op op = Ops.named(ins.op);
        uint256 t = place.cell.position;
        if (op == Op.LINEAR || op == Op.LOGIT || op == Op.SUMSQ || op == Op.MAX || op == Op.SUM || op == Op.WSUM) {
            return _planChunk(place, ins, op, e, chunk);
        }
        if (op >= Op.RANK) return _planSampled(place, ins, op, chunk);
        if (op == Op.SCORE || op == Op.EXP) {
            (uint256 head, uint256 j) = (e / Codec.paddedPositions(t), e % Codec.paddedPositions(t));
            if (j > t) return planned;
            if (op == Op.EXP) return _two(_of(ins, ins.x, STEP, e, 1), _of(ins, ins.y, STEP, head, 1));
            return _two(
                _row(_of(ins, ins.x, SERVED, head * ins.terms, ins.terms), t),
                _row(_of(ins, ins.y, SERVED, head / ins.b * ins.terms, ins.terms), j)
            );
        }
        if (op == Op.SAME) return _planBlock(place, ins);
        if (op == Op.RSQRT) return _one(_of(ins, ins.x, STEP, 0, 1));
        if (op == Op.NORM) {
            return _three(
                _row(_of(ins, ins.x, ins.x.source == SERVED ? SERVED : STEP, e, 1), t),
                _of(ins, ins.y, STEP, 0, 1),
                _of(ins, ins.z, WEIGHT, e, 1)
            );
        }
        if (op == Op.VERDICT) {
            uint256 n = vectorLength(place, ins.x);
            planned = _three(
                _of(ins, ins.x, STEP, 0, n), _row(_of(ins, ins.y, SERVED, 0, n), t), _of(ins, ins.z, PROFILE, 0, 1)
            );
            planned[1].view_ = View.CHECKED;
            return planned;
        }
        if (op == Op.COMPARE) {
            return _two(_ends(_of(ins, ins.x, STEP, 0, 2)), _of(ins, ins.z, PROFILE, 0, 1));
        }
        if (op == Op.ADD) {
            return _two(_raw(_of(ins, ins.x, SERVED, e, 1), t), _raw(_of(ins, ins.y, SERVED, e, 1), t));
        }
        if (op == Op.ROPE) {
            uint256 half = ins.cols / 2;
            return _two(_ends(_of(ins, ins.x, STEP, e % half, half + 1)), _of(ins, ins.y, TABLE, e % half, 1));
        }
        // DIV divides a row of its elements by one, GATED pairs them.
        return _two(_of(ins, ins.x, STEP, e, 1), _of(ins, ins.y, STEP, op == Op.DIV ? e / ins.cols : e, 1));
    }

    /// @dev The sums: terms start .. start+count-1.
    function _planChunk(Place memory place, Instruction memory ins, Op op, uint256 e, uint256 chunk)
        private
        pure
        returns (Read[] memory planned)
    {
        uint256 t = place.cell.position;
        uint256 size = Codec.chunkTerms(ins.op);
        uint256 start = chunk * size;
        uint256 count = Codec.termCount(ins, t);
        count = count - start < size ? count - start : size;
        bool alone = op == Op.SUMSQ || op == Op.MAX || op == Op.SUM;
        planned = new Read[](alone ? 1 : 2);
        if (op == Op.SUMSQ) {
            planned[0] = _of(ins, ins.x, ins.x.source == SERVED ? SERVED : STEP, start, count);
            planned[0].row = t;
        } else if (op == Op.MAX || op == Op.SUM) {
            planned[0] = _of(ins, ins.x, STEP, e * Codec.paddedPositions(t) + start, count);
        } else if (op == Op.WSUM) {
            planned[0] = _of(ins, ins.x, STEP, e / ins.cols * Codec.paddedPositions(t) + start, count);
            planned[1] = _of(ins, ins.y, SERVED, _valueColumn(ins, e), 1);
            (planned[1].row, planned[1].rows) = (start, count);
        } else {
            planned[0] = _of(ins, ins.x, STEP, start, count);
            planned[1] = _of(ins, ins.y, WEIGHT, start, count);
            planned[1].row = op == Op.LINEAR ? e : e == 0 ? place.cell.token : place.cell.unit;
        }
    }

    /// @dev The sampling ops: each reads its logits, or what was folded from them, and the margin.
    function _planSampled(Place memory place, Instruction memory ins, Op op, uint256 chunk)
        private
        pure
        returns (Read[] memory)
    {
        if (op == Op.STANDING) return _two(_of(ins, ins.x, STEP, 0, 1), _of(ins, ins.y, STEP, 0, 1));
        Read memory logits;
        if (op == Op.CHOICE) {
            logits = _of(ins, ins.x, STEP, place.cell.token, 1);
        } else {
            uint256 size = Codec.chunkTerms(ins.op);
            uint256 rest = Codec.termCount(ins, place.cell.position) - chunk * size;
            logits = _of(ins, ins.x, STEP, chunk * size, rest < size ? rest : size);
        }
        Read memory judged = _of(ins, ins.x, STEP, place.cell.unit, 1);
        if (op == Op.RANK) return _three(logits, judged, _of(ins, ins.z, PROFILE, 0, 1));
        return _four(logits, judged, _of(ins, ins.y, STEP, 0, 1), _of(ins, ins.z, PROFILE, 0, 1));
    }

    /// @dev The column of v that element e of a WSUM weighs: b heads share a head of v.
    function _valueColumn(Instruction memory ins, uint256 e) private pure returns (uint256) {
        return e / ins.cols / ins.b * ins.cols + e % ins.cols;
    }

    /// @dev SAME: one block of raw bits of each operand.
    function _planBlock(Place memory place, Instruction memory ins) private pure returns (Read[] memory) {
        uint256 start = uint256(place.cell.unit) * ins.x.unitStride;
        // A unit beyond the tensor reads one column there, which is refused as out of range.
        uint256 count = start < ins.x.width ? ins.x.width - start : 1;
        if (count > Codec.BLOCK) count = Codec.BLOCK;
        Read memory x = _raw(_of(ins, ins.x, SERVED, 0, count), place.cell.position);
        return _two(x, _raw(_of(ins, ins.y, WEIGHT, start, count), place.cell.token));
    }

    /// @dev A read of one row from an operand, which must have the source that the op can read.
    function _of(Instruction memory ins, Operand memory operand, uint8 source, uint256 first, uint256 count)
        private
        pure
        returns (Read memory)
    {
        if (operand.source != source) revert UnknownSource(ins.op, operand.source);
        return Read(operand, 0, 1, first, count, View.VALUE, false);
    }

    /// @dev The same read, of a row.
    function _row(Read memory read, uint256 row) private pure returns (Read memory) {
        read.row = row;
        return read;
    }

    /// @dev The raw bits of a row.
    function _raw(Read memory read, uint256 row) private pure returns (Read memory) {
        read.view_ = View.RAW;
        return _row(read, row);
    }

    function _ends(Read memory read) private pure returns (Read memory) {
        read.ends = true;
        return read;
    }

    function _one(Read memory x) private pure returns (Read[] memory planned) {
        planned = new Read[](1);
        planned[0] = x;
    }

    function _two(Read memory x, Read memory y) private pure returns (Read[] memory planned) {
        planned = new Read[](2);
        (planned[0], planned[1]) = (x, y);
    }

    function _three(Read memory x, Read memory y, Read memory z) private pure returns (Read[] memory planned) {
        planned = new Read[](3);
        (planned[0], planned[1], planned[2]) = (x, y, z);
    }

    function _four(Read memory x, Read memory y, Read memory z, Read memory last)
        private
        pure
        returns (Read[] memory planned)
    {
        planned = new Read[](4);
        (planned[0], planned[1], planned[2], planned[3]) = (x, y, z, last);
    }

    /// @dev Elements of the vector that a STEP operand reads.
    function vectorLength(Place memory place, Operand memory operand) internal pure returns (uint256) {
        return Codec.vectorLength(operand.base, operand.width, operand.unitStride, place.cell.position, place.cell.unit);
    }

    /// @dev Length of part `index` when `width` is cut into parts of `size`.
    function part(uint256 width, uint256 index, uint256 size) internal pure returns (uint256) {
        uint256 rest = width - index * size;
        return rest < size ? rest : size;
    }
}
