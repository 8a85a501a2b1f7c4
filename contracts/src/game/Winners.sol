// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @notice A won game: whose, when it was committed, and the gas that its moves are paid for.
struct Winner {
    address challenger;
    uint64 committedAt;
    uint32 gasUnits;
}

/// @dev Rationale: bounds `release`; with 64 stages and 8 winners each it stays below 2^24 gas, the limit of one transaction (EIP-7825).
uint256 constant MAX_WINNERS = 8;

/// @title Winners: who is paid from a convicted lock, at most eight
library Winners {
    /// @dev Keeps the oldest commitments: a cheat that convicts itself eight times can't crowd out whoever committed before.
    function remember(Winner[MAX_WINNERS] storage places, Winner memory winner) internal {
        uint256 youngest;
        for (uint256 i = 0; i < MAX_WINNERS; ++i) {
            if (places[i].challenger == address(0)) {
                places[i] = winner;
                return;
            }
            if (places[i].committedAt > places[youngest].committedAt) youngest = i;
        }
        if (winner.committedAt < places[youngest].committedAt) places[youngest] = winner;
    }

    /// @dev Without the empty places. Rationale: a length of its own would cost every first conviction a slot.
    function list(Winner[MAX_WINNERS] storage places) internal view returns (Winner[] memory all) {
        uint256 count;
        while (count < MAX_WINNERS && places[count].challenger != address(0)) ++count;
        all = new Winner[](count);
        for (uint256 i; i < count; ++i) {
            all[i] = places[i];
        }
    }

    /// @dev By insertion: at most 8 entries. Stable, so of two equally old ones the first that won stays first.
    function sortOldestFirst(Winner[] memory all) internal pure {
        for (uint256 i = 1; i < all.length; ++i) {
            Winner memory winner = all[i];
            uint256 k = i;
            for (; k > 0 && all[k - 1].committedAt > winner.committedAt; --k) {
                all[k] = all[k - 1];
            }
            all[k] = winner;
        }
    }
}
