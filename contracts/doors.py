"""One class a contract, one typed method a function, named as in Solidity. What each does is promised in
contracts/src/interfaces.

Every method that sends waits for its block, and raises ChainError if the contract refuses (contracts/transport.py).
"""

from collections.abc import Sequence
from typing import Any

from web3.types import TxReceipt

from contracts.abi import functions
from contracts.events import GameMoved
from contracts.records import Acceptance, Brief, Claim, Consent, Job, Stage, Status, Worker
from contracts.signing import challenge_id, demand_id, job_id, model_id, pipeline_id
from contracts.transport import Transport
from verifier.demand import Demand, Demanded
from verifier.game import Game, HandoffProof, Move, Proof, Segment
from verifier.referee.codec import Cell, Instruction, Model, Opening


class Door:
    """One contract at one address."""

    contract = ""

    def __init__(self, transport: Transport, address: str) -> None:
        self.address = address
        self._transport = transport
        self._functions = functions(self.contract)

    def _read(self, name: str, *arguments: Any, hints: Sequence[Any] = (Any,), block: int | None = None) -> Any:
        return self._transport.call(self.address, self._functions[name], arguments, hints, block)

    def _send(self, name: str, *arguments: Any) -> TxReceipt:
        return self._transport.send(self.address, self._functions[name], arguments)

    def neighbour(self, name: str) -> str:
        """The address of another contract of its deployment, as this one knows it. Raises ChainError."""
        return str(self._read(name))

    @property
    def _sender(self) -> str:
        if self._transport.key is None:
            raise PermissionError(f"{self.contract}: this Chain was opened without a key")
        return self._transport.key.address


class TokenDoor(Door):
    """The ERC-20. Amounts in base units."""

    contract = "Token"

    def balance(self, account: str) -> int:
        return int(self._read("balanceOf", account))

    def allowance(self, owner: str, spender: str) -> int:
        return int(self._read("allowance", owner, spender))

    def decimals(self) -> int:
        return int(self._read("decimals"))

    def approve(self, spender: str, amount: int) -> TxReceipt:
        return self._send("approve", spender, amount)

    def transfer(self, to: str, amount: int) -> TxReceipt:
        return self._send("transfer", to, amount)

    def mint(self, to: str, amount: int) -> TxReceipt:
        """The development token's alone."""
        return self._send("mint", to, amount)


class ModelsDoor(Door):
    contract = "Models"

    def register(self, model: Model) -> bytes:
        """The model's id."""
        self._send("register", model)
        return model_id(model)

    def layers(self, model: bytes) -> int:
        return int(self._read("layers", model))


class WorkersDoor(Door):
    contract = "Workers"

    def register(self, worker: Worker) -> TxReceipt:
        return self._send("register", worker)

    def stake(self, amount: int) -> TxReceipt:
        return self._send("stake", amount)

    def request_withdrawal(self, amount: int) -> TxReceipt:
        return self._send("requestWithdrawal", amount)

    def withdraw(self) -> TxReceipt:
        return self._send("withdraw")

    def create_pipeline(self, model: bytes, stages: Sequence[Stage], nonce: int, signatures: Sequence[bytes]) -> bytes:
        """The pipeline's id."""
        self._send("createPipeline", model, stages, nonce, signatures)
        return pipeline_id(self._transport.chain_id, self.address, model, tuple(stages), nonce)

    def worker(self, account: str) -> Worker:
        found: Worker = self._read("worker", account, hints=(Worker,))
        return found

    def signer_of(self, account: str) -> str:
        return str(self._read("signerOf", account))

    def free_stake(self, account: str) -> int:
        return int(self._read("freeStake", account))

    def locked_stake(self, account: str) -> int:
        return int(self._read("lockedStake", account))

    def withdrawal_of(self, account: str) -> tuple[int, int]:
        """(stake that was requested back, unix seconds from which it may be withdrawn); zeros if nothing was."""
        amount, available_at = self._read("withdrawalOf", account, hints=(int, int))
        return int(amount), int(available_at)

    def pipeline_model(self, pipeline: bytes) -> bytes:
        return bytes(self._read("pipelineModel", pipeline))

    def pipeline_stages(self, pipeline: bytes) -> tuple[Stage, ...]:
        found: tuple[Stage, ...] = self._read("pipelineStages", pipeline, hints=(list[Stage],))
        return found

    def pipeline_stage(self, pipeline: bytes, index: int) -> Stage:
        found: Stage = self._read("pipelineStage", pipeline, index, hints=(Stage,))
        return found

    def pipeline_id(self, model: bytes, stages: Sequence[Stage], nonce: int) -> bytes:
        """What create_pipeline will call it; every stage signs this beforehand (Chain.sign_join)."""
        return pipeline_id(self._transport.chain_id, self.address, model, tuple(stages), nonce)


