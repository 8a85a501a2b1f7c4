"""Calls that are too long, cut off, not canonical or false, at the doors where models, workers and jobs come in.

As in test_malformed, but for length: what lies behind the arguments is read by nobody there, so it costs its sender its
calldata and nothing more.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest

from bench._arena import NAMELESS, Arena
from bench._market import REQUESTER, STRANGER, WORKERS, Batch, Market, serve, write_model
from contracts.abi import functions
from contracts.client import Acceptance, Chain, Claim, Consent, Job, Stage, Worker
from contracts.transport import floor_gas
from deploy.deployment import deploy
from deploy.devnet import Devnet
from deploy.keys import dev_account
from tests.twin.test_malformed import CHECKING_GAS, CUTS
from verifier.weights import Weights

SPARE, NEW = 7, 8  # development accounts; the spare signs with its own key
LONG_BYTES = 24 * 1024
YEAR = 365 * 86400
STAKE = 10**29


@dataclass(frozen=True)
class Office:
    """The doors, and a pipeline with its two workers and one that differs in the last."""

    market: Market
    arenas: dict[str, Arena]
    batch: Batch
    model: bytes
    pipeline: bytes
    spare: bytes

    @property
    def chain(self) -> Chain:
        return self.market.chain(REQUESTER)

    def attempt(self, contract: str, index: int, name: str, *arguments: Any) -> tuple[str, int, bytes]:
        data = functions(contract)[name].encode(arguments)
        return (*self.arenas[contract].attempt(index, data), data)

    def job(self, nonce: int) -> Job:
        now, prices = self.chain.block_timestamp(), {"prompt_price": 3, "token_price": 7}
        job = Job(
            model=self.model,
            pipeline=self.pipeline,
            requests_root=bytes(31) + b"\1",
            gas_rate=2,
            requests=1,
            window=3600,
            clock=30,
            grace=5,
            prompt_tokens=1,
            max_tokens=2,
            accept_by=now + 86400,
            commit_by=now + 2 * 86400,
            lock=0,
            nonce=nonce,
            **prices,
        )
        return replace(job, lock=self.chain.escrow.least_lock(job))

    def accepted(self, nonce: int) -> bytes:
        job = self.chain.escrow.open(self.job(nonce))
        self.chain.escrow.accept(job, self.acceptances(job))
        return job

    def acceptances(self, job: bytes) -> list[Acceptance]:
        return [Acceptance(s, self.chain.sign_accept(job, s, self.model, self.market.signer(s))) for s in (0, 1)]


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    weights = Weights.open(write_model(tmp_path_factory.mktemp("model")), threads=1)
    with Devnet() as devnet:
        addresses = deploy(devnet.url, dev_account(0), withdrawal_seconds=60)
        market = Market(devnet.url, addresses, weights)
        market.settle_in()
        chain = market.chain(SPARE)
        chain.token.mint(chain.account, STAKE)
        chain.token.approve(addresses.workers, STAKE)
        chain.workers.register(Worker(chain.account, b"\7" * 32, "http://127.0.0.1:7"))
        chain.workers.stake(STAKE)
        batch = market.unplaced(False, serve(weights))
        model = chain.models.register(batch.model)
        lines = []
        for last, key in ((WORKERS[1], market.signer(1)), (SPARE, dev_account(SPARE))):
            stages = stages_of(market, last)
            name = chain.workers.pipeline_id(model, stages, 0)
            joins = [chain.sign_join(name, market.signer(0)), chain.sign_join(name, key)]
            lines.append(chain.workers.create_pipeline(model, stages, 0, joins))
        names = {"Models": addresses.models, "Workers": addresses.workers, "Escrow": addresses.escrow}
        arenas = {name: Arena(devnet, address) for name, address in names.items()}
        yield Office(market, arenas, batch, model, *lines)
        for arena in arenas.values():
            arena.close()


def stages_of(market: Market, last: int) -> tuple[Stage, Stage]:
    first, second = market.chain(WORKERS[0]).account, market.chain(last).account
    return Stage(first, 0, 1, 4000), Stage(second, 1, 2, 6000)


def check(
    office: Office,
    contract: str,
    index: int,
    name: str,
    right: Sequence[Any],
    wrong: Sequence[tuple[str, Sequence[Any]]],
    dirty: Sequence[int],
) -> None:
    """All of `wrong` are refused by name, what is cut off or has bits where none belong is refused, and `right` is
    taken with anything behind it; none costs more than its calldata and what the right call spends on checking.

    dirty: words of the arguments of which some high bits belong to nothing.
    """
    arena, random = office.arenas[contract], Random(name)
    spent = []
    for what, arguments in wrong:
        said, gas, data = office.attempt(contract, index, name, *arguments)
        assert said and said not in NAMELESS, f"{what}: expected a refusal with a name, got {said or 'a success'}"
        spent.append((what, gas - floor_gas(data)))
    data = functions(contract)[name].encode(right)
    mangled = [data[: random.randrange(4, len(data) - 32)] for _ in range(CUTS)] + [data[:-32], data[:4]]
    for word in dirty:
        at = 4 + 32 * word
        changed = int.from_bytes(data[at : at + 32], "big") ^ 1 << random.randrange(200, 256)
        mangled.append(data[:at] + changed.to_bytes(32, "big") + data[at + 32 :])
    for call in mangled:
        said, gas = arena.attempt(index, call)
        assert said, f"{len(call)} of {len(data)} bytes: expected a refusal, got a success"
        spent.append(("mangled", gas - floor_gas(call)))
    call = data + random.randbytes(64)
    said, gas = arena.attempt(index, call)
    assert said == "", f"expected the right call to be taken, got {said}"
    most = max(CHECKING_GAS, gas - floor_gas(call) + CHECKING_GAS)
    dear = [each for each in spent if each[1] > most]
    assert not dear, f"expected at most {most} gas beyond the calldata, got {dear}"


def of_signature(what: str, signature: bytes, put: Callable[[bytes], Sequence[Any]]) -> Iterator[tuple[str, Any]]:
    # The other s of the same signature, which proves as much and yet is another one.
    mirrored = (ORDER - int.from_bytes(signature[32:64], "big")).to_bytes(32, "big")
    for name, other in (
        ("cut off", signature[:-1]),
        ("none", b""),
        ("long", signature + bytes(LONG_BYTES)),
        ("changed", bytes([signature[0] ^ 1]) + signature[1:]),
        ("mirrored", signature[:32] + mirrored + FLIP[signature[64:]]),
    ):
        yield f"{what}: {name}", put(other)


ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
FLIP = {b"\x1b": b"\x1c", b"\x1c": b"\x1b"}


def test_a_model(office: Office) -> None:
    right = replace(office.batch.model, max_positions=512)
    changes: list[dict[str, Any]] = [{name: bytes(32)} for name in ("weights_root", "program_root", "profile_root")]
    counts = ("weights_leaves", "program_leaves", "profile_leaves", "layers", "hidden", "query_width", "kv_width")
    changes += [{name: 0} for name in (*counts, "vocabulary", "max_positions")]
    most = (1 << 32) - 1
    changes += [{name: most} for name in ("layers", "hidden", "query_width", "kv_width", "vocabulary", "max_positions")]
    changes += [{"weight_dtype": 3}, {"served_dtype": 3}, {"max_positions": 1}]
    wrong = [(f"{change}", (replace(right, **change),)) for change in changes]
    numbers = (1, 3, *range(5, 14))  # words that are no roots
    check(office, "Models", STRANGER, "register", (right,), wrong, numbers)


def test_a_worker(office: Office) -> None:
    right = Worker(dev_account(NEW).address, b"\1" * 32, "https://worker.example:8443")
    wrong = [
        ("no signer", (replace(right, signer="0x" + "00" * 20),)),
        ("no certificate", (replace(right, tls=bytes(32)),)),
        ("no URL", (replace(right, url=""),)),
        ("a long URL", (replace(right, url="x" * 201),)),
        ("a very long URL", (replace(right, url="x" * LONG_BYTES),)),
    ]
    check(office, "Workers", NEW, "register", (right,), wrong, (0, 1, 3, 4))


def test_a_pipeline(office: Office) -> None:
    market, chain = office.market, office.chain
    stages, nonce = stages_of(market, WORKERS[1]), 9

    def signed(changed: Sequence[Stage]) -> list[bytes]:
        name = chain.workers.pipeline_id(office.model, changed, nonce)
        return [chain.sign_join(name, market.signer(s)) for s in (0, 1)]

    joins = signed(stages)
    first, last = stages
    partitions = {
        "a gap": (first, replace(last, first_layer=2, end_layer=3)),
        "an overlap": (first, replace(last, first_layer=0)),
        "too few layers": (first,),
        "too many": (first, replace(last, end_layer=3)),
        "an empty stage": (first, replace(last, end_layer=1)),
        "shares": (first, replace(last, share_bps=6001)),
        "no stages": (),
        "65 stages": (*[first] * 65,),
        "a stranger": (first, replace(last, worker=chain.account)),
    }
    wrong: list[tuple[str, Sequence[Any]]] = [
        (what, (office.model, changed, nonce, signed(changed)[: len(changed)])) for what, changed in partitions.items()
    ]
    wrong += [
        ("another model", (bytes(31) + b"\7", stages, nonce, joins)),
        ("a signature less", (office.model, stages, nonce, joins[:1])),
        ("a signature more", (office.model, stages, nonce, [*joins, joins[0]])),
        ("many signatures", (office.model, stages, nonce, joins * 100)),
        ("another nonce", (office.model, stages, nonce + 1, joins)),
        *of_signature("joins", joins[1], lambda other: (office.model, stages, nonce, [joins[0], other])),
    ]
    check(office, "Workers", STRANGER, "createPipeline", (office.model, stages, nonce, joins), wrong, (1, 2, 3, 4, 5))


def test_a_job_from_its_opening_to_its_commitment(office: Office) -> None:
    market, chain = office.market, office.chain
    order = office.job(1)
    now = chain.block_timestamp()
    changes: list[dict[str, Any]] = [{"model": b"\1" * 32}, {"pipeline": b"\1" * 32}, {"requests_root": bytes(32)}]
    changes += [
        {name: 0} for name in ("requests", "gas_rate", "window", "clock", "grace", "prompt_tokens", "max_tokens")
    ]
    changes += [{"accept_by": now - 1000}, {"commit_by": now}, {"commit_by": now + 2 * YEAR}, {"lock": order.lock - 1}]
    changes += [{"window": (1 << 32) - 1}, {"clock": (1 << 32) - 1}, {"grace": 31}, {"token_price": (1 << 128) - 1}]
    wrong = [(f"{change}", (replace(order, **change),)) for change in changes]
    check(office, "Escrow", REQUESTER, "open", (order,), wrong, range(3, 16))
    job = chain.escrow.job_id(chain.account, order)

    accepts = office.acceptances(job)
    wrong_accepts: list[tuple[str, Sequence[Any]]] = [
        ("no such job", (bytes(32), accepts)),
        ("no such stage", (job, [replace(accepts[0], stage=2)])),
        ("another's stage", (job, [replace(accepts[0], stage=1)])),
        ("one more", (job, [*accepts, accepts[0]])),
        ("many", (job, accepts * 200)),
        *of_signature("accept", accepts[0].signature, lambda other: (job, [Acceptance(0, other), accepts[1]])),
    ]
    check(office, "Escrow", STRANGER, "accept", (job, accepts), wrong_accepts, (1, 2, 3, 4, 5))

    roots = (b"\1" * 32, b"\2" * 32)

    def claim(stage: int, outputs: bytes, tokens: int, root: bytes | None = None) -> Claim:
        told = (roots[stage] if root is None else root, outputs, tokens)
        key = market.signer(stage)
        return Claim(stage, *told, chain.sign_commit(job, office.pipeline, stage, office.model, *told, key=key))

    claims = [claim(0, bytes(32), 0), claim(1, b"\3" * 32, 2)]
    wrong_claims: list[tuple[str, Sequence[Any]]] = [
        ("no such job", (bytes(32), claims)),
        ("no such stage", (job, [replace(claims[0], stage=2)])),
        ("another's stage", (job, [replace(claims[1], stage=0)])),
        ("no root", (job, [claim(0, bytes(32), 0, bytes(32))])),
        ("no outputs", (job, [claim(1, bytes(32), 2)])),
        ("outputs of the first stage", (job, [claim(0, b"\3" * 32, 0)])),
        ("too many tokens", (job, [claim(1, b"\3" * 32, 3)])),
        ("other tokens than were signed", (job, [replace(claims[1], tokens=1)])),
        ("one more", (job, [*claims, claims[0]])),
        ("many", (job, claims * 200)),
        *of_signature(
            "commit", claims[1].signature, lambda other: (job, [claims[0], replace(claims[1], signature=other)])
        ),
    ]
    check(office, "Escrow", STRANGER, "commit", (job, claims), wrong_claims, (1, 2, 3, 4, 5))


def test_a_move(office: Office) -> None:
    market, chain = office.market, office.chain
    job, until = office.accepted(2), chain.block_timestamp() + 86400
    keys = (market.signer(0), market.signer(1), dev_account(SPARE))

    def consent(which: int, until: int = until) -> Consent:
        return Consent(until, chain.sign_move(job, office.pipeline, office.spare, until, key=keys[which]))

    consents = [consent(which) for which in (0, 1, 2)]

    def altered(signature: bytes) -> Sequence[Any]:
        return job, office.spare, [consents[0], Consent(until, signature), consents[2]]

    wrong: list[tuple[str, Sequence[Any]]] = [
        ("no such job", (bytes(32), office.spare, consents)),
        ("no such pipeline", (job, b"\1" * 32, consents)),
        ("none", (job, office.spare, [])),
        ("one less", (job, office.spare, consents[:2])),
        ("exchanged", (job, office.spare, [consents[1], consents[0], consents[2]])),
        ("the newcomer's alone", (job, office.spare, [consents[2]] * 3)),
        ("over", (job, office.spare, [consents[0], consent(1, 1), consents[2]])),
        ("another time", (job, office.spare, [replace(consents[0], until=until + 1), *consents[1:]])),
        *of_signature("move", consents[1].signature, altered),
    ]
    check(office, "Escrow", STRANGER, "move", (job, office.spare, consents), wrong, (2, 3, 4, 5, 6))
    assert chain.escrow.job(job).pipeline == office.spare
