"""What the games of `plumb bench games` are about: pieces that are right or wrong, who lies about them, and how."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from bench._arena import NOBODY, Answer, Arena, Manners, Player, Silence
from bench._liar import Bluffer, Liar, Lie, Solver, every_lie
from bench._market import (
    BROKEN,
    LONG,
    LONG_AT,
    LONG_OUTPUT,
    LONG_TOKENS,
    REQUESTS,
    SHORT,
    SHORT_TOKENS,
    STRANGER,
    Batch,
    Market,
    Served,
    serve,
)
from verifier.canonical import Case
from verifier.commit import HandoffTree, Output, Request
from verifier.game import Game, HandoffProof, Segment
from verifier.program import Kind
from verifier.referee.codec import BLOCK, Opening, handoff_row, handoff_token

CHALLENGED = (Kind.Q, Kind.K, Kind.V, Kind.ATTEND, Kind.MLP, Kind.TOKEN, Kind.SAMPLE)
SHOWN = (Kind.EMBED, Kind.LINK, Kind.STOP, Kind.BILL, Kind.LENGTH)
SHOWN_SHARE, SILENT_SHARE, NONSENSE_SHARE = 0.5, 0.2, 0.4
PLACES = 4  # of each kind: layers, positions, units
POSITIONS = (0, 1, 254, 255, 256, 511, 512, 597, 599)
FAULTS = 4  # batches with faults that are shown
ROUND = 40  # games between two returns of the chain to where it was: far less than a job's window
DRAWN = (
    replace(LONG, temperature=40_000, top_k=200, top_p=60_000, seed=(1 << 64) - 3),
    replace(LONG, temperature=1 << 16, top_k=1, seed=5),
    replace(LONG, temperature=90_000, top_p=50, seed=6),
    replace(LONG, temperature=20_000, seed=7),
)
GREEDY = -1
BILLS = {
    "first start": (Output(1, 2, 1, SHORT_TOKENS), replace(LONG_OUTPUT, start=3)),
    "gap": (Output(0, 2, 1, SHORT_TOKENS), replace(LONG_OUTPUT, start=5)),
}
FED, FED_TOKEN = 595, 42  # stage 0 embeds another token there than the last stage committed to


@dataclass(frozen=True)
class Played:
    """One game. convicted: the stage, or 255; lie_escaped: a guilty worker kept its lock."""

    kind: str
    liar: str
    convicted: int
    moves: int
    honest_lost: bool = False
    lie_escaped: bool = False
    depths: tuple[str, ...] = ()

    @property
    def wrong(self) -> bool:
        return self.honest_lost or self.lie_escaped


@dataclass(frozen=True)
class Ground:
    """What a batch is built from. served: name of the served tensors and outputs; drawn: an index of DRAWN."""

    tight: bool
    served: str = "right"
    drawn: int = GREEDY


@dataclass(frozen=True)
class Piece:
    """A challenged segment (its job is named when it is played) and the truth about it."""

    ground: Ground
    segment: Segment
    case: Case


@dataclass(frozen=True)
class Exhibit:
    """An exact segment that is wrong. handed: what its sender signed if it lied, and which record explains it."""

    ground: Ground
    segment: Segment
    sender: int | None = None
    handed: Callable[[bool], tuple[list[bytes], int]] | None = None


class Docket:
    """Draws games and has them played."""

    def __init__(self, market: Market, arena: Arena, seed: int) -> None:
        self._market, self._arena = market, arena
        self._served = {"right": serve(market.weights)}
        self.told = ""  # what the last game was about
        random = Random(f"{seed}/docket")
        self._pieces = {
            (kind, guilty): [self._piece(kind, guilty, place, random) for place in range(PLACES)]
            for kind in CHALLENGED
            for guilty in (True, False)
        }
        self._census = [
            (guilty, piece, lie)
            for (_, guilty), pieces in self._pieces.items()
            for piece in pieces
            for lie in every_lie(piece.case)
        ]
        random.shuffle(self._census)
        self._census_seen = set[int]()
        self._exhibits = {kind: self._faulty(kind, random) for kind in SHOWN}
        shown = [exhibit.ground for exhibits in self._exhibits.values() for exhibit in exhibits]
        challenged = [piece.ground for pieces in self._pieces.values() for piece in pieces]
        self._batches = {
            ground: market.batch(ground.tight, self._served[ground.served], _requests(ground.drawn))
            for ground in dict.fromkeys([*shown, *challenged])
        }
        self._played = 0
        arena.keep()

    def play(self, number: int, random: Random) -> Played:
        """One game, drawn from `random`. Raises Unfair."""
        self._played += 1
        if self._played % ROUND == 0:
            self._arena.put_back()
        manners = Manners.drawn(random)
        if number % 2 == 0:
            guilty, piece, lie = self._census[number // 2 % len(self._census)]
            self._census_seen.add(number // 2 % len(self._census))
            lies = [replace(lie, delta=lie.delta * random.choice((1, 1 << 40)))]
            return self._challenged(piece, lies, guilty, random, manners)
        if random.random() < SHOWN_SHARE:
            return self._exact(random, manners)
        guilty = random.random() < 0.5
        piece = random.choice(self._pieces[random.choice(CHALLENGED), guilty])
        lies = []
        if random.random() >= NONSENSE_SHARE:
            lies = random.sample(list(every_lie(piece.case)), random.randint(2, 5))
        return self._challenged(piece, lies, guilty, random, manners)

    @property
    def census(self) -> dict[str, int]:
        """How many lies there are alone, and how many of them were told."""
        return {"lies": len(self._census), "told": len(self._census_seen)}

    # ---- challenged segments

    def _challenged(self, piece: Piece, lies: list[Lie], guilty: bool, random: Random, manners: Manners) -> Played:
        """guilty: the worker lies, else the challenger does. No lies: nothing but nonsense, or the bare verdict."""
        liar_case = Liar(piece.case, lies, wrong=not guilty, follows=random.random() < 0.1)
        bluffs = random.random() < 0.5
        liar: Player = Bluffer(liar_case, random.getrandbits(32), always=not lies) if bluffs else Solver(liar_case)
        honest: Player = Solver(piece.case)
        silence = None
        if random.random() < SILENT_SHARE:
            silence = Silence(worker=random.random() < 0.5, from_move=random.choice((1, 2, 2, 3, 4, 5)))
        kind = Kind(piece.segment.kind).name
        self.told = f"{kind} {piece.segment}, {'worker' if guilty else 'challenger'} lies {lies}, {manners}, {silence}"

        batch = self._batches[piece.ground]
        segment = replace(piece.segment, job=batch.job)
        steps = b"".join((piece.case if guilty else liar_case).steps())
        evidence = batch.evidence(segment)
        if manners.strange:
            self._refuse_variants(random, segment, batch, evidence, steps)
        id = self._arena.challenge(segment, batch.model, evidence, steps, manners)
        if guilty:
            end = self._arena.play(id, honest, liar, (True, False), manners, silence)
        else:
            end = self._arena.play(id, liar, honest, (False, True), manners, silence)
        names = tuple(lie.depth.name for lie in lies)
        if end.silenced and silence is not None and silence.worker != guilty:
            # Who was right fell silent, and that is what loses.
            wrong = (end.convicted == segment.stage) != silence.worker
            return Played(
                kind, f"silent {'worker' if silence.worker else 'challenger'}", end.convicted, end.moves, wrong
            )
        if guilty:
            escaped = end.convicted != segment.stage
            return Played(kind, "worker", end.convicted, end.moves, escaped, escaped, names)
        return Played(kind, "challenger", end.convicted, end.moves, end.convicted != NOBODY, False, names)

    def _refuse_variants(
        self, random: Random, segment: Segment, batch: Batch, evidence: list[Opening], steps: bytes
    ) -> None:
        """A challenge that is off in one thing opens no game."""
        variants: list[tuple[list[Opening], bytes]] = [(tampered(random, evidence), steps), (evidence, steps[:-32])]
        variants.append((evidence, steps[:-32] + random.randbytes(32)))
        for openings, roots in variants:
            self._arena.refused_by_name(self._arena.challenge, segment, batch.model, openings, roots)

    def _piece(self, kind: Kind, guilty: bool, place: int, random: Random) -> Piece:
        shape = self._market.weights.shape
        layer = 1 if kind in (Kind.TOKEN, Kind.SAMPLE) else random.randrange(2)
        ground = Ground(guilty, drawn=place % len(DRAWN) if kind == Kind.SAMPLE else GREEDY)
        if kind in (Kind.TOKEN, Kind.SAMPLE):
            output = random.randrange(len(LONG_TOKENS))
            position, token = len(LONG.prompt) - 1 + output, LONG_TOKENS[output]
            units = random.sample(range(shape.vocabulary), shape.vocabulary)
            units.insert(place % 2, token if kind == Kind.SAMPLE else units[0])  # its own membership, sometimes first
        else:
            position, token = random.choice(POSITIONS), 0
            counts = {Kind.Q: shape.heads, Kind.ATTEND: shape.blocks, Kind.MLP: shape.blocks}
            units = [place % counts.get(kind, shape.kv_heads)]
        batch = self._unplaced(ground)
        for unit in units:
            segment = batch.segment(kind, layer, layer, position, unit)
            case = batch.case(segment, token)
            if case.verdict() == guilty:
                return Piece(ground, segment, case)
        raise ValueError(f"expected a {kind.name} that is {'wrong' if guilty else 'right'}, found none at {position}")

    # ---- exact segments

    def _exact(self, random: Random, manners: Manners) -> Played:
        kind = random.choice(SHOWN)
        if random.random() < 0.4:
            return self._false_show(kind, random, manners)
        exhibit = random.choice(self._exhibits[kind])
        batch = self._batches[exhibit.ground]
        segment = replace(exhibit.segment, job=batch.job)
        by_sender = exhibit.handed is not None and random.random() < 0.5
        silent = by_sender and random.random() < 0.2
        liar = "silent worker" if silent else "sender" if by_sender else "worker"
        self.told = f"{kind.name} {segment}, {liar} lies, {manners}"
        self._arena.prepare(segment, batch.model, batch.premises(segment))
        id = self._arena.show(segment, batch.model, batch.shown(segment), manners)
        accused = _Deflector(self._proofs(exhibit, batch, by_sender, random))
        silence = Silence(worker=True, from_move=1) if silent else None
        end = self._arena.play(id, _Deflector([]), accused, (True, by_sender), manners, silence)
        if liar == "sender":
            convicted_other = end.convicted == exhibit.sender
            return Played(kind.name, liar, end.convicted, end.moves, not convicted_other, not convicted_other)
        escaped = end.convicted != segment.stage
        return Played(kind.name, liar, end.convicted, end.moves, escaped and not silent, escaped)

    def _false_show(self, kind: Kind, random: Random, manners: Manners) -> Played:
        """A right segment is shown, as it is and tampered with."""
        batch = self._batches[Ground(True)]
        request = random.randrange(2) if kind != Kind.LENGTH else 0
        last = (len(SHORT.prompt), len(LONG.prompt))[request] + (len(SHORT_TOKENS), len(LONG_TOKENS))[request] - 1
        position, layer, stage = random.randrange(last), random.randrange(2), 1
        unit = random.randrange(2)
        if kind == Kind.EMBED:
            layer, stage = 0, 0
        elif kind == Kind.STOP:
            unit = random.randrange(len(batch.served.ids[request]))
        elif kind == Kind.LENGTH:
            position = batch.served.traces[request][0].positions
        if kind in (Kind.STOP, Kind.BILL, Kind.LENGTH):
            layer = 0
        if kind in (Kind.STOP, Kind.BILL):
            position = 0
        if kind in (Kind.BILL, Kind.LENGTH):
            unit = 0
        elif kind == Kind.LINK:
            unit = random.randrange(self._market.weights.shape.hidden)
        segment = batch.segment(kind, stage, layer, position, unit, request)
        self.told = f"{kind.name} {segment}, challenger lies, {manners}"
        evidence, premises = batch.shown(segment), batch.premises(segment)
        if premises:
            self._arena.refused_by_name(self._arena.prepare, segment, batch.model, tampered(random, premises))
        self._arena.prepare(segment, batch.model, premises)
        self._arena.refused("NotWrong", self._arena.show, segment, batch.model, evidence, manners)
        for _ in range(2):
            self._arena.refused_by_name(self._arena.show, segment, batch.model, tampered(random, evidence))
        return Played(kind.name, "challenger", NOBODY, 0)

    def _faulty(self, kind: Kind, random: Random) -> list[Exhibit]:
        """Wrong exact segments of a kind."""
        if kind in (Kind.STOP, Kind.BILL):
            return [self._misbilled(kind, name) for name in (BROKEN if kind == Kind.STOP else (*BILLS, "total"))]
        if kind == Kind.EMBED:
            found = [self._fault(kind, place, random) for place in range(FAULTS)]
            self._served["fed"] = serve(self._market.weights, fed={FED: FED_TOKEN})
            return [*found, Exhibit(Ground(True, "fed"), _segment(kind, 0, 0, FED, 0), 1, _fed)]
        return [self._fault(kind, place, random) for place in range(FAULTS)]

    def _fault(self, kind: Kind, place: int, random: Random) -> Exhibit:
        """One flipped bit (EMBED, LINK) or some positions too many (LENGTH)."""
        name, weights = f"{kind.name} {place}", self._market.weights
        ground = Ground(True, name)
        if kind == Kind.LENGTH:
            self._served[name] = serve(weights, extra_positions=(0, place + 1))
            sent = self._served[name].traces[0][0].positions
            return Exhibit(ground, _segment(kind, 1, 0, sent, 0, 0), 0, lambda lied: _lengths(sent, lied))
        request = place % 2
        last = len(SHORT.prompt) if request == 0 else len(LONG.prompt)
        position, column = random.randrange(last), random.choice((0, 255, 256, weights.shape.hidden - 1))
        unit = column // BLOCK
        if kind == Kind.EMBED:
            self._served[name] = serve(weights, changes={(request, "0.h"): (position, column)})
            return Exhibit(ground, _segment(kind, 0, 0, position, unit, request))
        if place < FAULTS // 2:
            self._served[name] = serve(weights, changes={(request, "out"): (position, column)})
            return Exhibit(ground, _segment(kind, 1, 1, position, column, request))
        self._served[name] = serve(weights, changes={(request, "1.h"): (position, column)})
        segment, held = _segment(kind, 1, 0, position, column, request), self._served[name].traces[request][1]
        true = self._served["right"].traces[request][1]

        def rows(lied: bool) -> tuple[list[bytes], int]:
            block = (held if lied else true).block_leaf("1.h", position, unit)
            return [handoff_row(request, position, unit, block)], 0

        return Exhibit(ground, segment, 0, rows)

    def _misbilled(self, kind: Kind, name: str) -> Exhibit:
        right, served_name = self._served["right"], f"{kind.name} {name}"
        if name == "total":
            self._served[served_name] = replace(right, tokens=right.tokens + 1)
            return Exhibit(Ground(True, served_name), _segment(kind, 1, 0, 0, 0, LONG_AT))
        outputs = (BROKEN[name][0], LONG_OUTPUT) if kind == Kind.STOP else BILLS[name]
        self._served[served_name] = Served(
            right.traces,
            tuple(output.record(r) for r, output in enumerate(outputs)),
            outputs[-1].start + outputs[-1].count,
            tuple(output.tokens for output in outputs),
        )
        unit = BROKEN[name][1] if kind == Kind.STOP else 0
        return Exhibit(Ground(True, served_name), _segment(kind, 1, 0, 0, unit, 0))

    def _proofs(self, exhibit: Exhibit, batch: Batch, by_sender: bool, random: Random) -> list[HandoffProof]:
        """What the accused shows: the hand-off that explains all, or what comes nearest to one."""
        if exhibit.handed is None or exhibit.sender is None:
            return [HandoffProof(random.randbytes(32), 1, 0, random.randbytes(44), (), random.randbytes(65))]
        if by_sender:
            return [self._signed(batch, exhibit.sender, *exhibit.handed(True))]
        true = self._signed(batch, exhibit.sender, *exhibit.handed(False))
        forged = self._signed(batch, 1 - exhibit.sender, *exhibit.handed(True))
        return [true, forged, replace(true, root=random.randbytes(32))]

    def _signed(self, batch: Batch, stage: int, records: list[bytes], index: int) -> HandoffProof:
        tree = HandoffTree(records)
        key = self._market.signer(stage)
        signature = self._market.chain(STRANGER).sign_handoff(batch.job, stage, tree.root, tree.leaves, key)
        return HandoffProof(tree.root, tree.leaves, index, records[index], tree.opening(index).siblings, signature)

    def _unplaced(self, ground: Ground) -> Batch:
        """The same without a job."""
        served = self._served[ground.served]
        return self._market.unplaced(ground.tight, served, _requests(ground.drawn))


class _Deflector:
    """An accused that shows hand-offs, one after the other."""

    def __init__(self, proofs: list[HandoffProof]) -> None:
        self._proofs = proofs

    def answer(self, game: Game, posted: bytes, steps: bytes) -> Answer | None:
        return self._proofs.pop(0) if self._proofs else None


def tampered(random: Random, evidence: list[Opening]) -> list[Opening]:
    """The same with one thing changed: an opening more or less, a byte, a sibling."""
    changed, place = list(evidence), random.randrange(len(evidence))
    opening = changed[place]
    match random.randrange(5):
        case 0:
            del changed[place]
        case 1:
            changed.insert(place, opening)
        case 2:
            at = random.randrange(len(opening.data))
            byte = bytes([opening.data[at] ^ 1 << random.randrange(8)])
            changed[place] = replace(opening, data=opening.data[:at] + byte + opening.data[at + 1 :])
        case 3:
            changed[place] = replace(opening, siblings=(*opening.siblings, random.randbytes(32)))
        case _:
            changed[place] = replace(opening, data=opening.data[:-1])
    return changed


def _requests(drawn: int) -> tuple[Request, ...]:
    if drawn == GREEDY:
        return REQUESTS
    return (SHORT, DRAWN[drawn])


def _segment(kind: Kind, stage: int, layer: int, position: int, unit: int, request: int = LONG_AT) -> Segment:
    return Segment(bytes(32), stage, kind, request, layer, position, unit)


def _fed(lied: bool) -> tuple[list[bytes], int]:
    """The tokens that the last stage signed: what stage 0 was fed, or what was committed."""
    place = FED - len(LONG.prompt)
    tokens = [FED_TOKEN if lied and i == place else token for i, token in enumerate(LONG_TOKENS)]
    return [handoff_token(LONG_AT, i, token) for i, token in enumerate(tokens)], place


def _lengths(sent: int, lied: bool) -> tuple[list[bytes], int]:
    """A row beyond the sender's positions, or its last one."""
    return [handoff_row(0, sent if lied else sent - 1, 0, bytes(2 * BLOCK))], 0
