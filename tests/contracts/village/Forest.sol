// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Descent} from "../../../contracts/src/game/Descent.sol";
import {Instruction, Operand} from "../../../contracts/src/interfaces/IReferee.sol";
import {Tree} from "../../../contracts/src/referee/Tree.sol";

/// @title Forest: the prover's side of the trees that Tree verifies
library Forest {
    function root(bytes32[] memory leaves) internal pure returns (bytes32) {
        return Tree.fold(slice(leaves, 0, leaves.length));
    }

    /// @notice The nodes `up` levels above the leaves.
    function level(bytes32[] memory leaves, uint256 up) internal pure returns (bytes32[] memory nodes) {
        nodes = leaves;
        for (; up > 0; --up) {
            nodes = _above(nodes);
        }
    }

    /// @notice The siblings that tie the nodes first .. first+length-1 to their root.
    function siblings(bytes32[] memory leaves, uint256 first, uint256 length) internal pure returns (bytes32[] memory) {
        bytes32[] memory found = new bytes32[](64);
        uint256 used = 0;
        uint256 end = first + length;
        for (bytes32[] memory nodes = leaves; nodes.length > 1; nodes = _above(nodes)) {
            if (first % 2 == 1) found[used++] = nodes[first - 1];
            if (end % 2 == 1 && end < nodes.length) found[used++] = nodes[end];
            (first, end) = (first / 2, (end + 1) / 2);
        }
        return slice(found, 0, used);
    }

    function slice(bytes32[] memory all, uint256 first, uint256 length) internal pure returns (bytes32[] memory part) {
        part = new bytes32[](length);
        for (uint256 i = 0; i < length; ++i) {
            part[i] = all[first + i];
        }
    }

    /// @notice Bytes start .. start+length-1.
    function cut(bytes memory data, uint256 start, uint256 length) internal pure returns (bytes memory part) {
        require(start + length <= data.length, "cut");
        part = new bytes(length);
        assembly ("memory-safe") {
            mcopy(add(part, 32), add(add(data, 32), start), length)
        }
    }

    /// @notice The hashes of the pieces of a list of elements or sums but piece `index`.
    function otherPieces(bytes memory list, uint256 index) internal pure returns (bytes32[] memory hashes) {
        uint256 size = Descent.PIECE_BYTES;
        hashes = new bytes32[]((list.length - 1) / size);
        for (uint256 i = 0; i < hashes.length; ++i) {
            uint256 piece = i < index ? i : i + 1;
            hashes[i] = keccak256(cut(list, piece * size, Descent.pieceBytes(list.length, piece)));
        }
    }

    /// @notice Of the concatenated roots of all vectors those that an instruction reads.
    function readRoots(Instruction memory ins, bytes memory roots) internal pure returns (bytes32[] memory) {
        bytes memory read = bytes.concat(_read(ins.x, roots), _read(ins.y, roots), _read(ins.z, roots));
        return words(read);
    }

    function _read(Operand memory operand, bytes memory roots) private pure returns (bytes memory) {
        return operand.source == 1 ? cut(roots, 32 * uint256(operand.id), 32) : bytes("");
    }

    function words(bytes memory list) internal pure returns (bytes32[] memory) {
        return abi.decode(abi.encodePacked(uint256(32), list.length / 32, list), (bytes32[]));
    }

    function bytesOf(bytes32[] memory list) internal pure returns (bytes memory) {
        return abi.encodePacked(list);
    }

    function concat(bytes32[] memory a, bytes32[] memory b) internal pure returns (bytes32[] memory all) {
        all = new bytes32[](a.length + b.length);
        for (uint256 i = 0; i < all.length; ++i) {
            all[i] = i < a.length ? a[i] : b[i - a.length];
        }
    }

    function _above(bytes32[] memory nodes) private pure returns (bytes32[] memory above) {
        above = new bytes32[]((nodes.length + 1) / 2);
        for (uint256 i = 0; i < above.length; ++i) {
            above[i] = 2 * i + 1 < nodes.length ? Tree.node(nodes[2 * i], nodes[2 * i + 1]) : nodes[2 * i];
        }
    }
}
