// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @title Records: the committed records, read totally
/// @notice docs/protocol.md, "Records".
/// @dev Rationale: whoever commits a record of the wrong length must not escape by it, so what is missing reads as zero and what is too much is
/// ignored; STOP convicts the last stage for the malformed ones, and a trace node that reads as too short falls to LENGTH.
library Records {
    uint256 internal constant OUTPUT_BYTES = 52;
    uint256 internal constant TRACE_NODE_BYTES = 40;
    uint256 internal constant TOKENS_PER_LEAF = 128;
    uint256 internal constant MAX_STOPS = 8;
    /// @dev Bytes of a hand-off of a token, and of that of a row block before the block.
    uint256 internal constant HANDOFF_HEAD_BYTES = 12;

    /// @notice The big-endian integer of `size` bytes (1 .. 32) at `offset`.
    function read(bytes memory data, uint256 offset, uint256 size) internal pure returns (uint256 value) {
        if (offset >= data.length) return 0;
        assembly ("memory-safe") {
            value := shr(sub(256, mul(size, 8)), mload(add(add(data, 32), offset)))
        }
        uint256 end = offset + size;
        if (end > data.length) {
            uint256 missingBits = 8 * (end - data.length);
            value = (value >> missingBits) << missingBits;
        }
    }

    /// @notice First field of every record: request `r`.
    function index(bytes memory record) internal pure returns (uint256) {
        return read(record, 0, 4);
    }

    // ---- request

    function promptCount(bytes memory request) internal pure returns (uint256) {
        return read(request, 4, 4);
    }

    function limit(bytes memory request) internal pure returns (uint256) {
        return read(request, 8, 4);
    }

    /// @notice What SAMPLE knows of request `r`: temperature u32 | topK u32 | topP u32 | seed u64 | r u32 | 0; zero if it is greedy.
    function sampling(bytes memory request, uint32 r) internal pure returns (bytes32) {
        if (read(request, 12, 4) == 0) return 0;
        return bytes32(read(request, 12, 20) << 96 | uint256(r) << 64);
    }

    function promptRoot(bytes memory request) internal pure returns (bytes32) {
        return bytes32(read(request, 68, 32));
    }

    function isStop(bytes memory request, uint256 id) internal pure returns (bool) {
        uint256 stops = read(request, 32, 4);
        if (stops > MAX_STOPS) stops = MAX_STOPS;
        for (uint256 i = 0; i < stops; ++i) {
            if (read(request, 36 + 4 * i, 4) == id) return true;
        }
        return false;
    }

    // ---- output

    function start(bytes memory output) internal pure returns (uint256) {
        return read(output, 4, 8);
    }

    function count(bytes memory output) internal pure returns (uint256) {
        return read(output, 12, 4);
    }

    function code(bytes memory output) internal pure returns (uint256) {
        return read(output, 16, 4);
    }

    function tokensRoot(bytes memory output) internal pure returns (bytes32) {
        return bytes32(read(output, 20, 32));
    }

    // ---- trace node

    function positions(bytes memory node) internal pure returns (uint256) {
        return read(node, 4, 4);
    }

    function tensorsRoot(bytes memory node) internal pure returns (bytes32) {
        return bytes32(read(node, 8, 32));
    }

    // ---- tokens

    /// @notice Leaves of a list of `tokens` ids.
    function tokenLeaves(uint256 tokens) internal pure returns (uint256) {
        return (tokens + TOKENS_PER_LEAF - 1) / TOKENS_PER_LEAF;
    }

    /// @notice Token `place` of the whole list, from the leaf that holds it.
    function token(bytes memory leaf, uint256 place) internal pure returns (uint256) {
        return read(leaf, 4 * (place % TOKENS_PER_LEAF), 4);
    }
}
