// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Op, Ops} from "./Ops.sol";
import {Draw, Sampling} from "./Sampling.sol";

/// @title Sampler: the ops of sampling
/// @notice docs/canonical.md, "Ops" 19 to 22 and "Sampling". Holds nothing; apart from Referee because of the size limit of a contract.
contract Sampler {
    /// @notice One element, or one chunk, of a sampling op. Takes `Sampling.pack` of its lists, of which the last is the draw.
    function run(uint8 number, bytes memory packed) external pure returns (int256) {
        Op op = Ops.named(number);
        int256[][] memory args = Sampling.unpack(packed);
        if (op == Op.RANK) return _rank(args);
        if (op == Op.MASS) return _mass(args);
        if (op == Op.STANDING) return _standing(args);
        if (op == Op.CHOICE) return _choice(args);
        revert Ops.UnknownOp(number);
    }

    /// @dev [x...] logits, [the judged token's], [num, den, margin], draw: how many lie above it.
    function _rank(int256[][] memory args) private pure returns (int256) {
        Draw memory draw = _shaped(args, 4, 2);
        return Sampling.rank(args[0], _only(args[1]), args[2][2], draw);
    }

    /// @dev [x...] logits, [the judged token's], [the largest], [num, den, margin], draw: (1 - p) x the mass above it - p x the rest.
    function _mass(int256[][] memory args) private pure returns (int256) {
        Draw memory draw = _shaped(args, 5, 3);
        return Sampling.mass(args[0], _only(args[1]), _only(args[2]), args[3][2], draw);
    }

    /// @dev [rank], [mass], draw: 1 if a competitor is surely allowed, or the served token surely excluded.
    function _standing(int256[][] memory args) private pure returns (int256) {
        Draw memory draw = _shaped(args, 3, 0);
        return Sampling.standing(_only(args[0]), _only(args[1]), draw);
    }

    /// @dev [served token's logit], [competitor's], [standing], [num, den, margin], draw: 1 if the served token is wrong.
    function _choice(int256[][] memory args) private pure returns (int256) {
        Draw memory draw = _shaped(args, 5, 3);
        return Sampling.choice(_only(args[0]), _only(args[1]), _only(args[2]), args[3][2], draw);
    }

    /// @dev Requires `lists` lists, that of the margin's cell (if not 0) with three values; the last is the draw.
    function _shaped(int256[][] memory args, uint256 lists, uint256 cell) private pure returns (Draw memory) {
        if (args.length != lists) revert Ops.OperandShape(lists, args.length);
        if (cell > 0) _length(args[cell], 3);
        _length(args[lists - 1], Sampling.DRAW_FIELDS);
        return Sampling.drawOf(args[lists - 1]);
    }

    function _only(int256[] memory list) private pure returns (int256) {
        _length(list, 1);
        return list[0];
    }

    function _length(int256[] memory list, uint256 expected) private pure {
        if (list.length != expected) revert Ops.OperandShape(expected, list.length);
    }
}
