// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

// Sets of at most 64 stages, bit i for stage i.

function _bit(uint256 stage) pure returns (uint64) {
    return uint64(1) << uint64(stage);
}

function _all(uint256 count) pure returns (uint64) {
    return type(uint64).max >> (64 - count);
}

function _contains(uint64 set, uint256 stage) pure returns (bool) {
    return stage < 64 && set >> stage & 1 == 1;
}
