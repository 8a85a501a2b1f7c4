"""The Python door against real contracts on a real node:

what it signs, the contracts accept; what they refuse, it names.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from eth_account.signers.local import LocalAccount

from contracts import abi, events, signing
from contracts.build import ROOT, load_abi
from contracts.client import (
    Acceptance,
    Addresses,
    AddressesError,
    Chain,
    ChainError,
    Claim,
    Job,
    Stage,
    Status,
    Worker,
)
from deploy.keys import dev_account
from verifier.game import Game, Phase, Segment
from verifier.referee.codec import Model, Trace
from verifier.referee.errors import DataLength

STAKE = 10**24
MODEL = Model(
    weights_root=b"\x01" * 32,
    weights_leaves=40,
    program_root=b"\x02" * 32,
    program_leaves=60,
    profile_root=b"\x03" * 32,
    profile_leaves=9,
    layers=4,
    hidden=64,
    query_width=64,
    kv_width=32,
    vocabulary=256,
    max_positions=128,
    weight_dtype=0,
    served_dtype=0,
)


def sample_game() -> Game:
    trace = Trace(b"\x07" * 32, 9, 0, 2)
    return Game(
        segment=Segment(b"\x05" * 32, 1, 5, 2, 1, 7, 0),
        challenger=dev_account(3).address,
        worker=dev_account(2).address,
        committed_at=1_700_000_000,
        bond=10**18,
        gas_rate=10**9,
        grace=5,
        model_id=b"\x06" * 32,
        rule=b"\x02" * 32,
        program_leaves=60,
        token=3,
        trace=trace,
        sampling=bytes(32),
        first_instruction=12,
        steps=b"\x08" * 32,
        phase=Phase.NODES,
        step=4,
        level=6,
        index=1,
        first_chunk=0,
        end_chunk=0,
        list=b"\x0a" * 32,
        worker_turn=True,
        turn_started=1_700_000_100,
        worker_seconds=60,
        challenger_seconds=50,
        worker_moves=1,
        challenger_moves=2,
    )


def job_of(chain: Chain, pipeline: bytes, nonce: int) -> Job:
    now = chain.block_timestamp()
    return Job(
        model=signing.model_id(MODEL),
        pipeline=pipeline,
        requests_root=b"\x04" * 32,
        requests=1,
        prompt_tokens=10,
        max_tokens=20,
        prompt_price=1,
        token_price=2,
        lock=10**9,
        gas_rate=1,
        accept_by=now + 100,
        commit_by=now + 200,
        window=20,
        clock=10,
        grace=1,
        nonce=nonce,
    )


@pytest.fixture(scope="module")
def pipeline(world: Any) -> Any:
    """Workers 1 and 2, staked and joined; account 4 holds tokens."""
    for index in (1, 2):
        chain = world.chain(index)
        chain.token.mint(chain.account, STAKE)
        chain.token.approve(chain.workers.address, STAKE)
        chain.workers.register(
            Worker(dev_account(10 + index).address, bytes([index]) * 32, f"http://127.0.0.1:{index}")
        )
        chain.workers.stake(STAKE)
    creator = world.chain(4)
    creator.token.mint(creator.account, 10**9)
    creator.token.approve(creator.escrow.address, 10**9)
    model = creator.models.register(MODEL)
    stages = [Stage(dev_account(1).address, 0, 1, 3000), Stage(dev_account(2).address, 1, 4, 7000)]
    expected = creator.workers.pipeline_id(model, stages, 7)
    signatures = [creator.sign_join(expected, key=dev_account(10 + index)) for index in (1, 2)]
    created = creator.workers.create_pipeline(model, stages, 7, signatures)
    assert created == expected
    assert creator.workers.pipeline_stages(created) == tuple(stages)
    assert creator.workers.pipeline_stage(created, 1) == stages[1]
    assert creator.workers.pipeline_model(created) == model
    return created


# ---- a job from end to end


def accept_and_commit(world: Any, job: Job, job_id: bytes) -> None:
    worker = world.chain(1)
    signers = [dev_account(11), dev_account(12)]
    worker.escrow.accept(
        job_id,
        [Acceptance(s, worker.sign_accept(job_id, s, job.model, key=signer)) for s, signer in enumerate(signers)],
    )
    roots, outputs = [b"\x11" * 32, b"\x12" * 32], [bytes(32), b"\x13" * 32]
    tokens = [0, 15]
    claims = []
    for stage, signer in enumerate(signers):
        signature = worker.sign_commit(
            job_id, job.pipeline, stage, job.model, roots[stage], outputs[stage], tokens[stage], key=signer
        )
        claims.append(Claim(stage, roots[stage], outputs[stage], tokens[stage], signature))
    worker.escrow.commit(job_id, claims)


def test_a_job_is_opened_accepted_committed_and_paid(world: Any, pipeline: bytes) -> None:
    requester = world.chain(4)
    first = requester.block_number() + 1
    job = job_of(requester, pipeline, 1)
    job_id = requester.escrow.open(job)
    assert requester.escrow.job(job_id) == job
    assert requester.escrow.requester(job_id) == requester.account
    assert requester.escrow.status(job_id) is Status.OPEN
    assert requester.escrow.root(job_id, 0) == bytes(32)

    accept_and_commit(world, job, job_id)
    assert requester.escrow.status(job_id) is Status.COMMITTED
    assert requester.escrow.root(job_id, 1) == b"\x12" * 32
    assert requester.escrow.outputs(job_id) == (b"\x13" * 32, 15)
    assert requester.workers.locked_stake(dev_account(1).address) == job.lock
    assert requester.workers.free_stake(dev_account(1).address) == STAKE - job.lock
    assert requester.escrow.open_games(job_id, 0) == 0
    assert requester.escrow.convicted(job_id, 0) is False
    assert requester.disputes.bond_for(job_id, 0) == 2_000_000 * job.gas_rate

    with pytest.raises(ChainError) as early:
        requester.escrow.settle(job_id)
    assert early.value.name == "TooEarly"
    assert set(early.value.args_by_name) == {"availableAt"}
    world.devnet.pass_seconds(requester.escrow.window_end(job_id) - requester.block_timestamp() + 1)
    requester.escrow.settle(job_id)
    assert requester.escrow.status(job_id) is Status.PAID

    worker = world.chain(2)
    owed = worker.escrow.credit(worker.account)
    before = worker.token.balance(worker.account)
    worker.escrow.withdraw()
    assert owed > 0
    assert worker.token.balance(worker.account) == before + owed

    seen = list(requester.events(first))
    assert [type(event).__name__ for event in seen if not isinstance(event, events.Credited | events.StakeLocked)][
        :6
    ] == ["JobOpened", "StageAccepted", "StageAccepted", "JobAccepted", "StageCommitted", "StageCommitted"]
    opened = next(event for event in seen if isinstance(event, events.JobOpened))
    assert (opened.id, opened.requester, opened.pipeline, opened.job) == (job_id, requester.account, pipeline, job)
    assert [event.amount for event in seen if isinstance(event, events.Withdrawn)] == [owed]
    assert [(event.block, event.log_index) for event in seen] == sorted((e.block, e.log_index) for e in seen)


def test_events_are_the_same_however_the_range_is_cut(world: Any, pipeline: bytes) -> None:
    chain = world.chain(4)
    last = chain.block_number()
    whole = list(chain.events(0, last))
    assert [event for block in range(last + 1) for event in chain.events(block, block)] == whole
    created = next(event for event in whole if isinstance(event, events.PipelineCreated))
    assert (created.id, created.stages[1]) == (pipeline, Stage(dev_account(2).address, 1, 4, 7000))
    registered = next(event for event in whole if isinstance(event, events.ModelRegistered))
    assert registered.model == MODEL


def test_a_reader_sees_who_a_worker_is(world: Any, pipeline: bytes) -> None:
    reader = Chain(world.devnet.url, world.addresses)
    assert reader.workers.worker(dev_account(1).address) == Worker(
        dev_account(11).address, b"\x01" * 32, "http://127.0.0.1:1"
    )
    assert reader.workers.signer_of(dev_account(1).address) == dev_account(11).address
    assert reader.models.layers(signing.model_id(MODEL)) == MODEL.layers
    with pytest.raises(PermissionError, match="without a key"):
        reader.escrow.withdraw()


def test_stake_comes_back_after_the_delay(world: Any, pipeline: bytes) -> None:
    worker = world.chain(1)
    before = worker.token.balance(worker.account)
    worker.workers.request_withdrawal(1000)
    with pytest.raises(ChainError, match="WithdrawalNotReady"):
        worker.workers.withdraw()
    world.devnet.pass_seconds(61)
    worker.workers.withdraw()
    assert worker.token.balance(worker.account) == before + 1000


def test_a_job_that_nobody_accepts_is_refunded(world: Any, pipeline: bytes) -> None:
    requester = world.chain(4)
    job = job_of(requester, pipeline, 2)
    job_id = requester.escrow.open(job)
    with pytest.raises(ChainError) as again:
        requester.escrow.open(job)
    assert (again.value.name, again.value.args_by_name) == ("JobExists", {"id": job_id})
    world.devnet.pass_seconds(101)
    requester.escrow.expire(job_id)
    assert requester.escrow.status(job_id) is Status.REFUNDED


def test_a_wrong_signature_is_refused_by_name(world: Any, pipeline: bytes) -> None:
    requester = world.chain(4)
    job = job_of(requester, pipeline, 3)
    job_id = requester.escrow.open(job)
    forged = requester.sign_accept(job_id, 0, job.model)
    with pytest.raises(ChainError) as refused:
        requester.escrow.accept(job_id, [Acceptance(0, forged)])
    assert refused.value.name == "BadSignature"


def test_another_form_of_a_signature_is_one_neither_here_nor_on_the_chain(world: Any, pipeline: bytes) -> None:
    """Who took a hand-off so signed could not show it, and would be convicted in its sender's place."""
    requester, order = world.chain(4), signing.CURVE_ORDER
    job = job_of(requester, pipeline, 11)
    job_id = requester.escrow.open(job)
    good = requester.sign_accept(job_id, 0, job.model, key=dev_account(1))
    assert requester.recover_accept(job_id, 0, job.model, good) == dev_account(1).address
    head, v = good[:64], good[64]
    high_s = (order - int.from_bytes(good[32:64], "big")).to_bytes(32, "big")
    for other in (good[:32] + high_s + bytes([55 - v]), head + bytes([v - 27]), head + bytes([v + 8])):
        assert requester.recover_accept(job_id, 0, job.model, other) is None
        with pytest.raises(ChainError) as refused:
            requester.escrow.accept(job_id, [Acceptance(0, other)])
        assert refused.value.name == "BadSignature"


