// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Segment} from "../interfaces/IDisputes.sol";
import {Model, Opening, Trace} from "../interfaces/IReferee.sol";
import {Codec} from "../referee/Codec.sol";
import {Floats} from "../referee/Floats.sol";
import {Tree} from "../referee/Tree.sol";

/// @title Rows: single elements of the served tensors that LINK adds up
/// @notice docs/canonical.md, "Served tensors". All of these are as wide as the model, so its id says where an element lies.
/// @dev INVARIANT: segment.unit < model.hidden; position and tensor lie within the trace.
library Rows {
    /// @dev An opening does not belong to the committed tree.
    error RootMismatch(bytes32 expected, bytes32 actual);

    // Tensors of a layer, by their place among its six.
    uint256 internal constant H = 0;
    uint256 internal constant ATTN_OUT = 4;
    uint256 internal constant MLP_OUT = 5;
    uint256 private constant KINDS = 6;

    /// @notice The raw bits of the segment's element of tensor `kind` of a layer; of `out`, where that is H of the layer behind the model's last.
    function element(
        Segment calldata segment,
        Model calldata model,
        Trace memory trace,
        uint256 layer,
        uint256 kind,
        Opening calldata opening
    ) internal pure returns (uint256) {
        bytes memory data = opening.data;
        bytes32 root;
        uint256 used;
        bytes32[] memory siblings = opening.siblings;
        {
            uint256 blocks = (uint256(model.hidden) + Codec.BLOCK - 1) / Codec.BLOCK;
            uint256 leaf = segment.position * blocks + segment.unit / Codec.BLOCK;
            (root, used) = _climb(data, leaf, trace.positions * blocks, siblings, 0);
        }
        {
            uint256 tensors = KINDS * (uint256(trace.endLayer) - trace.firstLayer);
            if (trace.endLayer == model.layers) ++tensors;
            (root, used) =
                _climb(bytes.concat(root), KINDS * (layer - trace.firstLayer) + kind, tensors, siblings, used);
        }
        if (used != siblings.length) revert Tree.ProofLength(used, siblings.length);
        if (root != trace.root) revert RootMismatch(trace.root, root);
        return _bits(data, segment.unit, model.hidden, model.servedDtype);
    }

    function _climb(bytes memory data, uint256 index, uint256 count, bytes32[] memory siblings, uint256 from)
        private
        pure
        returns (bytes32, uint256)
    {
        bytes32[] memory node = new bytes32[](1);
        node[0] = Tree.leaf(data);
        return Tree.climb(node, index, count, siblings, from);
    }

    /// @dev One element of the leaf that holds that column of a row.
    function _bits(bytes memory data, uint256 column, uint256 width, uint256 dtype) private pure returns (uint256) {
        uint256 skipped = column % Codec.BLOCK;
        uint256 held = width - (column - skipped);
        uint256 expected = (held < Codec.BLOCK ? held : Codec.BLOCK) * Floats.elementBytes(dtype);
        if (data.length != expected) revert Codec.DataLength(expected, data.length);
        return uint256(Floats.rawBits(data, skipped, 1, dtype)[0]);
    }
}
