"""The twin of contracts/src/Disputes.sol: what a move does to a game, and which moves are refused (docs/protocol.md).

Used to follow games, to check a move before paying for it, and in tests. Money and hand-offs stay with the contract.
Hashes of the state's own fields are keccak256, as the EVM's.
"""

from dataclasses import replace

from verifier.game import (
    HASH_BYTES,
    PIECE_BYTES,
    SUM_BYTES,
    WRONG,
    Game,
    Move,
    Phase,
    Proof,
    level_above,
    next_level,
    pass_turn,
    read_roots,
    remaining_seconds,
    span,
    sum_range,
    told,
)
from verifier.keccak import keccak256
from verifier.referee.codec import (
    Cell,
    Instruction,
    Source,
    decode_vector,
    slices,
    vector_leaf_bytes,
    vector_leaf_elements,
)
from verifier.referee.ops import combine, finish
from verifier.referee.referee import chunk_count, element_count, step
from verifier.referee.tree import depth, fold, leaf, nodes_at, root_of_range


class RuleError(ValueError):
    """The contract would refuse the move. The classes bear the names that it reverts with.

    RuleError
      WrongPhase WrongListLength VerdictNotWrong PickOutOfRange ClaimMismatch SameRoot RecordMismatch WrongModel
      MustProve MustDescend NotWrong FlagFallen
    """


class WrongPhase(RuleError):
    """The phase asks for another kind of move."""


class WrongListLength(RuleError):
    """A posted list is not exactly as long as the program and the place imply."""


class VerdictNotWrong(RuleError):
    """The last instruction root is not the constant `wrong`."""


class PickOutOfRange(RuleError):
    """The picked place is not in the opponent's list."""


class ClaimMismatch(RuleError):
    """What is quoted is not what the opponent posted."""


class SameRoot(RuleError):
    """The mover's list agrees with what it disputes."""


class RecordMismatch(RuleError):
    """The instruction is not the one in dispute, or not of the program."""


class WrongModel(RuleError):
    """The model is not the one of the job."""


class MustProve(RuleError):
    """Nothing lies beneath: prove instead."""


class MustDescend(RuleError):
    """A long sum: descend instead."""


class NotWrong(RuleError):
    """The opponent's value is right."""


class FlagFallen(RuleError):
    """The mover's time is over."""


def check_opening(steps: bytes, count: int) -> None:
    """Whether a challenge may open with these concatenated roots of `count` instructions. Raises RuleError."""
    _length(steps, HASH_BYTES * count)
    if steps[-HASH_BYTES:] != WRONG:
        raise VerdictNotWrong(f"expected the last root {WRONG.hex()}, got {steps[-HASH_BYTES:].hex()}")


def apply(game: Game, move: Move, now: int) -> Game:
    """The state after a descent at time `now` (seconds). Raises RuleError."""
    _in_time(game, now)
    match game.phase:
        case Phase.STEPS:
            moved = _pick_step(game, move)
        case Phase.NODES:
            moved = _pick_node(game, move)
        case Phase.ELEMENTS:
            moved = _pick_element(game, move)
        case Phase.SUMS:
            moved = _pick_sum(game, move)
        case _:
            raise WrongPhase(f"expected a phase that descends, got {game.phase.name}")
    return pass_turn(moved, now)


