// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Model} from "./IReferee.sol";

/// @title The models that jobs may name
/// @notice Permissionless and content-addressed: an id says what was hashed, not that it is good. Workers and watchtowers recompute a model's id
/// from its folder before they touch a job that names it.
interface IModels {
    event ModelRegistered(bytes32 indexed id, Model model);

    error InvalidModel(string what);

    /// @notice Registers `model`; registering it again changes nothing.
    function register(Model calldata model) external returns (bytes32 id);

    function layers(bytes32 id) external view returns (uint32); // 0 if unknown

    /// @notice What attention reads of the past, and how much past there can be.
    /// @return rowBytes bytes of k and v of one layer at one position; 0 if unknown
    /// @return maxPositions of one request
    function history(bytes32 id) external view returns (uint64 rowBytes, uint32 maxPositions);
}
