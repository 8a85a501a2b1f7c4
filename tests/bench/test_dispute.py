"""The benchmark of disputes: its layer proves like a whole model, and its games end as they must."""

from pathlib import Path

import pytest

from bench import dispute
from bench._layer import LayerWeights, served, shape_named
from verifier.program import Kind
from verifier.referee import tree

ROW = {
    *("shape", "segment", "position", "instruction", "outcome", "moves", "gas_total", "gas_worker"),
    *("gas_challenger", "max_tx_gas", "max_calldata_bytes", "trace_seconds", "solve_seconds", "peak_memory_bytes"),
}


def test_a_leaf_of_the_one_layer_proves_in_the_whole_models_tree(tmp_path: Path) -> None:
    shape = shape_named("demo")
    weights = LayerWeights(shape, Kind.K, 2, tmp_path)
    place = weights.layout.place("model.layers.2.self_attn.k_proj.weight")
    assert len(weights.raw(place.name)) == 128
    for index in (place.base, place.base + place.leaves - 1):
        hashes = [tree.leaf(weights.leaf(index))]
        assert tree.root_of_range(hashes, index, weights.leaves, weights.prove(index)) == weights.root
    unread = weights.layout.place("lm_head.weight")
    assert weights.leaves == unread.base + unread.leaves
    with pytest.raises(KeyError):
        weights.raw("lm_head.weight")


def test_a_stage_of_the_trace_holds_what_the_segment_reads(tmp_path: Path) -> None:
    shape = shape_named("demo")
    weights = LayerWeights(shape, Kind.ATTEND, 0, tmp_path)
    trace = served(weights.program, shape, Kind.ATTEND, 0, 20)
    assert (trace.first_layer, trace.end_layer, trace.positions) == (0, 3, 20)
    random = {key for key in trace.keys if trace.arrays[key].any()}
    assert random == {"0.q", "0.k", "0.v", "0.attn_out"}


def test_a_guilty_worker_and_a_lying_challenger_lose() -> None:
    result = dispute.run(shape="demo", segment="k", position=20, instruction=1)
    denied, alleged = result["results"]
    assert (denied["outcome"], alleged["outcome"]) == ("slashed", "bond_lost")
    assert denied["instruction"] == "1 RSQRT"
    assert denied.keys() >= ROW
    assert denied["moves"] == alleged["moves"] == 3
    for row in (denied, alleged):
        assert row["gas_total"] == row["gas_worker"] + row["gas_challenger"]
        assert row["gas_total"] == sum(gas for _, gas, _, _ in row["transactions"])
        assert all(gas >= floor for _, gas, _, floor in row["transactions"])
        assert row["classic"]["moves"] > row["moves"] and row["classic"]["gas_total"] > row["gas_total"]
    proofs = [gas for row in (denied, alleged) for method, gas, _, _ in row["transactions"] if method == "prove"]
    assert result["dearest"]["prove"]["gas"] == max(proofs)
    assert result["worst"]["gas_total"] == max(denied["gas_total"], alleged["gas_total"])


def test_a_drawn_token_is_judged_where_the_profile_decides() -> None:
    """RANK reads the margin: what a guilty worker denies and what is alleged of an honest one differ from there on."""
    result = dispute.run(shape="demo", segment="sample", position=20, instruction=8)
    assert [row["outcome"] for row in result["results"]] == ["slashed", "bond_lost"]
    assert {row["instruction"] for row in result["results"]} == {"8 CHOICE"}


def test_a_false_link_convicts_at_once() -> None:
    (shown,) = dispute.run(shape="demo", segment="link", position=20)["results"]
    assert (shown["outcome"], shown["moves"], shown["gas_worker"]) == ("slashed", 2, 0)
    assert shown.keys() >= ROW and shown["classic"] == {"moves": 2, "gas_total": shown["gas_total"]}


def test_an_unknown_shape_segment_or_position_is_refused() -> None:
    for wrong in ({"shape": "none"}, {"segment": "embed"}, {"position": 1 << 20}):
        with pytest.raises(ValueError, match="expected a"):
            dispute.run(**wrong)