def test_a_commitment_to_a_challenge_is_dated(world: Any) -> None:
    challenger = world.chain(3)
    game_id = signing.challenge_id(challenger.account, sample_game().segment, b"\x21" * 32)
    assert challenger.disputes.commitment_of(game_id) == 0
    first = challenger.block_number() + 1
    challenger.disputes.commit(game_id)
    assert challenger.disputes.commitment_of(game_id) > 0
    assert challenger.disputes.state_of(game_id) == bytes(32)
    [event] = challenger.events(first)
    assert isinstance(event, events.ChallengeCommitted)
    assert (event.id, event.sender) == (game_id, challenger.account)


# ---- ids, signatures, structs


def test_the_models_id_is_the_hash_of_its_words() -> None:
    assert abi.encode_struct("Model", MODEL) == MODEL.abi_words()


def test_a_game_survives_the_way_to_the_chain_and_back() -> None:
    game = sample_game()
    assert Game.decode(game.encode()) == game
    assert len(game.encode()) == 384
    with pytest.raises(DataLength):
        Game.decode(game.encode()[1:])


def test_every_event_of_the_abis_has_its_dataclass() -> None:
    known = {
        entry["name"]
        for name in ("Models", "Workers", "Escrow", "Disputes", "Demands")
        for entry in load_abi(name)
        if entry["type"] == "event"
    }
    assert known - {"EIP712DomainChanged"} == set(events.EVENTS)


