// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Instruction, Operand} from "../../../contracts/src/interfaces/IReferee.sol";
import {Codec, SegmentHeader} from "../../../contracts/src/referee/Codec.sol";
import {Base} from "../Base.t.sol";

contract CodecTest is Base {
    function test_RevertsOnRecordsOfAnotherLength() public {
        vm.expectRevert(abi.encodeWithSelector(Codec.DataLength.selector, 128, 127));
        this.instruction(new bytes(127));
        vm.expectRevert(abi.encodeWithSelector(Codec.DataLength.selector, 16, 17));
        this.header(new bytes(17));
        vm.expectRevert(abi.encodeWithSelector(Codec.DataLength.selector, 16, 15));
        this.values(new bytes(15), 0, 2);
    }

    function instruction(bytes memory data) external pure returns (Instruction memory) {
        return Codec.instruction(data);
    }

    function header(bytes memory data) external pure returns (SegmentHeader memory) {
        return Codec.header(data);
    }

    function values(bytes memory data, uint256 first, uint256 count) external pure returns (int256[] memory) {
        return Codec.decodeValues(data, first, count, false);
    }

    function testFuzz_NarrowValuesComeBack(int64[] memory many) public pure {
        bytes memory data;
        for (uint256 i = 0; i < many.length; ++i) {
            data = bytes.concat(data, Codec.encodeValue(many[i], false));
        }
        assertEq(data.length, 8 * many.length, "bytes");
        int256[] memory back = Codec.decodeValues(data, 0, many.length, false);
        for (uint256 i = 0; i < many.length; ++i) {
            assertEq(back[i], many[i], "value");
            assertEq(Codec.decodeValue(data, i, false), many[i], "alone");
        }
    }

    function testFuzz_WideValuesComeBack(int128 value) public pure {
        bytes memory data = Codec.encodeValue(value, true);
        assertEq(data.length, 16, "bytes");
        assertEq(Codec.decodeValue(data, 0, true), value, "value");
    }

    function testFuzz_EveryStringOfEightBytesIsOneValue(uint64 code) public pure {
        bytes memory data = abi.encodePacked(code);
        assertEq(Codec.encodeValue(Codec.decodeValue(data, 0, false), false), data, "bytes");
    }

    function testFuzz_InstructionsComeBack(Instruction memory ins) public pure {
        bytes memory data = bytes.concat(
            abi.encodePacked(ins.op, ins.wide, ins.rows, ins.cols, ins.limit, ins.terms, ins.a, ins.b, bytes2(0)),
            _packed(ins.x),
            _packed(ins.y),
            _packed(ins.z)
        );
        assertEq(data.length, 128, "bytes");
        assertEq(abi.encode(Codec.instruction(data)), abi.encode(ins), "instruction");
    }

    function testFuzz_HeadersComeBack(uint32 first, uint32 steps, uint32 units) public pure {
        SegmentHeader memory head = Codec.header(abi.encodePacked(first, steps, units, uint32(0)));
        assertEq(abi.encode(head), abi.encode(SegmentHeader(first, steps, units)), "header");
    }

    function testFuzz_PositionsArePaddedToWholeChunks(uint32 position) public pure {
        uint256 padded = Codec.paddedPositions(position);
        assertEq(padded % 256, 0, "whole chunks");
        assertTrue(padded > position && padded - position <= 256, "the least that holds the position");
    }

    function testFuzz_UnitsShareALimitedRow(uint16 cols_, uint16 limit_) public pure {
        Instruction memory ins;
        (ins.rows, ins.cols, ins.limit) =
        (1, uint32(bound(uint256(cols_), 1, 600)), uint32(bound(uint256(limit_), 1, 3000)));
        uint256 total = 0;
        uint256 units = (uint256(ins.limit) + ins.cols - 1) / ins.cols;
        for (uint256 unit = 0; unit < units; ++unit) {
            total += Codec.elementCount(ins, 0, unit);
        }
        assertEq(total, ins.limit, "all units together");
        assertEq(Codec.elementCount(ins, 0, units), 0, "no unit beyond");
    }

    function testFuzz_ChunksCoverAllTerms(uint8 op, uint32 terms, uint32 position) public pure {
        Instruction memory ins;
        (ins.op, ins.terms) = (op, terms);
        uint256 chunks = Codec.chunkCount(ins, position);
        uint256 all = terms == type(uint32).max ? uint256(position) + 1 : terms;
        uint256 size = op == 11 ? 8 : op == 19 || op == 20 ? 128 : 256;
        assertTrue(chunks >= 1 && chunks * size >= all && (chunks == 1 || (chunks - 1) * size < all), "chunks");
    }

    function testFuzz_AListOfPartialSumsHasAtMost32Entries(uint40 chunks_) public pure {
        uint256 chunks = bound(uint256(chunks_), 1, type(uint40).max);
        uint256 span = Codec.span(chunks);
        assertTrue(span * 32 >= chunks, "covered");
        assertTrue(span == 1 || span < chunks, "more than one entry");
    }

    function _packed(Operand memory operand) private pure returns (bytes memory) {
        return abi.encodePacked(
            operand.source, operand.id, operand.base, operand.layerStride, operand.unitStride, operand.width, bytes6(0)
        );
    }
}
