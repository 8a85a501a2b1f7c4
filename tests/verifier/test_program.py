"""verifier.program: which models the law covers, where their weights lie, and their programs."""

import math
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from verifier.program import Kind, UnsupportedModel, WeightLayout, build_program, profile_cells, profile_index
from verifier.referee.codec import Instruction, SegmentHeader
from verifier.referee.errors import IndexOutOfRange
from verifier.referee.floats import Dtype
from verifier.referee.ops import Op
from verifier.referee.tree import leaf, root_of_range
from verifier.rope import Rope, rope_table
from verifier.shape import eps60, shape_from_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 600,
    "intermediate_size": 700,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 50,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
SHAPE = shape_from_config(CONFIG)


def test_the_shape_of_a_config() -> None:
    assert (SHAPE.query_width, SHAPE.kv_width, SHAPE.blocks) == (384, 128, 3)
    assert SHAPE.rms_eps == Decimal("0.00001")
    assert eps60(SHAPE) == 2**60 // 10**5 == 11529215046068
    assert (SHAPE.weight_dtype, SHAPE.tied) == (Dtype.BFLOAT16, False)
    defaults = {k: v for k, v in CONFIG.items() if k not in ("num_key_value_heads", "head_dim")}
    assert (shape_from_config(defaults).kv_heads, shape_from_config(defaults).head_dim) == (6, 100)
    mistral = {"architectures": ["MistralForCausalLM"], "sliding_window": None}
    assert shape_from_config(CONFIG | mistral) == SHAPE


def test_old_and_new_rope_keys_mean_the_same() -> None:
    old = shape_from_config(CONFIG | {"rope_scaling": LLAMA3})
    new = {k: v for k, v in CONFIG.items() if k not in ("rope_theta", "torch_dtype")}
    new |= {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}, "dtype": "bfloat16"}
    assert shape_from_config(new) == old
    older = {"type": "linear", "factor": 2.0}
    assert shape_from_config(CONFIG | {"rope_scaling": older}).rope == Rope(Decimal(500000), "linear", Decimal(2))


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("architectures", ["GPT2LMHeadModel"], "GPT2LMHeadModel"),
        ("architectures", [], "architecture none"),
        ("architectures", ["MistralForCausalLM"], "sliding_window 4096"),
        ("sliding_window", 512, "sliding_window 512"),
        ("attention_bias", True, "attention_bias"),
        ("mlp_bias", True, "mlp_bias"),
        ("quantization_config", {"bits": 4}, "quantization_config"),
        ("hidden_act", "gelu", "hidden_act gelu"),
        ("head_dim", 512, "head_dim 512"),
        ("head_dim", 63, "head_dim 63"),
        ("num_key_value_heads", 4, "4 key heads"),
        ("num_hidden_layers", None, "num_hidden_layers None"),
        ("num_hidden_layers", True, "num_hidden_layers True"),
        ("max_position_embeddings", 1 << 21, "max_position_embeddings"),
        ("torch_dtype", "float64", "dtype float64"),
        ("torch_dtype", None, "dtype none"),
        ("rms_norm_eps", 0.0, "rms_norm_eps"),
        ("rms_norm_eps", "nan", "rms_norm_eps"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "rope_type yarn"),
        ("rope_scaling", {"rope_type": "linear"}, "rope factor None"),
        ("rope_scaling", {"rope_type": "linear", "factor": 0.5}, "rope factor 0.5"),
        ("rope_scaling", LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor"),
        ("rope_scaling", LLAMA3 | {"original_max_position_embeddings": None}, "original_max"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
        ("rope_theta", 0.5, "rope_theta"),
    ],
)
def test_what_the_law_does_not_cover_is_refused_by_name(option: str, value: object, named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        shape_from_config(CONFIG | {option: value})


def test_served_and_weights_share_a_dtype() -> None:
    with pytest.raises(UnsupportedModel, match="one dtype"):
        build_program(replace(SHAPE, served_dtype=Dtype.FLOAT16))


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}, LLAMA3])
def test_the_rope_table_is_transformers_frequencies(scaling: dict[str, Any] | None) -> None:
    shape = shape_from_config(CONFIG | {"rope_scaling": scaling})
    kept = ("hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings")
    parameters = {"rope_theta": 500000.0, "rope_type": "default"} | (scaling or {})
    config = LlamaConfig(**{k: CONFIG[k] for k in kept}, rope_parameters=parameters)
    expected = LlamaRotaryEmbedding(config).inv_freq.double()
    got = torch.tensor([f / 2**64 * 2 * math.pi for f in rope_table(shape.rope, shape.head_dim)], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=0)  # theirs is float32


