// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Cell, Instruction, IReferee, Model, Opening, Operand, Proof, Trace} from "../interfaces/IReferee.sol";
import {Codec} from "./Codec.sol";
import {Floats} from "./Floats.sol";
import {Op, Ops} from "./Ops.sol";
import {Packed} from "./Packed.sol";
import {Place, Plan, Read, View} from "./Plan.sol";
import {Sampler} from "./Sampler.sol";
import {Sampling} from "./Sampling.sol";
import {Tree} from "./Tree.sol";

/// @title Referee: the one-step judge
/// @notice docs/canonical.md, "Openings"; the Python twin is verifier/referee/referee.py.
/// @dev Every step has the same beats: plan its reads, read and check each opening, compute. Nothing is taken from the caller that the
/// model, the cell or the instruction implies. What it reads is planned in Plan; longer than a sitting, because the checks of those reads are one argument.
contract Referee is IReferee {
    /// @dev The instruction's vector has `count` elements at this place.
    error ElementOutOfRange(uint256 element, uint256 count);
    /// @dev The element's sum has `count` chunks at this place.
    error ChunkOutOfRange(uint256 chunk, uint256 count);
    /// @dev The step has `expected` reads, each with an opening.
    error OpeningCount(uint256 expected, uint256 actual);
    /// @dev An opening does not belong to the committed tree.
    error RootMismatch(bytes32 expected, bytes32 actual);

    // Served tensor kinds, by their place among a layer's six.
    uint8 private constant V = 3;
    uint256 private constant KINDS = 6;

    /// @dev Elements of a served or weight leaf, and sides of the tiles of v: 8 x 32 is a leaf again.
    uint256 private constant BLOCK = Codec.BLOCK;
    uint256 private constant TILE_ROWS = Codec.WSUM_TERMS;
    uint256 private constant TILE_COLUMNS = 32;
    uint256 private constant TABLE_LEAF = 64;
    uint256 private constant TABLE_BYTES = 8;
    uint256 private constant PROFILE_BYTES = 16;

    /// @notice Computes the ops of sampling.
    Sampler public immutable sampler = new Sampler();

    /// @inheritdoc IReferee
    function judge(Cell calldata cell, uint64 element, uint32 chunk, Proof calldata proof)
        external
        view
        returns (int256)
    {
        Place memory place = Place(proof.model, cell, proof.steps);
        Instruction memory ins = Codec.instruction(proof.record);
        _number(ins);
        return _step(place, ins, element, chunk, proof.openings);
    }

    /// @dev The operands that read a vector name its root's place in the proof from here on.
    function _number(Instruction memory ins) private pure {
        uint8 place = 0;
        if (ins.x.source == Plan.STEP) ins.x.id = place++;
        if (ins.y.source == Plan.STEP) ins.y.id = place++;
        if (ins.z.source == Plan.STEP) ins.z.id = place;
    }

    function _step(
        Place memory place,
        Instruction memory ins,
        uint256 element,
        uint256 chunk,
        Opening[] calldata openings
    ) private view returns (int256) {
        uint256 elements = Codec.elementCount(ins, place.cell.position, place.cell.unit);
        if (element >= elements) revert ElementOutOfRange(element, elements);
        uint256 chunks = Codec.chunkCount(ins, place.cell.position);
        if (chunk >= chunks) revert ChunkOutOfRange(chunk, chunks);
        Read[] memory reads = Plan.reads(place, ins, element, chunk);
        if (openings.length != reads.length) revert OpeningCount(reads.length, openings.length);
        if (reads.length == 0) return 0;

        if (_isPacked(place, ins, reads)) return _packed(place, ins, reads, openings);
        int256[][] memory args = new int256[][](reads.length);
        for (uint256 i = 0; i < args.length; ++i) {
            args[i] = _read(place, reads[i], openings[i]);
            if (reads[i].ends) args[i] = _pair(args[i][0], args[i][args[i].length - 1]);
        }
        if (ins.op >= uint8(Op.RANK)) args = _withDraw(args, place.cell, chunk * Codec.chunkTerms(ins.op));
        if (ins.op == uint8(Op.ROPE)) {
            return Ops.run(ins.op, args, place.cell.position, element < ins.cols / 2 ? 0 : 1);
        }
        return _run(ins.op, args, ins.a, ins.b);
    }

    /// @dev `args` and, last, what the sampling ops know of the draw besides.
    function _withDraw(int256[][] memory args, Cell memory cell, uint256 first)
        private
        pure
        returns (int256[][] memory all)
    {
        all = new int256[][](args.length + 1);
        for (uint256 i = 0; i < args.length; ++i) {
            all[i] = args[i];
        }
        all[args.length] = Sampling.listOf(cell.sampling, cell.position, cell.token, cell.unit, first);
    }

    /// @inheritdoc IReferee
    function run(uint8 op, int256[][] calldata args, uint64 a, uint32 b) external view returns (int256) {
        return _run(op, args, a, b);
    }

    /// @inheritdoc IReferee
    function finish(uint8 op, int256 total, uint64 a) external pure returns (int256) {
        return Ops.finish(op, total, a);
    }

    function _run(uint8 op, int256[][] memory args, uint256 a, uint256 b) private view returns (int256) {
        if (op < uint8(Op.RANK)) return Ops.run(op, args, a, b);
        return sampler.run(op, Sampling.pack(args));
    }

    /// @dev Whether a step is a long sum over narrow integers and bfloat16, as most games end with.
    function _isPacked(Place memory place, Instruction memory ins, Read[] memory reads) private pure returns (bool) {
        bool verdict = ins.op == uint8(Op.VERDICT);
        if (!verdict && ins.op != uint8(Op.LINEAR) && ins.op != uint8(Op.LOGIT)) return false;
        uint8 dtype = verdict ? place.model.servedDtype : place.model.weightDtype;
        return dtype == Floats.BFLOAT16 && !_isWide(reads[0].operand);
    }

    function _packed(Place memory place, Instruction memory ins, Read[] memory reads, Opening[] calldata openings)
        private
        pure
        returns (int256)
    {
        uint256 x = _addressOf(place, reads[0], openings[0], 8);
        uint256 y = _addressOf(place, reads[1], openings[1], 2);
        if (ins.op != uint8(Op.VERDICT)) return Packed.linear(x, y, reads[0].count);
        int256[] memory cell = _read(place, reads[2], openings[2]);
        return Packed.verdict(x, y, reads[0].count, ins.a, cell);
    }

    /// @dev Where in memory the elements of a read, of `size` bytes each, lie.
    function _addressOf(Place memory place, Read memory read, Opening calldata opening, uint256 size)
        private
        pure
        returns (uint256 start)
    {
        (bytes memory data, uint256 from) = _open(place, read, opening);
        assembly ("memory-safe") {
            start := add(add(data, 32), mul(size, from))
        }
    }

    // ---- read and check

    /// @dev Whether a STEP operand's vector has wide elements.
    function _isWide(Operand memory operand) private pure returns (bool) {
        return operand.layerStride != 0;
    }

    /// @dev The values of a read from its opening.
    function _read(Place memory place, Read memory read, Opening calldata opening)
        private
        pure
        returns (int256[] memory)
    {
        (bytes memory data, uint256 from) = _open(place, read, opening);
        uint8 source = read.operand.source;
        if (source == Plan.STEP) return Codec.decodeValues(data, from, read.count, _isWide(read.operand));
        if (source == Plan.TABLE || source == Plan.PROFILE) return _fields(data, from, source == Plan.PROFILE);
        uint256 count = read.rows * read.count;
        uint256 dtype = source == Plan.WEIGHT ? place.model.weightDtype : place.model.servedDtype;
        if (read.view_ == View.RAW) return Floats.rawBits(data, from, count, dtype);
        if (source == Plan.WEIGHT) return Floats.weights(data, from, count, dtype);
        return Floats.served(data, from, count, dtype, read.view_ == View.CHECKED ? Floats.INVALID : int256(0));
    }

    /// @dev An entry of the RoPE table, or the three fields of a cell of the profile.
    function _fields(bytes memory data, uint256 from, bool cell) private pure returns (int256[] memory fields) {
        uint256 word;
        assembly ("memory-safe") {
            word := mload(add(add(data, 32), mul(from, TABLE_BYTES)))
        }
        fields = new int256[](cell ? 3 : 1);
        if (!cell) {
            fields[0] = int256(word >> 192);
            return fields;
        }
        fields[0] = int256(word >> 224);
        fields[1] = int256((word >> 192) & type(uint32).max);
        fields[2] = int256((word >> 128) & type(uint64).max);
    }

    /// @dev Checks an opening.
    /// @return data bytes in which the read's elements lie one after another
    /// @return from the first of these elements
    function _open(Place memory place, Read memory read, Opening calldata opening)
        private
        pure
        returns (bytes memory data, uint256 from)
    {
        data = opening.data;
        uint8 source = read.operand.source;
        if (source == Plan.STEP) return (data, _openStep(place, read, data, opening.siblings));
        if (source == Plan.TABLE) return (data, _openTable(place, read, data, opening.siblings));
        if (source == Plan.PROFILE) return (data, _openProfile(place, read, data, opening.siblings));
        if (source == Plan.WEIGHT) return (data, _openWeight(place, read, data, opening.siblings));
        if (read.operand.id == V) return (_openTiles(place, read, data, opening.siblings), 0);
        return (data, _openServed(place, read, data, opening.siblings));
    }

    function _openStep(Place memory place, Read memory read, bytes memory data, bytes32[] memory siblings)
        private
        pure
        returns (uint256)
    {
        Operand memory from = read.operand;
        bool wide = _isWide(from);
        uint256 length = Plan.vectorLength(place, from);
        uint256 leaf =
            _leaf(data, read.first, read.count, length, Codec.elementsPerLeaf(wide), Codec.elementBytes(wide));
        bytes32[] memory hashes = Tree.leaves(data, Codec.leafBytes(wide));
        bytes32 root = Tree.rootOfRange(hashes, leaf, Codec.leafCount(length, wide), siblings);
        if (from.id >= place.steps.length) revert Tree.IndexOutOfRange(from.id, 1, place.steps.length);
        _rooted(place.steps[from.id], root);
        return read.first - leaf * Codec.elementsPerLeaf(wide);
    }

    function _openTable(Place memory place, Read memory read, bytes memory data, bytes32[] memory siblings)
        private
        pure
        returns (uint256)
    {
        uint256 leaf = _leaf(data, read.first, read.count, read.operand.width, TABLE_LEAF, TABLE_BYTES);
        uint256 index = read.operand.base + leaf;
        Model memory model = place.model;
        _inTree(model.programRoot, data, siblings, TABLE_LEAF * TABLE_BYTES, index, model.programLeaves);
        return read.first - leaf * TABLE_LEAF;
    }

    function _openProfile(Place memory place, Read memory read, bytes memory data, bytes32[] memory siblings)
        private
        pure
        returns (uint256)
    {
        Operand memory from = read.operand;
        if (data.length != PROFILE_BYTES) revert Codec.DataLength(PROFILE_BYTES, data.length);
        uint256 index = _layerBase(place, from) + uint256(place.cell.unit) * from.unitStride;
        _inTree(place.model.profileRoot, data, siblings, PROFILE_BYTES, index, place.model.profileLeaves);
        return 0;
    }

    /// @dev A part of a weight's row.
    function _openWeight(Place memory place, Read memory read, bytes memory data, bytes32[] memory siblings)
        private
        pure
        returns (uint256)
    {
        Operand memory from = read.operand;
        uint256 size = Floats.elementBytes(place.model.weightDtype);
        uint256 leaf = _leaf(data, read.first, read.count, from.width, BLOCK, size);
        uint256 row = uint256(place.cell.unit) * from.unitStride + read.row;
        uint256 index = _layerBase(place, from) + row * _parts(from.width, BLOCK) + leaf;
        _inTree(place.model.weightsRoot, data, siblings, BLOCK * size, index, place.model.weightsLeaves);
        return read.first - leaf * BLOCK;
    }

    /// @dev A part of one position's row of a served tensor.
    function _openServed(Place memory place, Read memory read, bytes memory data, bytes32[] memory siblings)
        private
        pure
        returns (uint256)
    {
        uint256 width = read.operand.width;
        uint256 positions = place.cell.trace.positions;
        uint256 size = Floats.elementBytes(place.model.servedDtype);
        uint256 column = uint256(place.cell.unit) * read.operand.unitStride + read.first;
        _within(read.row, read.rows, positions);
        uint256 leaf = _leaf(data, column, read.count, width, BLOCK, size);
        uint256 first = read.row * _parts(width, BLOCK) + leaf;
        _inTrace(place, read, data, siblings, BLOCK * size, first, positions * _parts(width, BLOCK));
        return column - leaf * BLOCK;
    }

    /// @dev A part of one row, or of one column within a tile, of a tensor in tiles.
    /// @return the elements alone
    function _openTiles(Place memory place, Read memory read, bytes memory data, bytes32[] memory siblings)
        private
        pure
        returns (bytes memory)
    {
        uint256 width = read.operand.width;
        uint256 positions = place.cell.trace.positions;
        uint256 column = uint256(place.cell.unit) * read.operand.unitStride + read.first;
        _within(read.row, read.rows, positions);
        uint256 height = Plan.part(positions, read.row / TILE_ROWS, TILE_ROWS);
        {
            // Tiles of one band are the leaves of a row whose every column is `height` elements tall.
            uint256 size = height * Floats.elementBytes(place.model.servedDtype);
            uint256 tile = _leaf(data, column, read.count, width, TILE_COLUMNS, size);
            _within(read.row % TILE_ROWS, read.rows, TILE_ROWS);
            uint256 first = read.row / TILE_ROWS * _parts(width, TILE_COLUMNS) + tile;
            uint256 tiles = _parts(positions, TILE_ROWS) * _parts(width, TILE_COLUMNS);
            _inTrace(place, read, data, siblings, TILE_COLUMNS * size, first, tiles);
        }
        return _tiled(read, data, column, height, Floats.elementBytes(place.model.servedDtype));
    }

    /// @dev The bytes of a column within a tile, or of one row across tiles, of tiles that are `height` elements tall. All but the row's last
    /// tile are full.
    function _tiled(Read memory read, bytes memory data, uint256 column, uint256 height, uint256 size)
        private
        pure
        returns (bytes memory wanted)
    {
        uint256 start = column - column % TILE_COLUMNS; // of the first tile
        wanted = new bytes(read.rows * read.count * size);
        uint256 done = 0;
        for (uint256 c = column; done < wanted.length;) {
            uint256 wide = Plan.part(read.operand.width, c / TILE_COLUMNS, TILE_COLUMNS);
            uint256 here = wide - c % TILE_COLUMNS;
            if (here > column + read.count - c) here = column + read.count - c;
            uint256 from = (c - c % TILE_COLUMNS - start) * height + c % TILE_COLUMNS;
            for (uint256 row = read.row % TILE_ROWS; row < read.row % TILE_ROWS + read.rows; ++row) {
                uint256 place_ = (from + row * wide) * size;
                assembly ("memory-safe") {
                    mcopy(add(add(wanted, 32), done), add(add(data, 32), place_), mul(here, size))
                }
                done += here * size;
            }
            c += here;
        }
    }

    // ---- what the reads share

    /// @dev Requires `data` to be the leaves that hold columns first .. first+count-1 of a row of `width`, cut into leaves of `perLeaf`.
    /// @return leaf the first of these leaves, counted from the row's start
    function _leaf(bytes memory data, uint256 first, uint256 count, uint256 width, uint256 perLeaf, uint256 size)
        private
        pure
        returns (uint256 leaf)
    {
        _within(first, count, width);
        leaf = first / perLeaf;
        uint256 end = ((first + count - 1) / perLeaf + 1) * perLeaf;
        uint256 expected = ((end < width ? end : width) - leaf * perLeaf) * size;
        if (data.length != expected) revert Codec.DataLength(expected, data.length);
    }

    /// @dev Requires the opened leaves of `leafBytes` each to be those from `first` on in the tree of a `root`.
    function _inTree(
        bytes32 root,
        bytes memory data,
        bytes32[] memory siblings,
        uint256 leafBytes,
        uint256 first,
        uint256 count
    ) private pure {
        _rooted(root, Tree.rootOfRange(Tree.leaves(data, leafBytes), first, count, siblings));
    }

    /// @dev Requires the opened leaves to be those from `first` on in a served tensor of `count` leaves, and the tensor to be in the trace's
    /// tree, by the siblings that are left.
    function _inTrace(
        Place memory place,
        Read memory read,
        bytes memory data,
        bytes32[] memory siblings,
        uint256 leafBytes,
        uint256 first,
        uint256 count
    ) private pure {
        (uint256 index, uint256 tensors) = _tensor(place, read.operand.id);
        (bytes32 root, uint256 used) = Tree.climb(Tree.leaves(data, leafBytes), first, count, siblings, 0);
        bytes32[] memory hashes = new bytes32[](1);
        hashes[0] = Tree.leaf(bytes.concat(root));
        (root, used) = Tree.climb(hashes, index, tensors, siblings, used);
        if (used != siblings.length) revert Tree.ProofLength(used, siblings.length);
        _rooted(place.cell.trace.root, root);
    }

    function _rooted(bytes32 expected, bytes32 actual) private pure {
        if (expected != actual) revert RootMismatch(expected, actual);
    }

    /// @dev A served tensor's place among the trace's, and how many those are: six a layer; the stage of the last layer adds `out`.
    function _tensor(Place memory place, uint256 kind) private pure returns (uint256 index, uint256 count) {
        Trace memory trace = place.cell.trace;
        uint256 layer = place.cell.layer;
        uint256 layers = uint256(trace.endLayer) - trace.firstLayer;
        count = KINDS * layers + (trace.endLayer == place.model.layers ? 1 : 0);
        if (kind == Plan.OUT) return (KINDS * layers, count);
        _within(kind, 1, KINDS);
        _within(layer, 1, trace.endLayer);
        if (layer < trace.firstLayer) revert Tree.IndexOutOfRange(layer, 1, trace.firstLayer);
        index = KINDS * (layer - trace.firstLayer) + kind;
    }

    /// @dev The first leaf that an operand names in its layer.
    function _layerBase(Place memory place, Operand memory from) private pure returns (uint256) {
        return uint256(from.base) + uint256(place.cell.layer) * from.layerStride;
    }

    /// @dev Requires first .. first+count-1 to be at least one place below `limit`.
    function _within(uint256 first, uint256 count, uint256 limit) private pure {
        if (count == 0 || count > limit || first > limit - count) revert Tree.IndexOutOfRange(first, count, limit);
    }

    /// @dev Into how many parts of `size` a width is cut.
    function _parts(uint256 width, uint256 size) private pure returns (uint256) {
        return (width + size - 1) / size;
    }

    function _pair(int256 a, int256 b) private pure returns (int256[] memory pair) {
        pair = new int256[](2);
        (pair[0], pair[1]) = (a, b);
    }
}