def decide(game: Game, proof: Proof, now: int) -> bool:
    """Whether the worker is convicted by a proof at time `now`: the mover wins. Raises RuleError and RefereeError."""
    _in_time(game, now)
    if game.phase not in (Phase.ELEMENTS, Phase.SUMS):
        raise WrongPhase(f"expected elements or sums, got {game.phase.name}")
    ins = _instruction(game, proof.record)
    if not reads_earlier(ins, game.step):
        raise RecordMismatch(f"expected instruction {game.step} to read earlier ones")
    if keccak256(proof.model.abi_words()) != game.model_id:
        raise WrongModel(f"expected model {game.model_id.hex()}")
    if keccak256(b"".join(proof.steps)) != game.steps:
        raise ClaimMismatch("expected the roots that the instruction reads")
    if game.phase == Phase.ELEMENTS:
        wide = bool(ins.wide)
        claimed = _claimed(game, ins, proof.pick, proof.claim, proof.siblings)
        element, chunk = game.index * _per_leaf(ins) + proof.pick, 0
        if chunk_count(ins, game.segment.position) > 1:
            raise MustDescend("expected a descent into the element's sums")
    else:
        wide = True
        claimed = _claimed(game, ins, proof.pick, proof.claim, proof.siblings)
        element, (chunk, end) = game.index, sum_range(game.first_chunk, game.end_chunk, proof.pick)
        if end - chunk > 1:
            raise MustDescend("expected a descent into a partial sum of several chunks")
    segment = game.segment
    cell = Cell(segment.layer, segment.position, segment.unit, game.token, game.trace, game.sampling)
    value = step(proof.model, cell, proof.steps, ins, element, chunk, proof.openings)
    if game.phase == Phase.ELEMENTS:
        value = finish(ins.op, value, ins.a)
    if _encoded(value, wide) == claimed:
        raise NotWrong(f"expected another value than {value}")
    return not game.worker_turn


def reads_earlier(ins: Instruction, place: int) -> bool:
    """Whether an instruction reads only vectors of instructions before `place`."""
    return all(operand.id < place for operand in (ins.x, ins.y, ins.z) if operand.source == Source.STEP)


def _pick_step(game: Game, move: Move) -> Game:
    if keccak256(move.claim) != game.steps:
        raise ClaimMismatch("expected the challenger's instruction roots")
    roots = slices(move.claim, HASH_BYTES)
    _within(move.pick, len(roots))
    place = game.first_instruction + move.pick
    if root_of_range([leaf(move.record)], place, game.program_leaves, move.siblings) != game.rule:
        raise RecordMismatch(f"expected instruction {move.pick} of the program")
    ins = Instruction.decode(move.record)
    read = keccak256(b"".join(read_roots(ins, roots[: move.pick])))
    picked = replace(game, step=move.pick, rule=keccak256(move.record), steps=read)
    leaves = _leaves(picked, ins)
    if leaves > 1:
        return _post_nodes(picked, leaves, depth(leaves), 0, roots[move.pick], move.list)
    return _post_leaf(picked, ins, 0, roots[move.pick], move.list)


def _pick_node(game: Game, move: Move) -> Game:
    ins = _instruction(game, move.record)
    leaves = _leaves(game, ins)
    above = level_above(depth(leaves), game.level)
    length = _children(leaves, game.level, above, game.index >> (above - game.level))
    _within(move.pick, length)
    _length(move.claim, HASH_BYTES)
    if root_of_range([move.claim], move.pick, length, move.siblings) != game.list:
        raise ClaimMismatch("expected a node of the opponent's list")
    picked = game.index + move.pick
    if game.level:
        return _post_nodes(game, leaves, game.level, picked, move.claim, move.list)
    return _post_leaf(game, ins, picked, move.claim, move.list)


def _pick_element(game: Game, move: Move) -> Game:
    ins = _instruction(game, move.record)
    disputed = _claimed(game, ins, move.pick, move.claim, move.siblings)
    chunks = chunk_count(ins, game.segment.position)
    if chunks == 1:
        raise MustProve("expected a proof of an element that one step yields")
    total = _combined(ins, move.list, chunks)
    if _encoded(finish(ins.op, total, ins.a), bool(ins.wide)) == disputed:
        raise SameRoot("expected sums that yield another element")
    index = game.index * _per_leaf(ins) + move.pick
    posted = replace(game, phase=Phase.SUMS, index=index, first_chunk=0, end_chunk=chunks)
    return replace(posted, list=told(move.list))


def _pick_sum(game: Game, move: Move) -> Game:
    ins = _instruction(game, move.record)
    disputed = _claimed(game, ins, move.pick, move.claim, move.siblings)
    first, end = sum_range(game.first_chunk, game.end_chunk, move.pick)
    if end - first == 1:
        raise MustProve("expected a proof of a partial sum of one chunk")
    if _combined(ins, move.list, end - first) == decode_vector(disputed, wide=True)[0]:
        raise SameRoot("expected sums of another total")
    return replace(game, first_chunk=first, end_chunk=end, list=told(move.list))


