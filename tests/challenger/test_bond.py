"""Bonds that are paid from what the contract owes the watchtower already."""

import threading
from pathlib import Path
from typing import Any

import pytest

from bench._place import Defence, Place
from bench._town import Hall, Town, model, serve
from challenger.agent import Agent
from challenger.store import GameState, JobState
from deploy.deployment import deploy
from deploy.devnet import Devnet
from deploy.keys import dev_account


def test_a_withdrawal_beside_a_challenge_does_not_cost_it_its_gas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    weights, profile = model(folder)
    spoilt = serve(weights, spoil=True)
    with Devnet() as devnet, Hall() as hall:
        town = Town(devnet.url, deploy(devnet.url, dev_account(0), withdrawal_seconds=60), hall, weights, profile)
        town.settle_in()
        place = Place(devnet, town, folder, tmp_path)
        config = place.config("bond")
        agent, defence = place.agent(config), Defence(place, spoilt, config)
        monkeypatch.setattr(agent, "collect", lambda: None)  # the first bond comes back, and stays there
        first = town.commit(spoilt)
        assert place.judged(agent, first) == JobState.SUSPECT
        while agent.store.games_of(first.hex())[0].state != GameState.WON:
            agent.tick()
            devnet.mine()
            defence.play()
        disputes = agent.chain.disputes
        bond = disputes.bond_for(first, 1)
        assert bond <= disputes.credit(agent.chain.account) < 2 * bond
        second = town.commit(spoilt)
        assert place.judged(agent, second) == JobState.SUSPECT
        while agent.store.games_of(second.hex())[0].state != GameState.COMMITTED:
            agent.games.play(agent.chain.block_timestamp())
        devnet.mine()
        transport, drawing = agent.chain.transport, threading.Thread(target=lambda: Agent.collect(agent))
        estimate = transport._estimate

        def overtaken(transaction: Any, label: str) -> int:
            gas = estimate(transaction, label)
            if label.endswith("challenge"):
                drawing.start()
                drawing.join(3.0)  # if it is let that far, the bond has to be drawn after all
            return gas

        monkeypatch.setattr(transport, "_estimate", overtaken)
        agent.games.play(agent.chain.block_timestamp())
        drawing.join()
        (game,) = agent.store.games_of(second.hex())
        assert any(disputes.state_of(bytes.fromhex(game.id)))
        sent = [transport.web3.eth.get_transaction_receipt(f"0x{move.hash}") for move in agent.store.moves()]  # type: ignore[arg-type]
        assert [receipt["status"] for receipt in sent] == [1] * len(sent)
        agent.store.close()