class EscrowDoor(Door):
    contract = "Escrow"

    def open(self, job: Job) -> bytes:
        """The job's id. Escrow must be approved for promptPrice * promptTokens + tokenPrice * maxTokens."""
        self._send("open", job)
        return self.job_id(self._sender, job)

    def accept(self, job: bytes, acceptances: Sequence[Acceptance]) -> TxReceipt:
        return self._send("accept", job, acceptances)

    def move(self, job: bytes, pipeline: bytes, consents: Sequence[Consent]) -> TxReceipt:
        """consents: of the stages of the job's pipeline, in their order, then of those who are new."""
        return self._send("move", job, pipeline, consents)

    def commit(self, job: bytes, claims: Sequence[Claim]) -> TxReceipt:
        return self._send("commit", job, claims)

    def settle(self, job: bytes) -> TxReceipt:
        return self._send("settle", job)

    def expire(self, job: bytes) -> TxReceipt:
        return self._send("expire", job)

    def refund(self, job: bytes) -> TxReceipt:
        """Credits the price of a void job to its requester, unless that was done."""
        return self._send("refund", job)

    def release(self, job: bytes) -> TxReceipt:
        return self._send("release", job)

    def withdraw(self) -> TxReceipt:
        return self._send("withdraw")

    def job(self, job: bytes) -> Job:
        found: Job = self._read("job", job, hints=(Job,))
        return found

    def brief(self, job: bytes, stage: int) -> Brief:
        """What a game needs to know of the job."""
        found: Brief = self._read("brief", job, stage, hints=(Brief,))
        return found

    def requester(self, job: bytes) -> str:
        return str(self._read("requester", job))

    def status(self, job: bytes) -> Status:
        return Status(self._read("status", job))

    def root(self, job: bytes, stage: int) -> bytes:
        """32 zero bytes until the stage has committed."""
        return bytes(self._read("root", job, stage))

    def outputs(self, job: bytes) -> tuple[bytes, int]:
        """(outputs root, output tokens)."""
        root, tokens = self._read("outputs", job, hints=(Any, Any))
        return bytes(root), int(tokens)

    def window_end(self, job: bytes) -> int:
        """Unix seconds; 0 until all stages have committed."""
        return int(self._read("windowEnd", job))

    def open_games(self, job: bytes, stage: int) -> int:
        """Games that raise the next one's bond: those against the stage, and against others eight or more away."""
        return int(self._read("openGames", job, stage))

    def refunded(self, job: bytes) -> bool:
        """Whether the price of a void job was credited to its requester."""
        return bool(self._read("refunded", job))

    def convicted(self, job: bytes, stage: int) -> bool:
        return bool(self._read("convicted", job, stage))

    def credit(self, account: str) -> int:
        return int(self._read("credit", account))

    def least_lock(self, job: Job) -> int:
        """The least stake that each stage must lock; job.lock itself is not read."""
        return int(self._read("leastLock", job))

    def job_id(self, requester: str, job: Job) -> bytes:
        return job_id(self._transport.chain_id, self.address, requester, job)


