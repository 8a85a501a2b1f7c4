// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @dev In this order its numbers fill four slots, and all that a game needs of them lies in one.
struct Job {
    bytes32 model;
    bytes32 pipeline;
    bytes32 requestsRoot;
    uint128 gasRate; // base units a unit of gas: fixes bonds and refunds for this job
    uint32 requests;
    uint32 window; // seconds after the commitment in which challenges may be opened
    uint32 clock; // seconds each side has in a game
    uint32 grace; // seconds each side has at least at a move
    uint64 promptTokens;
    uint64 maxTokens; // the sum of all limits
    uint64 acceptBy; // timestamps in seconds
    uint64 commitBy;
    uint128 promptPrice; // base units a prompt token
    uint128 tokenPrice; // base units an output token
    uint128 lock; // base units of stake locked by each stage
    uint64 nonce;
}

/// @notice What a game needs to know of a job, and the root of the stage that it accuses.
struct Brief {
    bytes32 model;
    bytes32 pipeline;
    bytes32 root;
    uint128 gasRate;
    uint32 requests;
    uint32 clock;
    uint32 grace;
}

enum Status {
    None,
    Open,
    Accepted,
    Committed,
    Paid,
    Void,
    Refunded
}

struct Acceptance {
    uint8 stage;
    bytes signature;
}

/// @notice Signed by one worker: a job may move to another pipeline until then, unix seconds.
struct Consent {
    uint64 until;
    bytes signature;
}

/// @notice What one stage commits to. Outputs and tokens belong to the last stage; the others leave them zero.
struct Claim {
    uint8 stage;
    bytes32 root;
    bytes32 outputs;
    uint64 tokens;
    bytes signature;
}

/// @title Jobs and their money
interface IEscrow {
    event JobOpened(bytes32 indexed id, address indexed requester, bytes32 indexed pipeline, Job job);
    event StageAccepted(bytes32 indexed id, uint8 stage, address worker);
    event JobAccepted(bytes32 indexed id);
    event JobMoved(bytes32 indexed id, bytes32 pipeline);
    event StageCommitted(bytes32 indexed id, uint8 stage, bytes32 root);
    event JobCommitted(bytes32 indexed id, bytes32 outputs, uint64 tokens, uint64 windowEnd);
    event StageConvicted(bytes32 indexed id, uint8 stage, address challenger);
    event JobVoided(bytes32 indexed id);
    event JobPaid(bytes32 indexed id, uint256 price, uint256 returned);
    event JobRefunded(bytes32 indexed id, uint256 refund, uint256 noShowFee);
    event JobReleased(bytes32 indexed id);
    event StageSlashed(
        bytes32 indexed id, uint8 stage, uint256 toStages, uint256 toGas, uint256 burned, uint256 toChallenger
    );
    event Credited(address indexed account, uint256 amount, bytes32 indexed id);
    event Withdrawn(address indexed account, uint256 amount);

    error InvalidJob(string what);
    error JobExists(bytes32 id);
    error WrongStatus(bytes32 id, Status expected, Status actual);
    error TooEarly(uint64 availableAt);
    error TooLate(uint64 deadline);
    error AlreadyDone(uint8 stage);
    error AlreadyCommitted(bytes32 id);
    error UnknownStage(uint8 stage);
    error BadSignature(uint8 stage);
    error GamesOpen(uint256 games); // games and demands
    error NotDisputes(address sender);
    error NotDemands(address sender);
    error TooManyTokens(uint64 tokens, uint64 maxTokens);
    error OutputsFromWrongStage(uint8 stage);
    error NothingToWithdraw();

    function open(Job calldata job) external returns (bytes32 id);
    function accept(bytes32 id, Acceptance[] calldata acceptances) external; // already accepted stages are passed over
    /// @notice An accepted job goes on with another pipeline of its model and length, with the consents of all stages of its own,
    /// in their order, and then of the workers who are new at their stage. Their locks take the place of those they stand in for. Not once a stage has
    /// committed.
    function move(bytes32 id, bytes32 pipeline, Consent[] calldata consents) external;
    function commit(bytes32 id, Claim[] calldata claims) external; // already committed stages are passed over
    function settle(bytes32 id) external; // Committed -> Paid, after the window, no game open
    function expire(bytes32 id) external; // Open or Accepted -> Refunded, after its deadline
    function refund(bytes32 id) external; // Void: the price is the requester's again; once, and a repeated call changes nothing
    function release(bytes32 id) external; // Void: refunds, frees or slashes the locks, after the window, no game open
    function withdraw() external; // the caller's credit

    /// @notice Disputes only. Reverts outside the window of a Committed or Void job.
    /// @return alreadyOpen games open against the stage before this one
    function gameOpened(bytes32 id, uint8 stage) external returns (uint256 alreadyOpen);
    /// @notice Disputes only. `stage` is the one the game was opened against, `convicted` the one found guilty (255: nobody).
    function gameClosed(
        bytes32 id,
        uint8 stage,
        uint8 convicted,
        address challenger,
        uint64 committedAt,
        uint256 gasUnits
    ) external;

    /// @notice Demands only. Reverts as gameOpened does. An open demand keeps a job from ending, as an open game does.
    /// @return windowEnd as it stands
    function demandOpened(bytes32 id, uint8 stage) external returns (uint64 windowEnd);
    /// @notice Demands only. `silent`: the stage let its time pass, and is convicted. Else games may be opened for another `clock` seconds at least.
    function demandClosed(bytes32 id, uint8 stage, bool silent, address demander, uint64 openedAt, uint256 gasUnits)
        external;

    function job(bytes32 id) external view returns (Job memory);
    function brief(bytes32 id, uint8 stage) external view returns (Brief memory); // a part of it, for less gas
    function leastLock(Job calldata job) external view returns (uint256); // `open` refuses less
    function requester(bytes32 id) external view returns (address);
    function status(bytes32 id) external view returns (Status);
    function root(bytes32 id, uint8 stage) external view returns (bytes32); // 0 until committed
    function outputs(bytes32 id) external view returns (bytes32 outputsRoot, uint64 tokens);
    function windowEnd(bytes32 id) external view returns (uint64); // until then games may be opened; an answered demand may move it
    function openGames(bytes32 id, uint8 stage) external view returns (uint256); // against the stage, and those it is counted with
    function refunded(bytes32 id) external view returns (bool); // whether a void job's price is the requester's again
    function convicted(bytes32 id, uint8 stage) external view returns (bool);
    function credit(address account) external view returns (uint256);
}
