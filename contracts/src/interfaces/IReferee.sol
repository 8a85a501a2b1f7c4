// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @notice What a model is, as far as a judge is concerned. `modelId = keccak256(abi.encode(model))`: content-addressed, recomputed by anyone from the
/// model's folder (docs/canonical.md, "Bytes").
struct Model {
    bytes32 weightsRoot; // SHA-256 tree over 256-element leaves of the raw weights
    uint64 weightsLeaves;
    bytes32 programRoot; // SHA-256 tree over segment headers, instructions and the RoPE table
    uint32 programLeaves;
    bytes32 profileRoot; // SHA-256 tree over the tolerance cells
    uint32 profileLeaves;
    uint32 layers;
    uint32 hidden;
    uint32 queryWidth; // heads * head size
    uint32 kvWidth; // key heads * head size
    uint32 vocabulary;
    uint32 maxPositions; // prompt + output tokens of one request
    uint8 weightDtype; // 0 bfloat16, 1 float16, 2 float32
    uint8 servedDtype;
}

/// @notice Leaves first..last of some tree, concatenated, with the range proof that ties them to its root.
struct Opening {
    bytes data;
    bytes32[] siblings;
}

/// @notice Where an instruction reads from. See docs/canonical.md, "Instruction".
struct Operand {
    uint8 source; // 0 NONE, 1 STEP, 2 SERVED, 3 WEIGHT, 4 TABLE, 5 PROFILE
    uint8 id;
    uint64 base;
    uint64 layerStride;
    uint32 unitStride;
    uint32 width;
}

struct Instruction {
    uint8 op;
    uint8 wide;
    uint32 rows;
    uint32 cols;
    uint32 limit;
    uint32 terms;
    uint64 a;
    uint32 b;
    Operand x;
    Operand y;
    Operand z;
}

/// @notice The served tensors of one request at one stage.
struct Trace {
    bytes32 root; // tree over the roots of its tensors
    uint32 positions;
    uint32 firstLayer;
    uint32 endLayer;
}

/// @notice The place that is judged.
struct Cell {
    uint32 layer;
    uint32 position;
    uint32 unit; // head, block or competing token (SAMPLE: the served token itself, where its membership is judged)
    uint32 token; // the served token (TOKEN, SAMPLE) or the token that is embedded (EMBED)
    Trace trace;
    bytes32 sampling; // SAMPLE: temperature u32 | topK u32 | topP u32 | seed u64 | request u32 | 0, as in the request's record; else zero
}

/// @notice What decides a game: the inputs of one step.
struct Proof {
    Model model;
    bytes record; // the instruction's
    uint64 pick; // place within the opponent's list of elements or sums
    bytes claim; // the piece of that list which holds it
    bytes32[] siblings; // the hashes of its other pieces
    bytes32[] steps; // the roots that the instruction reads, in the order of its operands
    Opening[] openings;
}

/// @notice Computes one step of a canonical program from opened inputs. Stateless; the Python twin is verifier/referee/.
interface IReferee {
    /// @notice `run` of one chunk (chunk 0 where the instruction is no long sum), before `finish`.
    /// @param proof as it stands in a game's calldata: what is not copied into another shape costs nothing. `pick`, `claim` and `siblings` are not read
    function judge(Cell calldata cell, uint64 element, uint32 chunk, Proof calldata proof)
        external
        view
        returns (int256);

    /// @notice The pure arithmetic of an op on lists of integers.
    function run(uint8 op, int256[][] calldata args, uint64 a, uint32 b) external view returns (int256);

    /// @notice Turns the total of a sum into the element.
    function finish(uint8 op, int256 total, uint64 a) external pure returns (int256);
}