def _post_nodes(game: Game, leaves: int, above: int, parent: int, disputed: bytes, posted: bytes) -> Game:
    """Posts the nodes beneath node `parent` of level `above`."""
    level = next_level(depth(leaves), above)
    _length(posted, HASH_BYTES * _children(leaves, level, above, parent))
    top = fold(slices(posted, HASH_BYTES))
    if top == disputed:
        raise SameRoot("expected nodes of another root")
    return replace(game, phase=Phase.NODES, level=level, index=parent << (above - level), list=top)


def _post_leaf(game: Game, ins: Instruction, index: int, disputed: bytes, posted: bytes) -> Game:
    _length(posted, _leaf_bytes(game, ins, index))
    if leaf(posted) == disputed:
        raise SameRoot("expected elements of another leaf")
    return replace(game, phase=Phase.ELEMENTS, level=0, index=index, list=told(posted))


def _combined(ins: Instruction, posted: bytes, chunks: int) -> int:
    """The total of a posted list of partial sums over so many chunks."""
    _length(posted, SUM_BYTES * _sums(chunks))
    return combine(ins.op, decode_vector(posted, wide=True))


def _claimed(game: Game, ins: Instruction, pick: int, piece: bytes, others: tuple[bytes, ...]) -> bytes:
    """Entry `pick` of the opponent's list of elements or sums, from the piece of the list that holds it."""
    if game.phase == Phase.SUMS:
        size, length = SUM_BYTES, SUM_BYTES * _sums(game.end_chunk - game.first_chunk)
    else:
        size, length = _element_bytes(ins), _leaf_bytes(game, ins, game.index)
    _within(pick, length // size)
    index, first = divmod(pick * size, PIECE_BYTES)
    _length(piece, min(length - index * PIECE_BYTES, PIECE_BYTES))
    hashes = (*others[:index], keccak256(piece), *others[index:])
    if len(others) != (length - 1) // PIECE_BYTES or keccak256(b"".join(hashes)) != game.list:
        raise ClaimMismatch("expected a piece of the opponent's list")
    return piece[first : first + size]


def _leaf_bytes(game: Game, ins: Instruction, index: int) -> int:
    """Bytes of leaf `index` of the vector in dispute."""
    elements = element_count(ins, game.segment.position, game.segment.unit)
    full = vector_leaf_bytes(bool(ins.wide))
    return min(elements * _element_bytes(ins) - index * full, full)


def _sums(chunks: int) -> int:
    """Entries of a list of partial sums over so many chunks."""
    return -(-chunks // span(chunks))


def _instruction(game: Game, record: bytes) -> Instruction:
    if keccak256(record) != game.rule:
        raise RecordMismatch(f"expected the record of instruction {game.step}")
    return Instruction.decode(record)


def _encoded(value: int, wide: bool) -> bytes:
    """The element's bytes; the low bits, as in the EVM, of a value that does not fit: no honest list leads to one."""
    size = 16 if wide else 8
    code = 2 * value if value >= 0 else -2 * value - 1
    return (code % (1 << 8 * size)).to_bytes(size, "big")


def _children(leaves: int, level: int, above: int, parent: int) -> int:
    """Length of the list at `level` beneath node `parent` of `above`."""
    down = above - level
    return min((parent + 1) << down, nodes_at(leaves, level)) - (parent << down)


def _leaves(game: Game, ins: Instruction) -> int:
    elements = element_count(ins, game.segment.position, game.segment.unit)
    return -(-elements // _per_leaf(ins))


def _element_bytes(ins: Instruction) -> int:
    return 16 if ins.wide else 8


def _per_leaf(ins: Instruction) -> int:
    return vector_leaf_elements(bool(ins.wide))


def _in_time(game: Game, now: int) -> None:
    if remaining_seconds(game, now) < 0:
        raise FlagFallen(f"expected a move in time, got one {-remaining_seconds(game, now)} s late")


def _within(pick: int, count: int) -> None:
    if not 0 <= pick < count:
        raise PickOutOfRange(f"expected a place below {count}, got {pick}")


def _length(posted: bytes, expected: int) -> None:
    if len(posted) != expected:
        raise WrongListLength(f"expected {expected} bytes, got {len(posted)}")