def test_the_rope_table_by_hand() -> None:
    # 2^64 / (2 pi), and with theta = 10^4 and 4 dimensions a hundredth of it.
    one = int(Decimal(2**64) / (2 * Decimal("3.14159265358979323846264338327950288419716939937510582097494")))
    assert rope_table(Rope(Decimal(10_000)), 4) == [one, one // 100]


@given(st.booleans(), st.data())
def test_every_leaf_is_a_place_of_one_tensor(tied: bool, data: st.DataObject) -> None:
    layout = WeightLayout(replace(SHAPE, tied=tied))
    index = data.draw(st.integers(0, layout.leaves - 1))
    place, row, chunk = layout.locate(index)
    assert place.base + row * math.ceil(place.cols / 256) + chunk == index
    assert row < place.rows and chunk * 256 < place.cols
    if place.name.startswith("model.layers.0."):
        later = layout.place(place.name.replace(".0.", ".2."))
        assert later.base == place.base + 2 * layout.layer_stride


def test_the_layout_by_hand() -> None:
    layout = WeightLayout(SHAPE)
    # rows x chunks: norm 3, q 384 x 3, k and v 128 x 3, o 600 x 2, norm 3, gate and up 700 x 3, down 600 x 3
    assert layout.layer_stride == 3 + 1152 + 384 + 384 + 1200 + 3 + 2100 + 2100 + 1800
    assert layout.place("model.layers.1.self_attn.q_proj.weight").base == layout.layer_stride + 3
    assert layout.place("model.norm.weight").base == 3 * layout.layer_stride
    assert layout.leaves == 3 * layout.layer_stride + 3 + 150 + 150
    tied = WeightLayout(replace(SHAPE, tied=True))
    assert tied.leaves == layout.leaves - 150
    assert tied.place("lm_head.weight") == layout.place("model.embed_tokens.weight")
    for outside in (-1, layout.leaves):
        with pytest.raises(IndexOutOfRange):
            layout.locate(outside)


def test_the_program_tree_holds_headers_instructions_and_table() -> None:
    program = build_program(SHAPE)
    leaves = program.leaves()
    lists = [program.segments.get(kind, ()) for kind in Kind]
    assert [[Op(i.op).name for i in steps] for steps in lists] == [
        ["SAME"],
        ["SUMSQ", "RSQRT", "NORM", "LINEAR", "ROPE", "VERDICT"],
        ["SUMSQ", "RSQRT", "NORM", "LINEAR", "ROPE", "VERDICT"],
        ["SUMSQ", "RSQRT", "NORM", "LINEAR", "VERDICT"],
        ["SCORE", "MAX", "EXP", "SUM", "WSUM", "DIV", "LINEAR", "VERDICT"],
        ["ADD", "SUMSQ", "RSQRT", "NORM", "LINEAR", "LINEAR", "GATED", "LINEAR", "VERDICT"],
        [],
        ["SUMSQ", "RSQRT", "NORM", "LOGIT", "COMPARE"],
        [],
        [],
        [],
        ["SUMSQ", "RSQRT", "NORM", "LINEAR", "MAX", "RANK", "MASS", "STANDING", "CHOICE"],
    ]
    for kind, steps in enumerate(lists):
        header = SegmentHeader.decode(leaves[kind])
        assert tuple(Instruction.decode(x) for x in leaves[header.first : header.first + header.steps]) == steps
    assert [h.units for h in program.headers] == [3, 6, 2, 2, 3, 3, 0, 50, 0, 0, 0, 50]
    assert program.table_base == 12 + sum(map(len, lists)) == len(leaves) - 1
    assert leaves[-1] == b"".join(f.to_bytes(8, "big") for f in program.table)
    assert lists[1][4].y.base == lists[2][4].y.base == program.table_base
    opening = [leaf(x) for x in leaves[8:10]]
    assert root_of_range(opening, 8, len(leaves), program.tree.prove(8, 2)) == program.root()


def test_profile_cells_are_numbered_without_gaps() -> None:
    order = [(Kind.Q, 6), (Kind.K, 2), (Kind.V, 2), (Kind.ATTEND, 3), (Kind.MLP, 3)]
    found = [profile_index(SHAPE, kind, layer, u) for layer in range(3) for kind, n in order for u in range(n)]
    assert [*found, profile_index(SHAPE, Kind.TOKEN)] == list(range(profile_cells(SHAPE)))
    for kind in (Kind.EMBED, Kind.LINK, Kind.STOP):
        with pytest.raises(ValueError, match=kind.name):
            profile_index(SHAPE, kind)
