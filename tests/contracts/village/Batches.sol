// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Floats} from "../../../contracts/src/referee/Floats.sol";
import {Fixed} from "../../../contracts/src/referee/Fixed.sol";
import {Tree} from "../../../contracts/src/referee/Tree.sol";
import {Forest} from "./Forest.sol";
import {Plan} from "./Plan.sol";

/// @notice What a pipeline did wrong.
enum Lie {
    NONE,
    MLP_FIRST, // stage 0 skips its MLP at position 1
    MLP_LAST, // stage 1 at position 0
    BLOCK, // stage 0 leaves out the short block of k at position 0
    TOKEN, // the last stage picks another token than its logits do
    EMBED, // stage 0 alters one bit of the prompt token's embedding
    LINK_RECEIVER, // stage 1 alters one bit of what it received
    LINK_SENDER, // stage 0 hands off, signed, another row than it committed to
    OUT, // stage 1 alters one bit of its own output
    STOP, // a stop code that does not exist
    BILL, // a total that the output records do not add up to
    LENGTH, // stage 1 commits to a position that it was never sent
    TOKEN_SENDER, // the last stage sends back, signed, another token than it commits to
    BOTH, // both stages skip an MLP: accomplices
    NAN, // stage 1 serves no numbers at position 0, so that no distance is one
    CLOSE // no lie: the last stage picks a token whose logit is smaller than the best by less than the margin
}

/// @notice One request, served by two stages of one layer each, with all that a challenger downloads.
struct Batch {
    Lie lie;
    uint8 guilty; // bit i for stage i
    uint32[2] positions;
    bytes[7][2] tensors; // by stage and kind, position after position
    bytes[2] nodes;
    bytes output;
    bytes tokens;
    uint64 total;
    bytes handoff; // what a lying sender signed
}

