"""The benchmark of attacks on money and time: none pays, and the figures are of games that were really played."""

import pytest

from bench import griefing

MOVE_GAS, GAME_GAS = 350_000, 2_000_000


def test_every_attack_costs_more_than_it_does_harm() -> None:
    report = griefing.run(kinds="Q")
    lock, clock, grace = (report["terms"][name] for name in ("lock", "clock_seconds", "grace_seconds"))
    rows = {row["attack"].split(":")[0]: row for row in report["results"]}
    assert len(report["results"]) == 13
    for row in report["results"]:
        attacker, attacked = row["attacker"], row["attacked"]
        assert attacker["lost"] > max(attacked["lost"], attacked["gas"]) and row["burned"] > 0, row
        assert row["ratio"] is None or row["ratio"] > 1, row

    accused = rows["false accusation"]
    assert accused["attacker"]["locked"] == GAME_GAS
    assert accused["attacker"]["lost"] == accused["attacker"]["gas"] + GAME_GAS
    assert accused["attacked"]["lost"] == accused["attacked"]["gas"] - 2 * MOVE_GAS  # a descent and a proof
    assert clock <= accused["seconds"] <= clock + 2 * grace
    many = rows["12 false accusations at once"]
    assert many["attacker"]["locked"] == GAME_GAS * 4 * (1 + 2 + 4)
    for name in ("silence of a worker in a game, at once", "silence of a worker that is asked for one leaf"):
        assert rows[name]["attacker"]["lost"] == lock and rows[name]["attacked"]["lost"] < 0
    convicted = [row for row in report["results"] if row["attack"].startswith("self-conviction")]
    for row in convicted:
        assert row["attacker"]["lost"] >= lock // 4 and row["attacked"]["lost"] <= 0
    busy = rows["12 games of a friend's, to make a real one dear"]
    assert busy["attacked"]["locked"] == GAME_GAS * 8 and busy["seconds"] == 12 * grace


def test_a_segment_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of Q, K, V, ATTEND, MLP, TOKEN, SAMPLE"):
        griefing.run(kinds="Q,LINK")
