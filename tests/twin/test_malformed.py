"""Calls that are too long, cut off, not canonical or point elsewhere, at every entry of the judge and of Demands.

Each is refused, by name wherever the contract gets to read it, and costs no more than its own calldata and what the
well-formed call spends on checking.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from random import Random
from typing import Any, TypeVar

import pytest

from bench._arena import NAMELESS, Arena
from bench._court import CLOCK_SECONDS, GAS_RATE, GRACE_SECONDS
from bench._liar import Liar, Lie
from bench._market import CHALLENGER, LONG_AT, STRANGER, WORKERS, Batch, Market, serve, write_model
from contracts.abi import encode_struct, functions
from contracts.client import challenge_id
from contracts.transport import floor_gas
from deploy.deployment import deploy
from deploy.devnet import Devnet
from deploy.keys import dev_account
from verifier.commit import HandoffTree
from verifier.demand import Demand, Demanded, Wanted, answer_gas, answer_trace, deadline, grid_of, price
from verifier.game import HandoffProof, Move, Phase, Proof, Segment, solve
from verifier.keccak import keccak256
from verifier.program import Kind
from verifier.referee.codec import Opening, handoff_row
from verifier.weights import Weights

FUNDS = 10**30
LONGEST = 24 * 1024
LONGEST_ANSWER = 72 * 1024
CHECKING_GAS = 30_000  # beyond a transaction and its calldata: to look at lengths, a state and a clock
CUTS, DIRTY = 12, 12
WSUM = 4
RECORD_FIELD, STEPS_FIELD = 14, 18  # words of a Proof's head: 14 of the model, record, pick, claim, siblings, steps
POSITION = 597  # WSUM has 75 chunks: two lists of sums


@dataclass(frozen=True)
class Court:
    arena: Arena
    counter: Arena  # of Demands
    market: Market
    guilty: Batch
    innocent: Batch


@pytest.fixture(scope="module")
def court(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Court]:
    weights = Weights.open(write_model(tmp_path_factory.mktemp("model")), threads=1)
    with Devnet() as devnet:
        market = Market(devnet.url, deploy(devnet.url, dev_account(0), withdrawal_seconds=60), weights)
        market.settle_in()
        market.chain(CHALLENGER).disputes.deposit(FUNDS // 2)
        market.chain(CHALLENGER).token.approve(market.addresses.demands, FUNDS)
        guilty = market.batch(True, serve(weights, changes={(LONG_AT, "1.h"): (9, 260)}))
        innocent = market.batch(False, serve(weights))
        arena, counter = Arena(devnet, market.addresses.disputes), Arena(devnet, market.addresses.demands)
        yield Court(arena, counter, market, guilty, innocent)
        arena.close()
        counter.close()


def encode(name: str, *arguments: Any) -> bytes:
    return functions("Disputes")[name].encode(arguments)


def encode_demands(name: str, *arguments: Any) -> bytes:
    return functions("Demands")[name].encode(arguments)


def of_bytes(data: bytes, seed: int, longest: int | None = LONGEST) -> Iterator[tuple[str, bytes]]:
    """Too long; cut off anywhere before the last word, which may be padding; a head with bits where none belong.

    longest: None where nothing behind the arguments is ever read, as they are of a fixed length.
    """
    random = Random(seed)
    if longest is not None:
        yield "too long", data + bytes(longest + 1 - len(data))
        yield "much too long", data + random.randbytes(100_000)
    for _ in range(CUTS):
        yield "cut off", data[: random.randrange(4, len(data) - 32)]
    yield "cut off", data[:-32]
    yield "no arguments", data[:4]
    words = (len(data) - 4) // 32
    for _ in range(DIRTY):
        at = 4 + 32 * random.randrange(min(words, 6))
        word = int.from_bytes(data[at : at + 32], "big") ^ 1 << random.randrange(160, 256)
        yield "dirty", data[:at] + word.to_bytes(32, "big") + data[at + 32 :]


def of_openings(openings: Sequence[Opening]) -> Iterator[tuple[str, tuple[Opening, ...]]]:
    """Each opening cut, lengthened, without a sibling, with one more; one opening more and less; two exchanged."""
    yield "an opening less", tuple(openings[:-1])
    yield "an opening more", (*openings, openings[-1])
    if len(openings) > 1:
        yield "exchanged", (openings[1], openings[0], *openings[2:])
    for i, opening in enumerate(openings):
        for what, changed in (
            ("data cut off", replace(opening, data=opening.data[:-1])),
            ("data too long", replace(opening, data=opening.data + b"\0")),
            ("no data", replace(opening, data=b"")),
            ("much data", replace(opening, data=opening.data + bytes(LONGEST))),
            ("a sibling more", replace(opening, siblings=(*opening.siblings, bytes(32)))),
            ("a sibling less", replace(opening, siblings=opening.siblings[:-1])),
        ):
            if changed != opening:
                yield f"opening {i}: {what}", (*openings[:i], changed, *openings[i + 1 :])


R = TypeVar("R", Move, Proof, HandoffProof)


def with_bytes(record: R, name: str, value: bytes) -> R:
    """The same with another field of that name."""
    changed: dict[str, Any] = {name: value}
    return replace(record, **changed)


def of_segment(segment: Segment) -> Iterator[tuple[str, Segment]]:
    """Places that are none. Each has a commitment of its own."""
    for name, value in (
        ("stage", 2),
        ("kind", 12),
        ("request", 2),
        ("layer", 2),
        ("position", 1 << 30),
        ("unit", 1 << 31),
    ):
        changed: dict[str, Any] = {name: value}
        yield f"no such {name}", replace(segment, **changed)


def of_move(move: Move, phase: Phase) -> Iterator[tuple[str, Move]]:
    if phase in (Phase.STEPS, Phase.NODES):  # else it is another claim about the same piece, and as good a move
        yield "pick", replace(move, pick=move.pick + 1)
    yield "pick beyond the list", replace(move, pick=1 << 20)
    yield "the largest pick", replace(move, pick=(1 << 64) - 1)
    for name in ("record", "claim", "list"):
        held: bytes = getattr(move, name)
        yield f"{name} cut off", with_bytes(move, name, held[:-1])
        yield f"{name} too long", with_bytes(move, name, held + b"\0")
        yield f"no {name}", with_bytes(move, name, b"")
        yield f"much {name}", with_bytes(move, name, held + bytes(LONGEST))
    yield "list of one entry more", replace(move, list=move.list + move.list[:32])
    yield "a sibling more", replace(move, siblings=(*move.siblings, bytes(32)))
    if move.siblings:
        yield "a sibling less", replace(move, siblings=move.siblings[:-1])


def of_proof(proof: Proof) -> Iterator[tuple[str, Proof]]:
    yield "pick beyond the list", replace(proof, pick=1 << 20)
    yield "the largest pick", replace(proof, pick=(1 << 64) - 1)
    for name in ("record", "claim"):
        held: bytes = getattr(proof, name)
        yield f"{name} cut off", with_bytes(proof, name, held[:-1])
        yield f"{name} too long", with_bytes(proof, name, held + b"\0")
    yield "a piece's hash more", replace(proof, siblings=(*proof.siblings, bytes(32)))
    yield "a root less", replace(proof, steps=proof.steps[:-1])
    yield "a root more", replace(proof, steps=(*proof.steps, bytes(32)))
    yield "another model", replace(proof, model=replace(proof.model, layers=3))
    for what, openings in of_openings(proof.openings):
        yield what, replace(proof, openings=openings)


def before_itself(right: bytes, field: int) -> bytes:
    """A call of `prove` whose proof keeps field `field` (a bytes or an array of words) in front of its own start, where
    offsets are negative.
    """
    words = [int.from_bytes(right[4 + 32 * i : 36 + 32 * i], "big") for i in range(len(right) // 32)]
    start = words[2] // 32  # prove(bytes32, bytes, Proof)
    at = start + words[start + field] // 32
    length = words[at] if field == STEPS_FIELD else -(-words[at] // 32)
    held = words[at : at + 1 + length]
    moved = [*words[:start], *held, *words[start:]]
    moved[2] += 32 * len(held)
    moved[start + len(held) + field] = (1 << 256) - 32 * len(held)
    return right[:4] + b"".join(word.to_bytes(32, "big") for word in moved)


def of_handoff(proof: HandoffProof) -> Iterator[tuple[str, HandoffProof]]:
    yield "index", replace(proof, index=proof.index ^ 1)
    yield "index beyond the tree", replace(proof, index=proof.leaves)
    yield "no leaves", replace(proof, leaves=0)
    yield "many leaves", replace(proof, leaves=(1 << 32) - 1)
    for name in ("record", "signature"):
        held: bytes = getattr(proof, name)
        yield f"{name} cut off", with_bytes(proof, name, held[:-1])
        yield f"no {name}", with_bytes(proof, name, b"")
        yield f"{name} too long", with_bytes(proof, name, held + bytes(LONGEST))
    yield "a sibling more", replace(proof, siblings=(*proof.siblings, bytes(32)))


def check(
    arena: Arena,
    index: int,
    right: bytes,
    wrong: Sequence[tuple[str, bytes]],
    seed: int = 0,
    longest: int | None = LONGEST,
) -> None:
    """All of `wrong` and every mangled form of `right` are refused; then `right` is taken.

    wrong: well-formed calls with something false inside, refused for a reason that has a name.
    """
    spent = []
    for what, data in wrong:
        name, gas = arena.attempt(index, data)
        assert name and name not in NAMELESS, f"{what}: expected a refusal with a name, got {name or 'a success'}"
        spent.append((what, gas - floor_gas(data)))
    for what, data in of_bytes(right, seed, longest):
        name, gas = arena.attempt(index, data)
        assert name, f"{what} to {len(data)} of {len(right)} bytes: expected a refusal, got a success"
        assert "long" not in what or name == "CalldataTooLong", f"{what}: {name}"
        spent.append((what, gas - floor_gas(data)))
    name, gas = arena.attempt(index, right)
    assert name == "", f"expected the right call to be taken, got {name}"
    most = max(CHECKING_GAS, gas - floor_gas(right) + CHECKING_GAS)
    dear = [each for each in spent if each[1] > most]
    assert not dear, f"expected at most {most} gas beyond the calldata, got {dear}"


def test_a_game_from_its_challenge_to_its_proof(court: Court) -> None:
    """One game meets every phase: somebody lies about the last chunk of a weighted sum, and the worker proves it."""
    arena, batch = court.arena, court.innocent
    segment = batch.segment(Kind.ATTEND, 1, 1, POSITION, 1)
    truth = batch.case(segment)
    lie = Lie(WSUM, len(truth.vector(WSUM)) - 70, truth.chunks(WSUM) - 1)
    liar = Liar(truth, [lie], wrong=True)
    steps, evidence = b"".join(liar.steps()), batch.evidence(segment)

    def challenge(at: Segment, salt: bytes, openings: Sequence[Opening], roots: bytes) -> bytes:
        return encode("challenge", at, salt, batch.model, openings, roots)

    salt = arena.commit(segment)
    wrong = [(what, challenge(segment, salt, openings, steps)) for what, openings in of_openings(evidence)]
    for what, at in of_segment(segment):
        wrong.append((what, challenge(at, arena.commit(at), evidence, steps)))
    wrong += [
        ("roots cut off", challenge(segment, salt, evidence, steps[:-1])),
        ("no roots", challenge(segment, salt, evidence, b"")),
        ("a root more", challenge(segment, salt, evidence, steps + steps[-32:])),
        ("many roots", challenge(segment, salt, evidence, steps * 100)),
        ("another salt", challenge(segment, bytes(31) + b"\xff", evidence, steps)),
    ]
    check(arena, CHALLENGER, challenge(segment, salt, evidence, steps), wrong)
    id = challenge_id(dev_account(CHALLENGER).address, segment, salt)

    phases = []
    while True:
        seen = arena.seen(id)
        phases.append(seen.game.phase)
        index = WORKERS[1] if seen.game.worker_turn else CHALLENGER
        posted = arena.door(index).posted(seen.last)
        answer = solve(seen.game, posted, truth if seen.game.worker_turn else liar, steps)
        if isinstance(answer, Proof):
            right = encode("prove", id, seen.game, answer)
            for field in (RECORD_FIELD, STEPS_FIELD):
                assert arena.attempt(index, before_itself(right, field))[0] == "ClaimMismatch"
            proofs = [(what, encode("prove", id, seen.game, proof)) for what, proof in of_proof(answer)]
            check(arena, index, right, proofs, seed=len(phases))
            break
        moves = [(what, encode("descend", id, seen.game, move)) for what, move in of_move(answer, seen.game.phase)]
        states = [
            ("state cut off", encode("descend", id, seen.game.encode()[:-1], answer)),
            ("another state", encode("descend", id, replace(seen.game, index=seen.game.index + 1), answer)),
            ("no game", encode("descend", bytes(32), seen.game, answer)),
        ]
        check(arena, index, encode("descend", id, seen.game, answer), [*moves, *states], seed=len(phases))
    assert set(phases) == {Phase.STEPS, Phase.NODES, Phase.ELEMENTS, Phase.SUMS}


def test_what_is_shown_deflected_and_flagged(court: Court) -> None:
    """A row at the boundary of two stages that is not what the layer's outputs add up to; its sender signed it."""
    arena, batch = court.arena, court.guilty
    segment = batch.segment(Kind.LINK, 1, 0, 9, 260)
    evidence, premises = batch.shown(segment), batch.premises(segment)
    wrong = [(what, encode("prepare", segment, batch.model, openings)) for what, openings in of_openings(premises)]
    wrong += [(what, encode("prepare", at, batch.model, premises)) for what, at in of_segment(segment)]
    check(arena, CHALLENGER, encode("prepare", segment, batch.model, premises), wrong)
    salt = arena.commit(segment)

    def show(at: Segment, salt: bytes, openings: Sequence[Opening]) -> bytes:
        return encode("show", at, salt, batch.model, openings)

    wrong = [(what, show(segment, salt, openings)) for what, openings in of_openings(evidence)]
    wrong += [(what, show(at, arena.commit(at), evidence)) for what, at in of_segment(segment)]
    check(arena, CHALLENGER, show(segment, salt, evidence), wrong)
    id = challenge_id(dev_account(CHALLENGER).address, segment, salt)
    game = arena.seen(id).game
    assert game.phase == Phase.HANDOFF

    early = encode("flag", id, game)
    for what, data in (("too early", early), ("another state", encode("flag", id, replace(game, index=7)))):
        name, gas = arena.attempt(CHALLENGER, data)
        assert name in ("FlagNotFallen", "WrongState"), what
        assert gas < floor_gas(data) + CHECKING_GAS

    block = batch.served.traces[LONG_AT][1].block_leaf("1.h", 9, 1)
    tree = HandoffTree([handoff_row(LONG_AT, 9, 0, bytes(512)), handoff_row(LONG_AT, 9, 1, block)])
    door = court.market.chain(CHALLENGER)
    signature = door.sign_handoff(batch.job, 0, tree.root, tree.leaves, court.market.signer(0))
    proof = HandoffProof(
        tree.root, tree.leaves, 1, handoff_row(LONG_AT, 9, 1, block), tree.opening(1).siblings, signature
    )
    proofs = [(what, encode("deflect", id, game, other)) for what, other in of_handoff(proof)]
    check(arena, WORKERS[1], encode("deflect", id, game, proof), proofs)