/// @title Batches: a batch as an honest pipeline serves it, or one with a lie
/// @notice Request 0: one prompt token, a limit of two output tokens, both used. Two positions.
library Batches {
    /// @dev Its own embedding makes token 2 or its twin the likeliest to follow.
    uint32 internal constant PROMPT = 2;
    uint32 internal constant POSITIONS = 2;
    uint8 internal constant LIES = 16;

    function build(Lie lie) internal pure returns (Batch memory b) {
        b.lie = lie;
        b.guilty = guilty(lie);
        uint32[3] memory ids = [PROMPT, 0, 0];
        for (uint256 p = 0; p < POSITIONS; ++p) {
            ids[p + 1] = _position(b, p, ids[p]);
        }
        b.positions = [POSITIONS, POSITIONS];
        if (lie == Lie.LENGTH) {
            b.positions[1] = POSITIONS + 1;
            for (uint256 kind = 0; kind < 7; ++kind) {
                bytes memory rows = b.tensors[1][kind];
                if (rows.length > 0) b.tensors[1][kind] = bytes.concat(rows, row(rows, POSITIONS - 1));
            }
        }
        for (uint256 stage = 0; stage < 2; ++stage) {
            b.nodes[stage] = abi.encodePacked(uint32(0), b.positions[stage], Forest.root(tensorLeaves(b, stage)));
        }
        b.tokens = abi.encodePacked(ids[1], ids[2]);
        b.output = abi.encodePacked(
            uint32(0), uint64(0), uint32(2), lie == Lie.STOP ? uint32(3) : uint32(2), Tree.leaf(b.tokens)
        );
        b.total = lie == Lie.BILL ? 1 : 2;
        _sign(b, ids);
    }

    /// @notice Which stages the law finds guilty, bit i for stage i.
    function guilty(Lie lie) internal pure returns (uint8) {
        if (lie == Lie.NONE || lie == Lie.CLOSE) return 0;
        if (lie == Lie.BOTH) return 3;
        bool first = lie == Lie.MLP_FIRST || lie == Lie.BLOCK || lie == Lie.EMBED || lie == Lie.LINK_SENDER;
        return first ? 1 : 2;
    }

    function request() internal pure returns (bytes memory) {
        return abi.encodePacked(
            uint32(0),
            uint32(1),
            uint32(2),
            uint32(0),
            uint32(0),
            uint32(65536),
            uint64(0),
            uint32(0),
            new bytes(32),
            Tree.leaf(abi.encodePacked(PROMPT))
        );
    }

    // ---- tensors

    function row(bytes memory rows, uint256 p) internal pure returns (bytes memory) {
        return Forest.cut(rows, p * Plan.ROW_BYTES, Plan.ROW_BYTES);
    }

    /// @notice Hashes of a row tensor's leaves, two a position.
    function rowLeaves(bytes memory rows) internal pure returns (bytes32[] memory leaves) {
        uint256 count = rows.length / Plan.ROW_BYTES;
        leaves = new bytes32[](2 * count);
        for (uint256 p = 0; p < count; ++p) {
            bytes32[] memory two = Tree.leaves(row(rows, p), 2 * Plan.BLOCK);
            (leaves[2 * p], leaves[2 * p + 1]) = (two[0], two[1]);
        }
    }

    /// @notice Leaves of the tree over a stage's tensor roots.
    function tensorLeaves(Batch memory b, uint256 stage) internal pure returns (bytes32[] memory leaves) {
        leaves = new bytes32[](stage == 1 ? 7 : 6);
        for (uint256 kind = 0; kind < leaves.length; ++kind) {
            bytes memory rows = b.tensors[stage][kind];
            // Nobody judges q and v of this model.
            bytes32 root = rows.length == 0 ? Tree.leaf("") : Forest.root(rowLeaves(rows));
            leaves[kind] = Tree.leaf(abi.encodePacked(root));
        }
    }

    // ---- serving

    /// @return the token that follows
    function _position(Batch memory b, uint256 p, uint32 token) private pure returns (uint32) {
        bytes memory h = Plan.embedding(b.lie == Lie.TOKEN_SENDER && p == 1 ? other(token) : token);
        if (b.lie == Lie.EMBED && p == 0) _alter(h);
        h = _layer(b, 0, p, h);
        if ((b.lie == Lie.LINK_RECEIVER || b.lie == Lie.LINK_SENDER) && p == 1) _alter(h);
        bytes memory out = _layer(b, 1, p, h);
        if (b.lie == Lie.OUT && p == 0) _alter(out);
        b.tensors[1][Plan.OUT] = bytes.concat(b.tensors[1][Plan.OUT], out);
        uint32 chosen = _choose(out, b.lie == Lie.TOKEN && p == 0);
        return b.lie == Lie.CLOSE && p == 0 ? Plan.twin(chosen) : chosen;
    }

    /// @return the next layer's input
    function _layer(Batch memory b, uint256 stage, uint256 p, bytes memory h) private pure returns (bytes memory) {
        bytes memory attn = Plan.noise(keccak256(abi.encode("attention", stage, p, h)));
        bytes memory mid = add(h, attn);
        bytes memory keys = bytes.concat(mid);
        if (b.lie == Lie.BLOCK && stage == 0 && p == 0) {
            keys = bytes.concat(Forest.cut(mid, 0, 2 * Plan.BLOCK), new bytes(Plan.ROW_BYTES - 2 * Plan.BLOCK));
        }
        bool skips = stage == 0
            ? (b.lie == Lie.MLP_FIRST || b.lie == Lie.BOTH) && p == 1
            : (b.lie == Lie.MLP_LAST || b.lie == Lie.BOTH) && p == 0;
        bytes memory mlp = skips ? new bytes(Plan.ROW_BYTES) : _encode(normed(served(mid)));
        if (b.lie == Lie.NAN && stage == 1 && p == 0) mlp = _noNumbers();
        bytes[7] memory kept = b.tensors[stage];
        kept[Plan.H] = bytes.concat(kept[Plan.H], h);
        kept[Plan.KEYS] = bytes.concat(kept[Plan.KEYS], keys);
        kept[Plan.ATTN] = bytes.concat(kept[Plan.ATTN], attn);
        kept[Plan.MLP_OUT] = bytes.concat(kept[Plan.MLP_OUT], mlp);
        return add(mid, mlp);
    }

    function _choose(bytes memory out, bool worst) private pure returns (uint32 chosen) {
        int256[] memory x = normed(served(out));
        int256 best = 0;
        for (uint32 id = 0; id < Plan.VOCABULARY; ++id) {
            int256 value = logit(x, id);
            if (id == 0 || (worst ? value < best : value > best)) (chosen, best) = (id, value);
        }
    }

    function _sign(Batch memory b, uint32[3] memory ids) private pure {
        if (b.lie == Lie.LINK_SENDER) {
            bytes memory h = row(b.tensors[1][Plan.H], 1);
            b.handoff = abi.encodePacked(uint32(0), uint32(1), uint32(1), Forest.cut(h, 512, 128));
        } else if (b.lie == Lie.TOKEN_SENDER) {
            b.handoff = abi.encodePacked(uint32(0), uint32(0), other(ids[1]));
        }
    }

    function other(uint32 token) internal pure returns (uint32) {
        return (token + 1) % Plan.VOCABULARY;
    }

    function _alter(bytes memory data) private pure {
        data[2 * Plan.ALTERED_COLUMN] ^= 0x01;
    }

    function _noNumbers() private pure returns (bytes memory data) {
        data = new bytes(Plan.ROW_BYTES);
        for (uint256 i = 0; i < Plan.WIDTH; ++i) {
            (data[2 * i], data[2 * i + 1]) = (bytes1(0xc0), bytes1(0x7f));
        }
    }

    // ---- arithmetic

    /// @notice The hardware sum of two rows.
    function add(bytes memory x, bytes memory y) internal pure returns (bytes memory sum) {
        int256[] memory a = Floats.rawBits(x, 0, Plan.WIDTH, 0);
        int256[] memory b = Floats.rawBits(y, 0, Plan.WIDTH, 0);
        sum = new bytes(Plan.ROW_BYTES);
        for (uint256 i = 0; i < Plan.WIDTH; ++i) {
            uint256 bits = Floats.add(0, uint256(a[i]), uint256(b[i]));
            (sum[2 * i], sum[2 * i + 1]) = (bytes1(uint8(bits)), bytes1(uint8(bits >> 8)));
        }
    }

    /// @notice Q30.
    function served(bytes memory data) internal pure returns (int256[] memory values) {
        values = Floats.rawBits(data, 0, Plan.WIDTH, 0);
        Floats.decodeServed(values, 0, 0);
    }

    function squares(int256[] memory x, uint256 first, uint256 end) internal pure returns (int256 total) {
        for (uint256 i = first; i < end; ++i) {
            total += x[i] * x[i];
        }
    }

    function inverseRoot(int256 total) internal pure returns (int256) {
        return int256(Fixed.isqrt((Plan.WIDTH << 140) / (uint256(total) + Plan.WIDTH * 1152921504606)));
    }

    /// @notice x / sqrt(mean x^2 + eps), the gain being 1.
    function normed(int256[] memory x) internal pure returns (int256[] memory values) {
        int256 scale = inverseRoot(squares(x, 0, Plan.WIDTH));
        values = new int256[](Plan.WIDTH);
        for (uint256 i = 0; i < Plan.WIDTH; ++i) {
            values[i] = Fixed.cl(Fixed.rs(x[i] * scale, 40));
        }
    }

    function logit(int256[] memory x, uint32 token) internal pure returns (int256) {
        return Fixed.cl(Fixed.rs(products(x, token, 0, Plan.WIDTH), Plan.GAIN_BITS));
    }

    /// @notice Terms first .. end-1 of a token's logit.
    function products(int256[] memory x, uint32 token, uint256 first, uint256 end)
        internal
        pure
        returns (int256 total)
    {
        int256[] memory y = Floats.rawBits(Plan.embedding(token), 0, Plan.WIDTH, 0);
        Floats.decodeWeights(y, 0);
        for (uint256 i = first; i < end; ++i) {
            total += x[i] * y[i];
        }
    }

    /// @notice Q30 to bfloat16, truncated.
    function _encode(int256[] memory values) private pure returns (bytes memory data) {
        data = new bytes(2 * values.length);
        for (uint256 i = 0; i < values.length; ++i) {
            if (values[i] == 0) continue;
            uint256 size = uint256(values[i] < 0 ? -values[i] : values[i]);
            uint256 top = Fixed.log2(size);
            uint256 bits = ((top + 97) << 7) | ((top > 7 ? size >> (top - 7) : size << (7 - top)) & 0x7f);
            if (values[i] < 0) bits |= 0x8000;
            (data[2 * i], data[2 * i + 1]) = (bytes1(uint8(bits)), bytes1(uint8(bits >> 8)));
        }
    }
}
