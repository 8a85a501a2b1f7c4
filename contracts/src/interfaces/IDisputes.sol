// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Model, Opening, Proof, Trace} from "./IReferee.sol";

struct Segment {
    bytes32 job;
    uint8 stage; // the accused
    uint8 kind; // docs/canonical.md: 0 EMBED .. 7 TOKEN, 8 STOP, 9 BILL, 10 LENGTH, 11 SAMPLE
    uint32 request;
    uint32 layer;
    uint32 position;
    uint32 unit; // head, block, element (LINK) or competing token; STOP: index of the shown token, or 0xffffffff
}

enum Phase {
    None,
    Steps, // the opponent's list: instruction roots
    Nodes, // nodes of a vector's tree
    Elements, // the elements of one leaf
    Sums, // partial sums of one element
    Handoff // an exact segment was shown; the accused may deflect
}

/// @notice A game's whole state. Storage holds the hash of its bytes (docs/protocol.md, "A game's state"); every call carries those.
struct Game {
    Segment segment;
    address challenger;
    address worker; // account of the accused
    uint64 committedAt; // when the challenger committed
    uint128 bond;
    uint128 gasRate; // the job's, as `grace`: a move reads no storage but the game's slot
    uint32 grace;
    bytes32 modelId;
    bytes32 rule; // Steps: the program's root; then keccak256 of the 128-byte record of the instruction in dispute
    uint32 programLeaves;
    uint32 token; // served token (TOKEN, SAMPLE), committed output token (EMBED)
    Trace trace;
    bytes32 sampling; // the request's parameters, as in a Cell
    uint32 firstInstruction; // leaf index in the program tree
    bytes32 steps; // keccak256 of the challenger's concatenated instruction roots; after Steps, of those that the instruction reads
    Phase phase;
    uint8 step; // the instruction in dispute
    uint8 level; // Nodes: level of the listed nodes
    uint64 index; // Nodes: index of the first listed node at `level`; Elements: leaf; Sums: element; Handoff: output token that EMBED read
    uint32 firstChunk; // Sums: the range that the list covers
    uint32 endChunk;
    bytes32 list; // what the opponent posted last. Nodes: its fold; Elements, Sums: hash over those of its pieces; Handoff: leaf that holds the judged element
    bool workerTurn;
    uint64 turnStarted;
    uint32 workerSeconds;
    uint32 challengerSeconds;
    uint16 workerMoves;
    uint16 challengerMoves;
}

struct Move {
    bytes record; // the 128-byte instruction in dispute
    bytes32[] siblings; // Steps: proves the record in the program tree; Nodes: the node in the opponent's list; else the hashes of its other pieces
    uint64 pick; // Steps: instruction; Nodes, Elements, Sums: place within the opponent's list, from 0
    bytes claim; // Steps: all instruction roots; Nodes: the picked node (32 bytes); Elements, Sums: the piece of the list that holds the picked entry
    bytes list; // the mover's own list for the picked child: 32-byte nodes, a leaf's bytes, or i128 sums
}

struct HandoffProof {
    bytes32 root;
    uint32 leaves;
    uint32 index;
    bytes record; // the hand-off record, docs/protocol.md
    bytes32[] siblings;
    bytes signature; // the sender's
}

/// @title The game that convicts a wrong segment
/// @notice See docs/protocol.md, "The game". Game id = the challenge's commitment.
interface IDisputes {
    event ChallengeCommitted(bytes32 indexed id, address indexed sender);
    /// @notice `game` is the state after the move: whoever follows the events can make the next one. `list` is what was posted; where `place` is not 0,
    /// it is not here but at that byte of the transaction's calldata, behind a word that tells its length.
    event GameMoved(
        bytes32 indexed id, bytes32 indexed job, address indexed mover, bytes game, bytes list, uint32 place
    );
    /// @notice convicted = 255: the challenger lost.
    event GameEnded(bytes32 indexed id, bytes32 indexed job, uint8 stage, uint8 convicted, uint8 reason); // reason: 1 proved, 2 flag, 3 shown, 4 deflected

    /// @notice A bond returned, a worker's moves; id = 0: a deposit.
    event Credited(address indexed account, uint256 amount, bytes32 indexed id);
    event Withdrawn(address indexed account, uint256 amount);

    error CommitmentExists(bytes32 id);
    error CommitmentTooRecent(bytes32 id);
    error UnknownCommitment(bytes32 id);
    error GameExists(bytes32 id);
    error WrongState(bytes32 id);
    error WrongModel(bytes32 expected, bytes32 actual);
    error WrongSegment(string what);
    error WrongPhase(Phase actual);
    error NotYourTurn(address sender);
    error FlagFallen();
    error FlagNotFallen();
    error WrongListLength(uint256 expected, uint256 actual);
    error VerdictNotWrong(); // the last instruction root is not the constant `wrong`
    error PickOutOfRange(uint256 pick, uint256 length);
    error ClaimMismatch();
    error SameRoot(); // the mover's list agrees with what it disputes
    error RecordMismatch();
    error MustProve(); // nothing beneath: prove instead
    error MustDescend(); // a long sum: descend instead
    error NotPrepared(); // LINK's first sum is not known yet
    error NotWrong(); // the opponent's value is right
    error BadHandoff(string what);
    error CalldataTooLong(uint256 length);
    error NothingToWithdraw();

    function commit(bytes32 id) external;

    /// @param evidence trace node, segment header; for TOKEN and SAMPLE also request record, output record, token leaf
    /// @param steps concatenated instruction roots
    function challenge(
        Segment calldata segment,
        bytes32 salt,
        Model calldata model,
        Opening[] calldata evidence,
        bytes calldata steps
    ) external returns (bytes32 id);

    /// @notice LINK, before `show`, so that neither is too large: adds up the first two of the three numbers. By anyone, once.
    /// @param evidence trace node of the layer's stage; h and attn_out of the layer
    function prepare(Segment calldata segment, Model calldata model, Opening[] calldata evidence) external;

    /// @param evidence by kind
    /// EMBED: trace node, request record, then (prompt token) prompt leaf or (output token) output record, token leaf; header, instruction, openings of SAME
    /// LINK, once prepared: trace node of the layer's stage, at a boundary also that of the accused; mlp_out of the layer, the next layer's h (or out)
    /// STOP: request record, output record, trace node of the accused; if unit != 0xffffffff the token leaf that holds token `unit`
    /// BILL: output record r; unless r is the last, output record r + 1
    /// LENGTH: trace node of the accused, trace node of its predecessor; position = the predecessor's positions
    function show(Segment calldata segment, bytes32 salt, Model calldata model, Opening[] calldata evidence)
        external
        returns (bytes32 id);

    /// @param game the state's bytes, as the last GameMoved told them
    function descend(bytes32 id, bytes calldata game, Move calldata move) external;
    function prove(bytes32 id, bytes calldata game, Proof calldata proof) external;
    function deflect(bytes32 id, bytes calldata game, HandoffProof calldata proof) external;
    function flag(bytes32 id, bytes calldata game) external;

    /// @notice Adds to the caller's credit, from which bonds are taken first: a slot costs less than two balances and an allowance.
    function deposit(uint256 amount) external;
    function withdraw() external; // the caller's credit

    function credit(address account) external view returns (uint256);
    function stateOf(bytes32 id) external view returns (bytes32);
    function commitmentOf(bytes32 id) external view returns (uint64);
    function bondFor(bytes32 job, uint8 stage) external view returns (uint256);
}