class DisputesDoor(Door):
    contract = "Disputes"

    def commit(self, game: bytes) -> TxReceipt:
        """`game` = challenge_id(sender, segment, salt)."""
        return self._send("commit", game)

    def challenge(
        self, segment: Segment, salt: bytes, model: Model, evidence: Sequence[Opening], steps: bytes
    ) -> bytes:
        """The game's id. Disputes must be approved for the bond."""
        self._send("challenge", segment, salt, model, evidence, steps)
        return challenge_id(self._sender, segment, salt)

    def prepare(self, segment: Segment, model: Model, premises: Sequence[Opening]) -> TxReceipt:
        """LINK: what `show` goes on from. Anyone may, once is enough."""
        return self._send("prepare", segment, model, premises)

    def show(self, segment: Segment, salt: bytes, model: Model, evidence: Sequence[Opening]) -> bytes:
        """The game's id. Disputes must be approved for the bond."""
        self._send("show", segment, salt, model, evidence)
        return challenge_id(self._sender, segment, salt)

    def descend(self, game_id: bytes, game: Game, move: Move) -> TxReceipt:
        return self._send("descend", game_id, game, move)

    def prove(self, game_id: bytes, game: Game, proof: Proof) -> TxReceipt:
        return self._send("prove", game_id, game, proof)

    def deflect(self, game_id: bytes, game: Game, proof: HandoffProof) -> TxReceipt:
        return self._send("deflect", game_id, game, proof)

    def flag(self, game_id: bytes, game: Game) -> TxReceipt:
        return self._send("flag", game_id, game)

    def posted(self, moved: GameMoved) -> bytes:
        """The list that a move posted. SAFETY: a node may lie about calldata; verifier.game.is_posted knows better."""
        if moved.place == 0:
            return moved.list
        data = self._transport.calldata(moved.transaction)
        return data[moved.place : moved.place + int.from_bytes(data[moved.place - 32 : moved.place], "big")]

    def deposit(self, amount: int) -> TxReceipt:
        """Adds to the credit from which bonds are taken first. Disputes must be approved for it."""
        return self._send("deposit", amount)

    def withdraw(self) -> TxReceipt:
        """Collects bonds that came back."""
        return self._send("withdraw")

    def credit(self, account: str) -> int:
        return int(self._read("credit", account))

    def state_of(self, game_id: bytes) -> bytes:
        """keccak256 of the open game's state (signing.game_hash); zeros if there is none."""
        return bytes(self._read("stateOf", game_id))

    def commitment_of(self, game_id: bytes) -> int:
        return int(self._read("commitmentOf", game_id))

    def bond_for(self, job: bytes, stage: int) -> int:
        return int(self._read("bondFor", job, stage))


class DemandsDoor(Door):
    contract = "Demands"

    def demand(self, demand: Demand, model: Model, most: int) -> bytes:
        """The demand's id. Demands must be approved for the price; `most` is what it may be, in base units."""
        self._send("demand", demand, model, most)
        return demand_id(demand)

    def answer(self, demand_id: bytes, demanded: Demanded, model: Model, openings: Sequence[Opening]) -> TxReceipt:
        return self._send("answer", demand_id, demanded, model, openings)

    def lapse(self, demand_id: bytes, demanded: Demanded) -> TxReceipt:
        return self._send("lapse", demand_id, demanded)

    def withdraw(self) -> TxReceipt:
        return self._send("withdraw")

    def credit(self, account: str) -> int:
        return int(self._read("credit", account))

    def state_of(self, demand_id: bytes) -> bytes:
        """keccak256 of the demand's state while it is open; zeros if there never was one."""
        return bytes(self._read("stateOf", demand_id))

    def open_demands(self, job: bytes, stage: int) -> int:
        return int(self._read("openDemands", job, stage))

    def price_of(self, demand: Demand, model: Model) -> int:
        """What `demand` would draw now, in base units."""
        return int(self._read("priceOf", demand, model))


class RefereeDoor(Door):
    contract = "Referee"

    def step(
        self,
        model: Model,
        cell: Cell,
        steps: Sequence[bytes],
        instruction: Instruction,
        element: int,
        chunk: int,
        openings: Sequence[Opening],
    ) -> int:
        return int(self._read("step", model, cell, steps, instruction, element, chunk, openings))

    def run(self, op: int, arguments: Sequence[Sequence[int]], a: int, b: int) -> int:
        return int(self._read("run", op, arguments, a, b))

    def finish(self, op: int, total: int, a: int) -> int:
        return int(self._read("finish", op, total, a))
