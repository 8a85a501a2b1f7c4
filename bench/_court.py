"""A chain with jobs on it, and whole games played there by two parties that each believe their own case."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from types import TracebackType
from typing import Any

from eth_account.signers.local import LocalAccount

from contracts.client import Acceptance, Addresses, Chain, ChainError, Claim, Job, Receipt, Stage, Worker, challenge_id
from contracts.events import GameEnded, GameMoved
from deploy.deployment import deploy
from deploy.devnet import Devnet
from deploy.keys import dev_account
from verifier.canonical import Case
from verifier.commit import Output, OutputsTree, Request, RequestsTree, StageTree, TraceNode
from verifier.game import Game, Move, NothingWrong, Proof, Segment, solve
from verifier.program import Kind
from verifier.referee.codec import Model, Opening
from verifier.sources import ModelWeights
from verifier.trace import RequestTrace

CLOCK_SECONDS, GRACE_SECONDS, GAS_RATE = 1000, 100, 10**9
REQUESTS, JUDGED = 64, 41  # a batch, and the request that is judged
REQUESTER, CHALLENGER, STRANGER, FIRST_WORKER = 3, 4, 5, 6
FUNDS = 10**30
LEAST_LOCK = 10**17  # what the jobs of small models lock; a long history of a large one must be covered by more
FLAG = 2
NOBODY = 255
GREEDILY: Mapping[str, Any] = {}
ENDINGS = {True: "slashed", False: "bond_lost"}


@dataclass(frozen=True)
class Played:
    """One game. sent: the transactions from the commitment on, and whether each was the worker's."""

    outcome: str
    sent: tuple[tuple[Receipt, bool], ...]
    solve_seconds: float


def in_window(
    requester: Chain,
    keys: Sequence[LocalAccount],
    roots: Sequence[bytes],
    outputs: bytes,
    tokens: int,
    *,
    model: bytes,
    **terms: Any,
) -> bytes:
    """Opens a job with a month's window, accepts and commits it with every stage's key. Returns its id.

    keys, roots: signer and trace root of each stage; outputs, tokens: what the last one claims; terms: of the Job.
    """
    now = requester.block_timestamp()
    prices: dict[str, Any] = {"prompt_price": 1000, "token_price": 2000, "lock": 0, "gas_rate": GAS_RATE}
    times: dict[str, Any] = {"accept_by": now + 1000, "commit_by": now + 2000, "window": 30 * 86400}
    order = Job(model=model, **prices, **times, **terms)
    job = requester.escrow.open(replace(order, lock=max(LEAST_LOCK, requester.escrow.least_lock(order))))
    signed = [requester.sign_accept(job, s, model, key) for s, key in enumerate(keys)]
    requester.escrow.accept(job, [Acceptance(s, signature) for s, signature in enumerate(signed)])
    claims = []
    for s, (key, root) in enumerate(zip(keys, roots, strict=True)):
        told = (outputs, tokens) if s + 1 == len(keys) else (bytes(32), 0)
        signature = requester.sign_commit(job, order.pipeline, s, model, root, *told, key=key)
        claims.append(Claim(s, root, *told, signature))
    requester.escrow.commit(job, claims)
    return job


