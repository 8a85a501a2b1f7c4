"""The game that convicts a wrong segment: its state, and an honest party's moves (docs/protocol.md, "The game").

The dataclasses mirror contracts/src/interfaces/IDisputes.sol, field for field. Everything here is pure; the contract's
own checks have their twin in `verifier.rules`. `solve` serves both sides: it finds the first child of the opponent's
list that differs from the truth, and answers with the true list beneath it, or with the proof where one step decides.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING

from verifier.keccak import checksummed, keccak256
from verifier.referee.codec import (
    Instruction,
    Model,
    Opening,
    Source,
    Trace,
    encode_vector,
    slices,
    vector_leaf_elements,
)
from verifier.referee.errors import DataLength
from verifier.referee.tree import Tree, depth, fold, leaf, nodes_at

if TYPE_CHECKING:  # Rationale: the chain's client needs the structs without loading torch
    from verifier.canonical import Case

LIST_LEVELS = 6  # of a tree that one list of nodes goes down, at most: with six no game takes a seventh move
HASH_BYTES = 32
SUM_BYTES = 16
SUM_ENTRIES = 32  # partial sums in a list: 512 bytes
PIECE_BYTES = 128  # of a list of elements or sums: who disputes an entry quotes the piece that holds it
WRONG = leaf(encode_vector([1], wide=False))  # the root of a verdict's vector [1]


class Phase(IntEnum):
    """What the opponent posted last."""

    NONE = 0
    STEPS = 1
    NODES = 2
    ELEMENTS = 3
    SUMS = 4
    HANDOFF = 5


@dataclass(frozen=True)
class Segment:
    """What is accused. kind: verifier.program.Kind; unit: head, block or competitor (STOP: token or 0xffffffff)."""

    job: bytes
    stage: int
    kind: int
    request: int
    layer: int
    position: int
    unit: int


@dataclass(frozen=True)
class Game:
    """A game's whole state. Addresses are as the chain's client writes them; hashes 32 bytes; times in seconds.

    Calls and events carry its bytes: each field in its own width (docs/protocol.md, "A game's state").
    """

    segment: Segment
    challenger: str
    worker: str
    committed_at: int
    bond: int
    gas_rate: int
    grace: int
    model_id: bytes
    rule: bytes
    program_leaves: int
    token: int
    trace: Trace
    sampling: bytes
    first_instruction: int
    steps: bytes
    phase: Phase
    step: int
    level: int
    index: int
    first_chunk: int
    end_chunk: int
    list: bytes
    worker_turn: bool
    turn_started: int
    worker_seconds: int
    challenger_seconds: int
    worker_moves: int
    challenger_moves: int

    _FORMAT = ">32sBBIIII20s5s20sIII16s16s32s32s32s32sIIIIIIHHBBB?5sQII32s32s"

    def encode(self) -> bytes:
        """384 bytes. Raises struct.error, OverflowError or ValueError for what a field cannot hold."""
        s, t = self.segment, self.trace
        return struct.pack(
            self._FORMAT,
            *(s.job, s.stage, s.kind, s.request, s.layer, s.position, s.unit),
            *(_account(self.challenger), self.committed_at.to_bytes(5, "big"), _account(self.worker)),
            *(self.grace, self.token, self.program_leaves, self.bond.to_bytes(16, "big")),
            *(self.gas_rate.to_bytes(16, "big"), self.model_id, self.rule, t.root, self.steps),
            *(t.positions, t.first_layer, t.end_layer, self.first_instruction),
            *(self.worker_seconds, self.challenger_seconds, self.worker_moves, self.challenger_moves),
            *(self.phase, self.step, self.level, self.worker_turn),
            *(self.turn_started.to_bytes(5, "big"), self.index, self.first_chunk, self.end_chunk),
            *(self.list, self.sampling),
        )

    @classmethod
    def decode(cls, data: bytes) -> "Game":
        """The state of 384 bytes. Raises DataLength; ValueError for a phase that there is none of."""
        if len(data) != struct.calcsize(cls._FORMAT):
            raise DataLength(f"expected a game of {struct.calcsize(cls._FORMAT)} bytes, got {len(data)}")
        values = struct.unpack(cls._FORMAT, data)
        challenger, committed_at, worker, grace, token, program_leaves, bond, gas_rate = values[7:15]
        model_id, rule, root, steps, positions, first_layer, end_layer, first_instruction = values[15:23]
        worker_seconds, challenger_seconds, worker_moves, challenger_moves, phase, step, level = values[23:30]
        worker_turn, turn_started, index, first_chunk, end_chunk, posted, sampling = values[30:]
        return cls(
            segment=Segment(*values[:7]),
            challenger=checksummed(challenger),
            worker=checksummed(worker),
            committed_at=int.from_bytes(committed_at, "big"),
            bond=int.from_bytes(bond, "big"),
            gas_rate=int.from_bytes(gas_rate, "big"),
            grace=grace,
            model_id=model_id,
            rule=rule,
            program_leaves=program_leaves,
            token=token,
            trace=Trace(root, positions, first_layer, end_layer),
            sampling=sampling,
            first_instruction=first_instruction,
            steps=steps,
            phase=Phase(phase),
            step=step,
            level=level,
            index=index,
            first_chunk=first_chunk,
            end_chunk=end_chunk,
            list=posted,
            worker_turn=worker_turn,
            turn_started=int.from_bytes(turn_started, "big"),
            worker_seconds=worker_seconds,
            challenger_seconds=challenger_seconds,
            worker_moves=worker_moves,
            challenger_moves=challenger_moves,
        )


@dataclass(frozen=True)
class Move:
    """A descent into the picked child of the opponent's list."""

    record: bytes
    siblings: tuple[bytes, ...]
    pick: int
    claim: bytes
    list: bytes


