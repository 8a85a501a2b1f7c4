// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IEscrow, Job} from "../interfaces/IEscrow.sol";

/// @title Terms: what a job may say
library Terms {
    uint256 internal constant MIN_WINDOW_SECONDS = 20;
    uint256 internal constant MAX_WINDOW_SECONDS = 30 days;
    uint256 internal constant MIN_CLOCK_SECONDS = 5;
    uint256 internal constant MAX_CLOCK_SECONDS = 7 days;
    /// @notice Furthest commitBy. Rationale: no mistyped deadline may hold money for ever.
    uint256 internal constant MAX_TERM_SECONDS = 365 days;

    /// @return maximum the price that is escrowed
    function requireValid(Job calldata job) internal view returns (uint256 maximum) {
        if (job.requestsRoot == 0) revert IEscrow.InvalidJob("requestsRoot");
        if (job.requests == 0) revert IEscrow.InvalidJob("requests");
        // Every request has at least one prompt token and a limit of at least one.
        if (job.promptTokens < job.requests) revert IEscrow.InvalidJob("promptTokens");
        if (job.maxTokens < job.requests) revert IEscrow.InvalidJob("maxTokens");
        // Games of a job without a gas rate would cost no bond.
        if (job.gasRate == 0) revert IEscrow.InvalidJob("gasRate");
        maximum = maximumPrice(job);
        if (maximum > type(uint128).max) revert IEscrow.InvalidJob("price");
        if (job.acceptBy < block.timestamp) revert IEscrow.InvalidJob("acceptBy");
        if (job.commitBy <= job.acceptBy || job.commitBy > block.timestamp + MAX_TERM_SECONDS) {
            revert IEscrow.InvalidJob("commitBy");
        }
        if (job.window < MIN_WINDOW_SECONDS || job.window > MAX_WINDOW_SECONDS) revert IEscrow.InvalidJob("window");
        if (job.clock < MIN_CLOCK_SECONDS || job.clock > MAX_CLOCK_SECONDS) revert IEscrow.InvalidJob("clock");
        if (job.grace == 0 || job.grace > job.clock) revert IEscrow.InvalidJob("grace");
    }

    function maximumPrice(Job calldata job) internal pure returns (uint256) {
        return uint256(job.promptPrice) * job.promptTokens + uint256(job.tokenPrice) * job.maxTokens;
    }

    /// @notice As `maximumPrice`, of a job that is on record.
    function maximumPriceOf(Job storage job) internal view returns (uint256) {
        return uint256(job.promptPrice) * job.promptTokens + uint256(job.tokenPrice) * job.maxTokens;
    }
}
