// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @notice The leaves of a committed tree, seen as tiles of a table: row by row of tiles, those at the lower and right edge smaller.
struct Grid {
    uint256 rows;
    uint256 width; // columns
    uint256 tall; // rows of a whole tile
    uint256 wide; // columns of a whole tile
    uint256 elementBytes;
}

/// @title Grid: how many leaves a tree has, and how long each is
/// @notice docs/canonical.md, "Served tensors"; docs/protocol.md, "Records". The Python twin is verifier/demand.py.
/// @dev Token lists are tables of one column, 128 rows a leaf; lists of roots have one of 32 bytes a leaf.
library Grids {
    /// @dev The leaves do not have exactly the bytes that the grid implies.
    error DataLength(uint256 expected, uint256 actual);

    function leaves(Grid memory grid) internal pure returns (uint256) {
        return _ceil(grid.rows, grid.tall) * _ceil(grid.width, grid.wide);
    }

    /// @notice Bytes of the longest leaf, wherever the rows end.
    function leafBytes(Grid memory grid) internal pure returns (uint256) {
        return grid.tall * (grid.width < grid.wide ? grid.width : grid.wide) * grid.elementBytes;
    }

    /// @notice Bytes of leaf `index` < leaves.
    function bytesOf(Grid memory grid, uint256 index) internal pure returns (uint256) {
        uint256 across = _ceil(grid.width, grid.wide);
        uint256 rows = grid.rows - index / across * grid.tall;
        uint256 columns = grid.width - index % across * grid.wide;
        if (rows > grid.tall) rows = grid.tall;
        if (columns > grid.wide) columns = grid.wide;
        return rows * columns * grid.elementBytes;
    }

    /// @notice Hashes of leaves first .. first+count-1, which lie within the grid, concatenated in `data`.
    function hashes(Grid memory grid, uint256 first, uint256 count, bytes calldata data)
        internal
        view
        returns (bytes32[] memory list)
    {
        list = new bytes32[](count);
        // One buffer for all preimages, the leaf's prefix 0x00 before its bytes.
        bytes memory preimage = new bytes(leafBytes(grid) + 1);
        uint256 start;
        for (uint256 i; i < count; ++i) {
            uint256 size = bytesOf(grid, first + i);
            // SAFETY: nothing beyond the data is hashed.
            if (start + size > data.length) revert DataLength(start + size, data.length);
            bytes32 hash;
            assembly ("memory-safe") {
                calldatacopy(add(preimage, 33), add(data.offset, start), size)
                // SAFETY: fails for lack of gas alone; then nothing must be taken for the hash.
                if iszero(staticcall(gas(), 2, add(preimage, 32), add(size, 1), 0, 32)) { revert(0, 0) }
                hash := mload(0)
            }
            list[i] = hash;
            start += size;
        }
        if (start != data.length) revert DataLength(start, data.length);
    }

    function _ceil(uint256 a, uint256 b) private pure returns (uint256) {
        return (a + b - 1) / b;
    }
}