def of_demand(demand: Demand) -> Iterator[tuple[str, Demand]]:
    """Demands of what is not there. Any first leaf is lawful: what lies beyond the tree's end needs no answer."""
    for name, value in (
        ("job", bytes(32)),
        ("stage", 2),
        ("kind", 4),
        ("request", 2),
        ("tensor", 7),
        ("count", 0),
        ("count", 129),
        ("count", (1 << 32) - 1),
    ):
        changed: dict[str, Any] = {name: value}
        yield f"{name} {value!r}", replace(demand, **changed)


def test_a_demand_from_its_opening_to_its_answer(court: Court) -> None:
    counter, batch, stage = court.counter, court.innocent, 1
    demand = Demand(batch.job, stage, Wanted.LEAVES, LONG_AT, 0, 3, 2)
    pay = answer_gas(demand, grid_of(demand, batch.model, stage, stage + 1)) * GAS_RATE
    most = price(pay, 0)
    wrong = [(what, encode_demands("demand", other, batch.model, most)) for what, other in of_demand(demand)]
    wrong += [
        ("another model", encode_demands("demand", demand, replace(batch.model, layers=3), most)),
        ("too low a price", encode_demands("demand", demand, batch.model, most - 1)),
    ]
    right = encode_demands("demand", demand, batch.model, most)
    check(counter, CHALLENGER, right, wrong, longest=None)
    assert counter.attempt(CHALLENGER, right)[0] == "DemandExists"

    door = court.market.chain(CHALLENGER)
    opened = door.block_timestamp() - 1  # the refused repetition made a block of its own
    due = deadline(opened, CLOCK_SECONDS, GRACE_SECONDS, 0)
    held = Demanded(demand, door.account, opened, due, pay, most - pay)
    id = keccak256(encode_struct("Demand", demand))
    assert door.demands.state_of(id) == keccak256(encode_struct("Demanded", held))

    node, trace = batch.served.stage_trees[stage].opening(LONG_AT), batch.served.traces[LONG_AT][stage]
    openings = answer_trace(demand, node, trace, batch.model)
    states = [
        ("another state", replace(held, pay=held.pay + 1)),
        ("another demander", replace(held, demander=court.market.chain(STRANGER).account)),
        ("a later deadline", replace(held, deadline=held.deadline + 1)),
    ]
    wrong = [(what, encode_demands("answer", id, other, batch.model, openings)) for what, other in states]
    wrong += [(what, encode_demands("answer", id, held, batch.model, other)) for what, other in of_openings(openings)]
    wrong += [
        ("no demand", encode_demands("answer", bytes(32), held, batch.model, openings)),
        ("another model", encode_demands("answer", id, held, replace(batch.model, layers=3), openings)),
        ("nothing", encode_demands("answer", id, held, batch.model, ())),
    ]
    lapsed = [(f"lapse: {what}", encode_demands("lapse", id, other)) for what, other in states]
    lapsed.append(("lapse: too early", encode_demands("lapse", id, held)))
    right = encode_demands("answer", id, held, batch.model, openings)
    assert counter.attempt(STRANGER, right)[0] == "NotYourTurn"
    check(counter, WORKERS[stage], right, wrong + lapsed, longest=LONGEST_ANSWER)
    assert counter.attempt(WORKERS[stage], right)[0] == "WrongState"


def test_a_commitment_is_made_once(court: Court) -> None:
    right = encode("commit", keccak256(b"a commitment"))
    for end in (4, 5, len(right) - 1):
        name, gas = court.arena.attempt(CHALLENGER, right[:end])
        assert name and gas < floor_gas(right[:end]) + CHECKING_GAS
    assert court.arena.attempt(CHALLENGER, right)[0] == ""
    assert court.arena.attempt(CHALLENGER, right)[0] == "CommitmentExists"


def test_every_field_of_a_demand_was_tried() -> None:
    tried = {what.split()[0] for what, _ in of_demand(Demand(bytes(32), 0, Wanted.LEAVES, 0, 0, 0, 1))}
    assert tried | {"first"} == {field.name for field in fields(Demand)}


def test_every_field_of_a_segment_was_tried() -> None:
    tried = {what.removeprefix("no such ") for what, _ in of_segment(Segment(bytes(32), 0, 0, 0, 0, 0, 0))}
    assert tried | {"job"} == {field.name for field in fields(Segment)}
