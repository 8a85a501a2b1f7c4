// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IModels} from "./interfaces/IModels.sol";
import {Model} from "./interfaces/IReferee.sol";

/// @title See IModels
contract Models is IModels {
    uint32 public constant MAX_LAYERS = 1024;
    /// @notice Widest activation, in elements.
    // Rationale: sums of that many terms keep within the bounds of docs/canonical.md, "Bounds".
    uint32 public constant MAX_WIDTH = 2 ** 20;
    uint32 public constant MAX_VOCABULARY = 2 ** 24;
    /// @notice Longest request, prompt and output tokens together.
    // Rationale: a softmax over 2^20 positions sums to less than 2^61, an i64 of the trace.
    uint32 public constant MAX_POSITIONS = 2 ** 20;
    uint8 public constant LAST_DTYPE = 2;

    struct Size {
        uint32 layers;
        uint64 rowBytes;
        uint32 maxPositions;
    }

    mapping(bytes32 id => Size) private _sizes;

    /// @inheritdoc IModels
    function register(Model calldata model) external returns (bytes32 id) {
        if (model.weightsRoot == 0) revert InvalidModel("weightsRoot");
        if (model.weightsLeaves == 0) revert InvalidModel("weightsLeaves");
        if (model.programRoot == 0) revert InvalidModel("programRoot");
        if (model.programLeaves == 0) revert InvalidModel("programLeaves");
        if (model.profileRoot == 0) revert InvalidModel("profileRoot");
        if (model.profileLeaves == 0) revert InvalidModel("profileLeaves");
        _requireWithin("layers", model.layers, 1, MAX_LAYERS);
        _requireWithin("hidden", model.hidden, 1, MAX_WIDTH);
        _requireWithin("queryWidth", model.queryWidth, 1, MAX_WIDTH);
        _requireWithin("kvWidth", model.kvWidth, 1, MAX_WIDTH);
        _requireWithin("vocabulary", model.vocabulary, 1, MAX_VOCABULARY);
        // One prompt token and one output token are the shortest request.
        _requireWithin("maxPositions", model.maxPositions, 2, MAX_POSITIONS);
        if (model.weightDtype > LAST_DTYPE) revert InvalidModel("weightDtype");
        if (model.servedDtype > LAST_DTYPE) revert InvalidModel("servedDtype");

        id = keccak256(abi.encode(model));
        if (_sizes[id].layers != 0) return id; // a front-run registration is as good as one's own

        uint64 elementBytes = model.servedDtype == LAST_DTYPE ? 4 : 2;
        _sizes[id] = Size(model.layers, 2 * elementBytes * model.kvWidth, model.maxPositions);
        emit ModelRegistered(id, model);
    }

    /// @inheritdoc IModels
    function layers(bytes32 id) external view returns (uint32) {
        return _sizes[id].layers;
    }

    /// @inheritdoc IModels
    function history(bytes32 id) external view returns (uint64 rowBytes, uint32 maxPositions) {
        return (_sizes[id].rowBytes, _sizes[id].maxPositions);
    }

    function _requireWithin(string memory what, uint32 value, uint32 least, uint32 most) private pure {
        if (value < least || value > most) revert InvalidModel(what);
    }
}
