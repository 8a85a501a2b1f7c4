// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @title Counts: how many games are open against the stages of a job, in eight bytes
/// @dev Byte i counts those against stages i, i + 8, i + 16 ..: each stage apart in a pipeline of up to eight, at most eight together in the longest.
/// Rationale: the bytes lie in a slot that is written anyway. A slot of its own for a stage would cost every first game 22,100 gas.
library Counts {
    /// @dev No game is open against `stage`, or 255 are: bonds double every four, so that many can't be paid for.
    error CountOutOfRange(uint256 stage);

    uint256 private constant BYTES = 8;

    function against(uint64 counts, uint256 stage) internal pure returns (uint256) {
        return uint8(counts >> _shift(stage));
    }

    function opened(uint64 counts, uint256 stage) internal pure returns (uint64) {
        if (against(counts, stage) == type(uint8).max) revert CountOutOfRange(stage);
        return counts + (uint64(1) << uint64(_shift(stage)));
    }

    function closed(uint64 counts, uint256 stage) internal pure returns (uint64) {
        if (against(counts, stage) == 0) revert CountOutOfRange(stage);
        return counts - (uint64(1) << uint64(_shift(stage)));
    }

    function total(uint64 counts) internal pure returns (uint256 games) {
        for (uint256 stage; stage < BYTES; ++stage) {
            games += against(counts, stage);
        }
    }

    function _shift(uint256 stage) private pure returns (uint256) {
        return stage % BYTES * 8;
    }
}
