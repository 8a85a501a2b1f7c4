// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Game, Move, Phase, Proof, Segment} from "../../../contracts/src/interfaces/IDisputes.sol";
import {Instruction, Opening} from "../../../contracts/src/interfaces/IReferee.sol";
import {Descent} from "../../../contracts/src/game/Descent.sol";
import {Codec} from "../../../contracts/src/referee/Codec.sol";
import {Tree} from "../../../contracts/src/referee/Tree.sol";
import {Batch, Batches} from "./Batches.sol";
import {Case, Cases} from "./Cases.sol";
import {Forest} from "./Forest.sol";
import {Plan} from "./Plan.sol";

enum Kind {
    NOTHING, // every entry of the opponent's list is what this side holds true
    MOVE,
    PROOF
}

struct Answer {
    Kind kind;
    Move move;
    Proof proof;
}

/// @notice What a side is faced with.
struct Board {
    Game game;
    bytes posted; // the opponent's list
    bytes steps; // the challenger's instruction roots
    uint256 scribble; // 0: answers from its case; else picks and posts at random
}

/// @title Solver: either side's next move, from its version of the truth
/// @dev A proof lacks its model: whoever sends it knows it.
library Solver {
    function solve(Board memory board, Case memory c) internal pure returns (Answer memory answer) {
        Phase phase = board.game.phase;
        if (phase == Phase.Steps) _pickStep(answer, board, c);
        else if (phase == Phase.Nodes) _pickNode(answer, board, c);
        else if (phase == Phase.Elements) _pickElement(answer, board, c);
        else if (phase == Phase.Sums) _pickSum(answer, board, c);
        if (answer.kind == Kind.MOVE && board.scribble != 0) {
            answer.move.list[board.scribble % answer.move.list.length] ^= 0x01;
        }
    }

    function _pickStep(Answer memory answer, Board memory board, Case memory c) private pure {
        (bool found, uint256 pick) = _differs(board, board.steps, Forest.bytesOf(Cases.roots(c)), 32);
        if (!found) return;
        answer.kind = Kind.MOVE;
        answer.move = Move({
            record: Plan.record(c.program[pick]),
            siblings: Forest.siblings(Plan.programLeaves(), Plan.first(c.segment.kind) + pick, 1),
            pick: uint64(pick),
            claim: board.steps,
            list: ""
        });
        bytes32[] memory leaves = Cases.leaves(c, pick);
        // No vector of this model has more than 64 leaves: its nodes are one list.
        answer.move.list = leaves.length > 1 ? Forest.bytesOf(leaves) : Cases.leaf(c, pick, 0);
    }

    function _pickNode(Answer memory answer, Board memory board, Case memory c) private pure {
        uint256 step = board.game.step;
        (bool found, uint256 pick) = _differs(board, board.posted, Forest.bytesOf(Cases.leaves(c, step)), 32);
        if (!found) return;
        answer.kind = Kind.MOVE;
        answer.move = Move({
            record: Plan.record(c.program[step]),
            siblings: Forest.siblings(Forest.words(board.posted), pick, 1),
            pick: uint64(pick),
            claim: Forest.cut(board.posted, 32 * pick, 32),
            list: Cases.leaf(c, step, pick)
        });
    }

    function _pickElement(Answer memory answer, Board memory board, Case memory c) private pure {
        uint256 step = board.game.step;
        bool wide = c.program[step].wide != 0;
        bytes memory mine = Cases.leaf(c, step, board.game.index);
        (bool found, uint256 pick) = _differs(board, board.posted, mine, Codec.elementBytes(wide));
        if (!found) return;
        uint256 element = board.game.index * Codec.elementsPerLeaf(wide) + pick;
        uint256 chunks = Codec.chunkCount(c.program[step], c.segment.position);
        if (chunks == 1) {
            return _prove(answer, board, c, pick, Codec.elementBytes(wide), Cases.openings(c, step, element, 0));
        }
        answer.kind = Kind.MOVE;
        answer.move = Move({
            record: Plan.record(c.program[step]),
            siblings: _others(board.posted, pick, Codec.elementBytes(wide)),
            pick: uint64(pick),
            claim: _quoted(board.posted, pick, Codec.elementBytes(wide)),
            list: Cases.sums(c, step, element, 0, chunks)
        });
    }

    function _pickSum(Answer memory answer, Board memory board, Case memory c) private pure {
        Game memory game = board.game;
        bytes memory mine = Cases.sums(c, game.step, game.index, game.firstChunk, game.endChunk);
        (bool found, uint256 pick) = _differs(board, board.posted, mine, Descent.SUM_BYTES);
        if (!found) return;
        Opening[] memory openings = Cases.openings(c, game.step, game.index, game.firstChunk + pick);
        _prove(answer, board, c, pick, Descent.SUM_BYTES, openings);
    }

    /// @dev The piece of a list that holds entry `pick` of `size` bytes.
    function _quoted(bytes memory list, uint256 pick, uint256 size) private pure returns (bytes memory) {
        uint256 index = pick * size / Descent.PIECE_BYTES;
        return Forest.cut(list, index * Descent.PIECE_BYTES, Descent.pieceBytes(list.length, index));
    }

    function _others(bytes memory list, uint256 pick, uint256 size) private pure returns (bytes32[] memory) {
        return Forest.otherPieces(list, pick * size / Descent.PIECE_BYTES);
    }

    function _prove(
        Answer memory answer,
        Board memory board,
        Case memory c,
        uint256 pick,
        uint256 size,
        Opening[] memory openings
    ) private pure {
        answer.kind = Kind.PROOF;
        answer.proof.record = Plan.record(c.program[board.game.step]);
        answer.proof.pick = uint64(pick);
        answer.proof.claim = _quoted(board.posted, pick, size);
        answer.proof.siblings = _others(board.posted, pick, size);
        answer.proof.steps = Forest.readRoots(c.program[board.game.step], board.steps);
        answer.proof.openings = openings;
    }

    /// @dev The first entry that is not this side's own.
    function _differs(Board memory board, bytes memory theirs, bytes memory mine, uint256 size)
        private
        pure
        returns (bool found, uint256 pick)
    {
        if (board.scribble != 0) return (true, (board.scribble >> 64) % (mine.length / size));
        for (; pick < mine.length / size; ++pick) {
            if (keccak256(Forest.cut(theirs, pick * size, size)) != keccak256(Forest.cut(mine, pick * size, size))) {
                return (true, pick);
            }
        }
    }

    // ---- opening a game

    /// @notice What `challenge` wants to see.
    function evidence(Batch memory b, Segment memory s) internal pure returns (Opening[] memory list) {
        list = new Opening[](s.kind == Plan.TOKEN ? 5 : 2);
        list[0] = bare(b.nodes[s.stage]);
        list[1] = Plan.opened(Plan.header(s.kind), s.kind);
        if (s.kind != Plan.TOKEN) return list;
        (list[2], list[3], list[4]) = (bare(_request()), bare(b.output), bare(b.tokens));
    }

    /// @notice What `show` wants to see.
    function exhibits(Batch memory b, Segment memory s) internal pure returns (Opening[] memory list) {
        if (s.kind == Plan.STOP) return _list(bare(_request()), bare(b.output), bare(b.nodes[1]));
        if (s.kind == Plan.BILL) return _list(bare(b.output));
        if (s.kind == Plan.LENGTH) return _list(bare(b.nodes[1]), bare(b.nodes[0]));
        if (s.kind == Plan.LINK) {
            bool boundary = s.layer < s.stage;
            Opening[] memory head = boundary ? _list(bare(b.nodes[0]), bare(b.nodes[1])) : _list(bare(b.nodes[1]));
            return _join(
                head,
                _list(
                    Cases.rowOf(b, s.layer, s.position, Plan.MLP_OUT, s.unit, 1),
                    Cases.rowOf(b, 1, s.position, boundary ? Plan.H : Plan.OUT, s.unit, 1)
                )
            );
        }
        Opening memory prompt = bare(abi.encodePacked(Batches.PROMPT));
        Opening[] memory told = s.position == 0
            ? _list(bare(b.nodes[0]), bare(_request()), prompt)
            : _join(_list(bare(b.nodes[0]), bare(_request())), _list(bare(b.output), bare(b.tokens)));
        uint32 token = s.position == 0 ? Batches.PROMPT : Cases.chosen(b, s.position - 1);
        Opening[] memory same = _list(
            Cases.rowOf(b, 0, s.position, Plan.H, s.unit * Plan.BLOCK, 64),
            Cases.weight(Plan.TOKEN_LEAF + 2 * token, Plan.embedding(token), s.unit)
        );
        return _join(_join(told, _exact(s.kind)), same);
    }

    /// @notice What `prepare` wants to see of a LINK.
    function premises(Batch memory b, Segment memory s) internal pure returns (Opening[] memory) {
        return _list(
            bare(b.nodes[s.layer]),
            Cases.rowOf(b, s.layer, s.position, Plan.H, s.unit, 1),
            Cases.rowOf(b, s.layer, s.position, Plan.ATTN, s.unit, 1)
        );
    }

    function _exact(uint8 kind) private pure returns (Opening[] memory) {
        bytes memory record = Plan.record(Plan.program(kind)[0]);
        return _list(Plan.opened(Plan.header(kind), kind), Plan.opened(record, Plan.first(kind)));
    }

    /// @notice The only leaf of its tree.
    function bare(bytes memory data) internal pure returns (Opening memory) {
        return Opening(data, new bytes32[](0));
    }

    function _request() private pure returns (bytes memory) {
        return Batches.request();
    }

    function _list(Opening memory a) private pure returns (Opening[] memory list) {
        list = new Opening[](1);
        list[0] = a;
    }

    function _list(Opening memory a, Opening memory b) private pure returns (Opening[] memory list) {
        list = new Opening[](2);
        (list[0], list[1]) = (a, b);
    }

    function _list(Opening memory a, Opening memory b, Opening memory c) private pure returns (Opening[] memory list) {
        list = new Opening[](3);
        (list[0], list[1], list[2]) = (a, b, c);
    }

    function _join(Opening[] memory a, Opening[] memory b) private pure returns (Opening[] memory list) {
        list = new Opening[](a.length + b.length);
        for (uint256 i = 0; i < list.length; ++i) {
            list[i] = i < a.length ? a[i] : b[i - a.length];
        }
    }
}