@dataclass(frozen=True)
class Proof:
    """The inputs of the one step that decides."""

    model: Model
    record: bytes
    pick: int
    claim: bytes
    siblings: tuple[bytes, ...]
    steps: tuple[bytes, ...]
    openings: tuple[Opening, ...]


@dataclass(frozen=True)
class HandoffProof:
    """What shifts the blame of an exact segment to the sender of the hand-off."""

    root: bytes
    leaves: int
    index: int
    record: bytes
    siblings: tuple[bytes, ...]
    signature: bytes


class NothingWrong(ValueError):
    """The opponent's list is true, or the served piece is: there is no honest move."""


def _account(address: str) -> bytes:
    return bytes.fromhex(address.removeprefix("0x"))


# ---- shapes of lists


def levels_per_list(levels: int) -> int:
    """Levels that each list of nodes goes down in a tree of that depth > 0; the last may go fewer."""
    return -(-levels // -(-levels // LIST_LEVELS))


def next_level(levels: int, above: int) -> int:
    """Level of the list beneath a node at level `above` > 0 of a tree of depth `levels`."""
    return max(0, above - levels_per_list(levels))


def level_above(levels: int, level: int) -> int:
    """Level of the node that a list at `level` lies beneath; lists start from the root. Raises ValueError."""
    above = levels
    while above > 0 and next_level(levels, above) != level:
        above = next_level(levels, above)
    if above == 0:
        raise ValueError(f"expected a level that lists of a tree of depth {levels} stop at, got {level}")
    return above


def span(chunks: int) -> int:
    """Chunks that an entry of a list of partial sums covers: the smallest power of 32 that leaves 32 or fewer."""
    covered = 1
    while covered * SUM_ENTRIES < chunks:
        covered *= SUM_ENTRIES
    return covered


def sum_range(first: int, end: int, pick: int) -> tuple[int, int]:
    """The chunks that entry `pick` of the list of partial sums over first .. end - 1 covers."""
    step = span(end - first)
    return first + pick * step, min(first + (pick + 1) * step, end)


def told(posted: bytes) -> bytes:
    """What a game remembers of a posted list of elements or sums: keccak256 of the hashes of its pieces."""
    return keccak256(b"".join(_piece_hashes(posted)))


def quoted(posted: bytes, pick: int, size: int) -> tuple[bytes, tuple[bytes, ...]]:
    """The piece of a posted list that holds entry `pick` of `size` bytes, and the hashes of the other pieces."""
    index, hashes = pick * size // PIECE_BYTES, _piece_hashes(posted)
    return slices(posted, PIECE_BYTES)[index], hashes[:index] + hashes[index + 1 :]


def is_posted(game: Game, posted: bytes) -> bool:
    """Whether this is the list that the state remembers, wherever it was read."""
    match game.phase:
        case Phase.STEPS:
            return keccak256(posted) == game.steps
        case Phase.NODES:
            return bool(posted) and fold(slices(posted, HASH_BYTES)) == game.list
        case Phase.ELEMENTS | Phase.SUMS:
            return told(posted) == game.list
    return True


def _piece_hashes(posted: bytes) -> tuple[bytes, ...]:
    return tuple(keccak256(piece) for piece in slices(posted, PIECE_BYTES))


# ---- what an honest party does


def read_roots(ins: Instruction, roots: Sequence[bytes]) -> list[bytes]:
    """Of the roots of all earlier vectors those that an instruction reads, in the order of its operands."""
    ids = [operand.id for operand in (ins.x, ins.y, ins.z) if operand.source == Source.STEP]
    return [roots[place] for place in ids if place < len(roots)]


def opening_steps(case: "Case") -> bytes:
    """What a challenger posts first: all instruction roots. Raises NothingWrong for a piece within tolerance."""
    if not case.verdict():
        raise NothingWrong(f"expected a wrong piece, got one within tolerance at {case.segment}")
    return b"".join(case.steps())


def solve(game: Game, opponent_list: bytes, case: "Case", steps: bytes) -> Move | Proof:
    """The honest answer to what the opponent posted last. Whoever's turn it is: case is the truth for both sides.

    steps: the challenger's concatenated instruction roots, the list of the game's first move. Raises NothingWrong;
    ValueError for a phase that asks for no move or a list that is not of the game.
    """
    match game.phase:
        case Phase.STEPS:
            return _answer_steps(opponent_list, case)
        case Phase.NODES:
            return _answer_nodes(game, opponent_list, case)
        case Phase.ELEMENTS:
            return _answer_elements(game, opponent_list, case, steps)
        case Phase.SUMS:
            return _answer_sums(game, opponent_list, case, steps)
    raise ValueError(f"expected a phase with a list to answer, got {game.phase.name}")


def _answer_steps(claim: bytes, case: "Case") -> Move:
    pick = _first_difference(slices(claim, HASH_BYTES), case.steps())
    levels = depth(case.leaves(pick))
    below = _nodes(case, pick, levels, 0) if levels else case.leaf(pick, 0)
    return Move(case.record(pick), case.record_proof(pick), pick, claim, below)


def _answer_nodes(game: Game, claim: bytes, case: "Case") -> Move:
    i, theirs = game.step, slices(claim, HASH_BYTES)
    ours = [node.tobytes() for node in case.tree(i).nodes(game.level)[game.index : game.index + len(theirs)]]
    pick = _first_difference(theirs, ours)
    node = game.index + pick
    below = _nodes(case, i, game.level, node) if game.level else case.leaf(i, node)
    return Move(case.record(i), tuple(Tree(theirs).prove(pick)), pick, theirs[pick], below)


def _answer_elements(game: Game, claim: bytes, case: "Case", steps: bytes) -> Move | Proof:
    i = game.step
    wide = bool(case.instructions[i].wide)
    size = SUM_BYTES if wide else 8
    pick = _first_difference(slices(claim, size), slices(case.leaf(i, game.index), size))
    element = game.index * vector_leaf_elements(wide) + pick
    chunks = case.chunks(i)
    if chunks == 1:
        return _proof(game, case, element, 0, pick, quoted(claim, pick, size), steps)
    piece, hashes = quoted(claim, pick, size)
    return Move(case.record(i), hashes, pick, piece, encode_vector(case.sums(i, element, 0, chunks), wide=True))


def _answer_sums(game: Game, claim: bytes, case: "Case", steps: bytes) -> Move | Proof:
    i, element = game.step, game.index
    ours = encode_vector(case.sums(i, element, game.first_chunk, game.end_chunk), wide=True)
    pick = _first_difference(slices(claim, SUM_BYTES), slices(ours, SUM_BYTES))
    first, end = sum_range(game.first_chunk, game.end_chunk, pick)
    if end - first == 1:
        return _proof(game, case, element, first, pick, quoted(claim, pick, SUM_BYTES), steps)
    piece, hashes = quoted(claim, pick, SUM_BYTES)
    return Move(case.record(i), hashes, pick, piece, encode_vector(case.sums(i, element, first, end), wide=True))


def _proof(
    game: Game,
    case: "Case",
    element: int,
    chunk: int,
    pick: int,
    claim: tuple[bytes, tuple[bytes, ...]],
    steps: bytes,
) -> Proof:
    i = game.step
    openings = tuple(case.openings(i, element, chunk))
    roots = tuple(read_roots(case.instructions[i], slices(steps, HASH_BYTES)))
    if keccak256(b"".join(roots)) != game.steps:
        raise ValueError("expected the list of the game's first move, got a later one: its first event was missed")
    return Proof(case.model, case.record(i), pick, *claim, roots, openings)


def _nodes(case: "Case", i: int, above: int, parent: int) -> bytes:
    """The true list of nodes beneath node `parent` of level `above`."""
    levels = depth(case.leaves(i))
    level = next_level(levels, above)
    first, end = parent << (above - level), (parent + 1) << (above - level)
    return case.tree(i).nodes(level)[first : min(end, nodes_at(case.leaves(i), level))].tobytes()


def _first_difference(theirs: list[bytes], ours: list[bytes]) -> int:
    """Index of the first false entry. Raises ValueError for another length, NothingWrong if all are true."""
    if len(theirs) != len(ours):
        raise ValueError(f"expected a list of {len(ours)} entries, got {len(theirs)}")
    for index, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        if their != our:
            return index
    raise NothingWrong("expected a false entry in the opponent's list, got none")


# ---- clocks


def remaining_seconds(game: Game, now: int) -> int:
    """What the side to move has left at `now`; below 0 its flag may fall. Grace is already in the state."""
    held = game.worker_seconds if game.worker_turn else game.challenger_seconds
    return held - (now - game.turn_started)


def may_flag(game: Game, now: int) -> bool:
    """Whether the side to move has overstepped: elapsed > remaining. At 0 seconds left a move is still in time."""
    return remaining_seconds(game, now) < 0


def pass_turn(game: Game, now: int) -> Game:
    """The state after a move: the mover's clock charged, the other side's turn begun with `grace` seconds at least."""
    grace = game.grace
    left = remaining_seconds(game, now)
    if game.worker_turn:
        charged = replace(game, worker_seconds=left, worker_moves=game.worker_moves + 1)
        turned = replace(charged, challenger_seconds=max(game.challenger_seconds, grace))
    else:
        charged = replace(game, challenger_seconds=left, challenger_moves=game.challenger_moves + 1)
        turned = replace(charged, worker_seconds=max(game.worker_seconds, grace))
    return replace(turned, worker_turn=not game.worker_turn, turn_started=now)