@pytest.mark.parametrize("name", ["Models", "Workers", "Escrow", "Disputes"])
def test_every_function_of_the_interfaces_has_its_method(world: Any, name: str) -> None:
    between_contracts = {"lock", "unlock", "slash", "gameOpened", "gameClosed", "demandOpened", "demandClosed"}
    between_contracts |= {"models", "history"}
    text = (ROOT / "contracts" / "src" / "interfaces" / f"I{name}.sol").read_text(encoding="utf-8")
    promised = set(re.findall(r"\bfunction (\w+)\(", text)) - between_contracts
    door = getattr(Chain(world.devnet.url, world.addresses), name.lower())
    assert [function for function in promised if not hasattr(door, abi.snake(function))] == []


@pytest.mark.parametrize("other", [dev_account(1), dev_account(2)], ids=["one", "two"])
def test_signatures_are_recovered_to_their_signer(world: Any, other: LocalAccount) -> None:
    chain = world.chain(0)
    job, root, model = b"\x31" * 32, b"\x32" * 32, b"\x33" * 32
    assert chain.recover_join(job, chain.sign_join(job, key=other)) == other.address
    assert chain.recover_accept(job, 1, model, chain.sign_accept(job, 1, model, key=other)) == other.address
    line, relief = b"\x34" * 32, b"\x35" * 32
    commit = chain.sign_commit(job, line, 1, model, root, root, 5, key=other)
    assert chain.recover_commit(job, line, 1, model, root, root, 5, commit) == other.address
    assert chain.recover_commit(job, line, 1, model, root, root, 6, commit) != other.address
    assert chain.recover_commit(job, relief, 1, model, root, root, 5, commit) != other.address
    move = chain.sign_move(job, line, relief, 7, key=other)
    assert chain.recover_move(job, line, relief, 7, move) == other.address
    assert chain.recover_move(job, relief, relief, 7, move) != other.address
    handoff = chain.sign_handoff(job, 0, root, 3, key=other)
    assert chain.recover_handoff(job, 0, root, 3, handoff) == other.address
    assert chain.recover_handoff(job, 0, root, 3, handoff[:-1]) is None
    assert chain.recover_handoff(job, 0, root, 3, bytes(65)) is None


def test_a_struct_of_the_wrong_size_is_refused_before_it_is_sent(world: Any) -> None:
    with pytest.raises(TypeError, match=r"Escrow\.open: expected 1 arguments, got 0"):
        abi.functions("Escrow")["open"].encode(())


def test_unknown_revert_data_is_shown_raw() -> None:
    error = abi.decode_error(bytes.fromhex("deadbeef01"), "Escrow.open")
    assert str(error) == "Escrow.open: Unknown(data=0xdeadbeef01)"
    assert abi.decode_error(b"\x08\xc3\x79\xa0\x01", "x").name == "Unknown"


def test_addresses_are_written_and_read(tmp_path: Path, world: Any) -> None:
    path = tmp_path / "deep" / "addresses.json"
    world.addresses.save(path)
    assert Addresses.load(path) == world.addresses


@pytest.mark.parametrize("text", ["", "[]", '{"token": "0x"}'])
def test_a_wrong_addresses_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "addresses.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(AddressesError, match=r"addresses\.json"):
        Addresses.load(path)


def test_a_wrong_address_is_refused(world: Any) -> None:
    with pytest.raises(AddressesError, match="escrow: expected an address, got 'here'"):
        dataclasses.replace(world.addresses, escrow="here")
