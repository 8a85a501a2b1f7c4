// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Model, Opening} from "./IReferee.sol";

/// @notice One range of leaves of one committed tree. What lies above it - the record and the proofs - is part of every answer.
struct Demand {
    bytes32 job;
    uint8 stage; // who must answer
    uint8 kind; // 0 PROMPT, 1 OUTPUT, 2 TENSORS, 3 LEAVES
    uint32 request;
    uint32 tensor; // LEAVES: place among the request's tensors at this stage; else 0
    uint64 first; // leaf
    uint32 count; // leaves; those beyond the tree's end need no answer
}

/// @notice A demand's whole state. Storage holds keccak256(abi.encode(demanded)); every call carries the state itself.
struct Demanded {
    Demand demand;
    address demander;
    uint64 openedAt;
    uint64 deadline; // an answer is in time iff block.timestamp <= deadline
    uint128 pay; // to the worker for its answer
    uint128 burned; // what the demander paid besides
}

/// @title Withheld data, posted on chain or lost
/// @notice docs/protocol.md, "Demands".
interface IDemands {
    event DemandOpened(bytes32 indexed id, bytes32 indexed job, Demanded demanded);
    /// @notice openings: the record (request, output or trace node) and, unless the range lies beyond the tree's end, the leaves.
    event DemandAnswered(bytes32 indexed id, bytes32 indexed job, Opening[] openings);
    event DemandLapsed(bytes32 indexed id, bytes32 indexed job, uint8 stage, address demander);
    event Credited(address indexed account, uint256 amount, bytes32 indexed id); // an answer's pay, or what a lapsed demand returns
    event Withdrawn(address indexed account, uint256 amount);

    error DemandExists(bytes32 id);
    error WrongState(bytes32 id);
    error WrongModel(bytes32 expected, bytes32 actual);
    error WrongDemand(string what);
    error PriceTooHigh(uint256 price, uint256 most);
    error TooEarly(uint64 availableAt);
    error TooLate(uint64 deadline);
    error NotYourTurn(address sender);
    error OpeningCount(uint256 expected, uint256 actual);
    error DataLength(uint256 expected, uint256 actual);
    error RootMismatch(bytes32 expected, bytes32 actual);
    error WrongRecord(uint256 request, uint256 actual); // the record is another request's
    error CalldataTooLong(uint256 length);
    error NothingToWithdraw();

    /// @notice Demands a range, once a job. Draws the price. Only before the job's window, as it was when first demanded from, is over.
    /// @param most that may be drawn: others' demands raise the price
    function demand(Demand calldata demand_, Model calldata model, uint256 most) external returns (bytes32 id);

    /// @notice By the accused or its signer. Every record and leaf must have exactly the length that the law gives it: whoever committed to another
    /// cannot answer.
    function answer(bytes32 id, Demanded calldata demanded, Model calldata model, Opening[] calldata openings) external;

    /// @notice By anyone, once the deadline has passed: convicts the stage, returns what did not burn.
    function lapse(bytes32 id, Demanded calldata demanded) external;

    function withdraw() external; // the caller's credit

    function credit(address account) external view returns (uint256);
    function stateOf(bytes32 id) external view returns (bytes32); // 0: never demanded
    function openDemands(bytes32 job, uint8 stage) external view returns (uint256);

    /// @notice What `demand` would draw now. Reverts for what it would refuse, but for its time and repetition.
    function priceOf(Demand calldata demand_, Model calldata model) external view returns (uint256);
}
