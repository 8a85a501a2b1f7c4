// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Codec} from "../../../contracts/src/referee/Codec.sol";
import {Tree} from "../../../contracts/src/referee/Tree.sol";

/// @title What holds of a tree's levels and of the encoding of values, for every input: proved by halmos (`make prove`), not tried
/// @dev The hashes themselves are tried only (tests/contracts/referee/Tree.t.sol): halmos 0.3.3 cannot hash what is symbolic with SHA-256.
contract TreeProofs {
    function check_levelsShrinkToOneNode(uint32 count) external pure {
        if (count == 0) return;
        uint256 depth = Tree.depth(count);
        assert(Tree.nodes(count, depth) == 1);
        if (depth > 0) assert(Tree.nodes(count, depth - 1) > 1);
    }

    function check_everyNarrowStringIsOneValue(uint64 code) external pure {
        bytes memory data = abi.encodePacked(code);
        int256 value = Codec.decodeValue(data, 0, false);
        assert(value >= type(int64).min && value <= type(int64).max);
        assert(keccak256(Codec.encodeValue(value, false)) == keccak256(data));
    }

    function check_everyWideStringIsOneValue(uint128 code) external pure {
        bytes memory data = abi.encodePacked(code);
        int256 value = Codec.decodeValue(data, 0, true);
        assert(value >= type(int128).min && value <= type(int128).max);
        assert(keccak256(Codec.encodeValue(value, true)) == keccak256(data));
    }

    function check_narrowValuesComeBack(int64 value) external pure {
        assert(Codec.decodeValue(Codec.encodeValue(value, false), 0, false) == value);
    }

    function check_wideValuesComeBack(int128 value) external pure {
        assert(Codec.decodeValue(Codec.encodeValue(value, true), 0, true) == value);
    }
}