class Court:
    """`with Court(stages) as court`: contracts deployed, workers staked, everybody funded."""

    def __init__(self, layers: int, stages: int) -> None:
        self._layers, self._stages = layers, stages
        self._devnet = Devnet()
        self._chains: dict[int, Chain] = {}
        self._pipelines: dict[bytes, bytes] = {}
        self._nonce = 0

    def __enter__(self) -> "Court":
        self._devnet.start()
        self._addresses: Addresses = deploy(self._devnet.url, dev_account(0), withdrawal_seconds=60)
        for stage in range(self._stages):
            chain = self.worker(stage)
            chain.token.mint(chain.account, FUNDS)
            chain.token.approve(self._addresses.workers, FUNDS)
            chain.workers.register(Worker(chain.account, bytes([stage + 1]) * 32, f"http://127.0.0.1:{stage + 1}"))
            chain.workers.stake(FUNDS)
        for index, spender in ((REQUESTER, self._addresses.escrow), (CHALLENGER, self._addresses.disputes)):
            chain = self.chain(index)
            chain.token.mint(chain.account, FUNDS)
            chain.token.approve(spender, (1 << 256) - 1)
        challenger = self.chain(CHALLENGER)
        challenger.disputes.deposit(FUNDS // 2)  # as a watchtower would: bonds come from it
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._devnet.stop()

    def chain(self, index: int) -> Chain:
        if index not in self._chains:
            self._chains[index] = Chain(self._devnet.url, self._addresses, dev_account(index), patience_seconds=30)
        return self._chains[index]

    def worker(self, stage: int) -> Chain:
        return self.chain(FIRST_WORKER + stage)

    def job(self, model: Model, batch: "Batch") -> bytes:
        """A fresh job in its window."""
        requester = self.chain(REQUESTER)
        model_id = requester.models.register(model)
        if model_id not in self._pipelines:
            a_stage = self._layers // self._stages
            stages = [
                Stage(self.worker(s).account, s * a_stage, (s + 1) * a_stage, 10_000 // self._stages)
                for s in range(self._stages)
            ]
            name = requester.workers.pipeline_id(model_id, stages, 0)
            joins = [requester.sign_join(name, self.worker(s).key) for s in range(self._stages)]
            self._pipelines[model_id] = requester.workers.create_pipeline(model_id, stages, 0, joins)
        self._nonce += 1
        return in_window(
            requester,
            [dev_account(FIRST_WORKER + s) for s in range(self._stages)],
            [batch.tree.root] * self._stages,
            batch.outputs.root,
            REQUESTS,
            model=model_id,
            pipeline=self._pipelines[model_id],
            requests_root=batch.requests.root,
            requests=REQUESTS,
            prompt_tokens=batch.prompt_tokens,
            max_tokens=REQUESTS,
            clock=CLOCK_SECONDS,
            grace=GRACE_SECONDS,
            nonce=self._nonce,
        )

    def play(
        self, segment: Segment, model: Model, evidence: Sequence[Opening], worker: Case, challenger: Case
    ) -> Played:
        """To the end: who has nothing true to say, or a proof that is refused, runs out of time.

        The requester's credit is emptied first. Challenger and worker keep theirs, as whoever plays often does.
        """
        self._empty_requester()
        plaintiff, defendant = self.chain(CHALLENGER), self.worker(segment.stage)
        marks = {chain: len(chain.receipts) for chain in (plaintiff, defendant, self.chain(STRANGER))}
        steps = b"".join(challenger.steps())
        salt = segment.job
        plaintiff.disputes.commit(challenge_id(plaintiff.account, segment, salt))
        self._devnet.mine()  # a node estimates gas as of its latest block, and the opening needs a later one
        game_id = plaintiff.disputes.challenge(segment, salt, model, evidence, steps)
        seconds = 0.0
        while True:
            game, posted = self._state(game_id)
            mover, other = (defendant, plaintiff) if game.worker_turn else (plaintiff, defendant)
            started = perf_counter()
            answer: Move | Proof | None
            try:
                answer = solve(game, posted, worker if game.worker_turn else challenger, steps)
            except NothingWrong:
                answer = None
            seconds = max(seconds, perf_counter() - started)
            if isinstance(answer, Move):
                mover.disputes.descend(game_id, game, answer)
                continue
            if answer is None or not self._proved(mover, game_id, game, answer):
                self._devnet.pass_seconds(CLOCK_SECONDS + 1)
                other.disputes.flag(game_id, game)
            break
        end = self._end(game_id)
        outcome = ENDINGS[end.convicted != NOBODY]
        if end.reason == FLAG and end.convicted != NOBODY:
            outcome = "flagged"
        sent = [(r, chain is defendant) for chain, mark in marks.items() for r in chain.receipts[mark:]]
        return Played(outcome, tuple(sorted(sent, key=lambda pair: pair[0].block)), seconds)

    def show(self, segment: Segment, model: Model, evidence: Sequence[Opening], premises: Sequence[Opening]) -> Played:
        """A LINK that nobody else can be to blame for: it ends with what is shown."""
        plaintiff, salt = self.chain(CHALLENGER), segment.job
        mark = len(plaintiff.receipts)
        plaintiff.disputes.commit(challenge_id(plaintiff.account, segment, salt))
        self._devnet.mine()  # a node estimates gas as of its latest block, and what is shown needs a later one
        plaintiff.disputes.prepare(segment, model, premises)
        game_id = plaintiff.disputes.show(segment, salt, model, evidence)
        outcome = ENDINGS[self._end(game_id).convicted != NOBODY]
        return Played(outcome, tuple((receipt, False) for receipt in plaintiff.receipts[mark:]), 0.0)

    def _proved(self, mover: Chain, game_id: bytes, game: Game, answer: Proof) -> bool:
        try:
            mover.disputes.prove(game_id, game, answer)
        except ChainError as error:
            if error.name != "NotWrong":
                raise
            return False
        return True

    def _empty_requester(self) -> None:
        requester = self.chain(REQUESTER)
        if requester.escrow.credit(requester.account):
            requester.escrow.withdraw()

    def _state(self, game_id: bytes) -> tuple[Game, bytes]:
        chain = self.chain(STRANGER)
        events = chain.events(max(0, chain.block_number() - 5))
        last = [event for event in events if isinstance(event, GameMoved) and event.id == game_id][-1]
        return last.game, chain.disputes.posted(last)

    def _end(self, game_id: bytes) -> GameEnded:
        chain = self.chain(STRANGER)
        events = chain.events(max(0, chain.block_number() - 5))
        (found,) = [event for event in events if isinstance(event, GameEnded) and event.id == game_id]
        return found


def program_leaf(weights: ModelWeights, kind: Kind) -> Opening:
    """The header of a segment kind."""
    program = weights.program
    return Opening(program.headers[kind].encode(), tuple(program.tree.prove(kind)))


class Batch:
    """What the pipeline committed to: 64 requests, of which one is real."""

    def __init__(self, trace: RequestTrace, token: int, drawn: Mapping[str, Any] = GREEDILY) -> None:
        """token: the first output token, which the last position yields; drawn: how the judged request samples."""
        prompts: list[tuple[int, ...]] = [(1,)] * REQUESTS
        prompts[JUDGED] = (1,) * trace.positions
        requests = [Request(prompt=prompt, limit=1) for prompt in prompts]
        requests[JUDGED] = self.request = Request(prompts[JUDGED], 1, **drawn)
        outputs = [Output(r, 1, 2, (token if r == JUDGED else 1,)) for r in range(REQUESTS)]
        nodes = [TraceNode(1, bytes([r]) * 32) for r in range(REQUESTS)]
        nodes[JUDGED] = TraceNode(trace.positions, trace.tensors_root)
        self.requests, self.outputs, self.tree = RequestsTree(requests), OutputsTree(outputs), StageTree(nodes)
        self.prompt_tokens = sum(map(len, prompts))

    def evidence(self, weights: ModelWeights, kind: Kind) -> list[Opening]:
        """What `challenge` wants for a segment of the judged request; TOKEN's and SAMPLE's at its last position."""
        first = [self.tree.opening(JUDGED), program_leaf(weights, kind)]
        if kind not in (Kind.TOKEN, Kind.SAMPLE):
            return first
        records = (self.requests.record_opening(JUDGED), self.outputs.record_opening(JUDGED))
        return [*first, *records, self.outputs.token_opening(JUDGED, 0)]
