// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Records} from "./Records.sol";

/// @title Exact: the rules that judge records
/// @notice docs/protocol.md, "Segments": STOP and BILL. Each says whether the rule is broken.
library Exact {
    uint256 private constant ENDED_AT_STOP = 1;
    uint256 private constant ENDED_AT_LIMIT = 2;

    /// @notice What STOP asks of a request's records without looking at a token.
    /// @param node the last stage's trace node
    function stopBroken(bytes memory request, bytes memory output, bytes memory node, uint256 r)
        internal
        pure
        returns (bool)
    {
        uint256 count = Records.count(output);
        uint256 code = Records.code(output);
        if (output.length != Records.OUTPUT_BYTES || Records.index(output) != r) return true;
        if (node.length != Records.TRACE_NODE_BYTES || Records.index(node) != r) return true;
        if (code != ENDED_AT_STOP && code != ENDED_AT_LIMIT) return true;
        if (count == 0 || count > Records.limit(request)) return true;
        if (code == ENDED_AT_LIMIT && count != Records.limit(request)) return true;
        return Records.positions(node) != Records.promptCount(request) + count - 1;
    }

    /// @notice What STOP asks of output token `place`, which `leaf` holds.
    function tokenBroken(
        bytes memory request,
        bytes memory output,
        bytes memory leaf,
        uint256 place,
        uint256 vocabulary
    ) internal pure returns (bool) {
        uint256 count = Records.count(output);
        uint256 held = count - place / Records.TOKENS_PER_LEAF * Records.TOKENS_PER_LEAF;
        if (held > Records.TOKENS_PER_LEAF) held = Records.TOKENS_PER_LEAF;
        if (leaf.length != 4 * held) return true;
        uint256 token = Records.token(leaf, place);
        if (token >= vocabulary) return true;
        bool mustStop = place == count - 1 && Records.code(output) == ENDED_AT_STOP;
        return Records.isStop(request, token) != mustStop;
    }

    /// @notice BILL: the first output starts at 0, each starts where its predecessor ends, the last ends at the committed total.
    /// @param next output record r + 1; unread for the last request
    function billBroken(uint256 r, uint256 requests, bytes memory output, bytes memory next, uint256 total)
        internal
        pure
        returns (bool)
    {
        if (r == 0 && Records.start(output) != 0) return true;
        return Records.start(output) + Records.count(output) != (r + 1 == requests ? total : Records.start(next));
    }
}
