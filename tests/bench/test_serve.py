"""What `bench serve` reports, on a few tokens: names and ratios, not speed."""

import pytest

from bench.serve import run


def test_all_sides_serve_the_same_requests_and_are_set_against_the_faster_peer() -> None:
    report = run({"demo": [3, 8]}, ["float32"], ["mixed"], rounds=1)
    rows = {row["name"]: row for row in report["results"]}
    assert rows.keys() - {"llama.cpp"} == {
        "plumb",
        "plumb without commitments",
        "plumb regenerating",
        "transformers generate",
        "transformers generate_batch",
    }
    assert {(row["model"], row["dtype"], row["outputs"], row["tokens"]) for row in rows.values()} == {
        ("demo", "float32", "mixed", 24)
    }
    faster = max(row["tokens_per_second"] for name, row in rows.items() if name.startswith("transformers"))
    ratio = next(row for row in report["ratios"] if row["name"] == "plumb" and row["over"] == "transformers")
    assert ratio["tokens_per_second"] == pytest.approx(rows["plumb"]["tokens_per_second"] / faster, abs=1e-3)


def test_another_kind_of_outputs_is_refused() -> None:
    with pytest.raises(ValueError, match="expected outputs equal or mixed, got short"):
        run({"demo": [3, 8]}, ["float32"], ["short"])
