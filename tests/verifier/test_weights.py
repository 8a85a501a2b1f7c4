"""Model folders of strangers: what is sound opens, hashes and proves; everything else is refused by name."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from verifier import weights as module
from verifier.program import UnsupportedModel, WeightLayout, build_program, profile_cells, shape_from_config
from verifier.referee import tree
from verifier.referee.errors import IndexOutOfRange
from verifier.referee.floats import INVALID, Dtype, decode_weight
from verifier.weights import (
    InvalidWeight,
    MissingShard,
    MissingTensor,
    ModelFolderError,
    Weights,
    WrongShape,
    identify,
    tokenizer_hash,
)

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def config_of(dtype: str = "bfloat16", tied: bool = False, layers: int = 2) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 300,
        "intermediate_size": 70,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "vocab_size": 40,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "dtype": dtype,
    }


def tensors_of(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    out = {}
    for place in WeightLayout(shape_from_config(config)).tensors:
        shape = (place.cols,) if "norm" in place.name else (place.rows, place.cols)
        out[place.name] = torch.randn(shape).to(TORCH[config["dtype"]])
    return out


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = config_of()
    return write_folder(tmp_path / "model", config, tensors_of(config))


def law_leaves(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> list[bytes]:
    """The leaves as docs/canonical.md words them."""
    layer = "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
    layer += "post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj"
    names = [f"model.layers.{i}.{n}.weight" for i in range(config["num_hidden_layers"]) for n in layer.split()]
    names += ["model.norm.weight", "model.embed_tokens.weight"]
    names += [] if config["tie_word_embeddings"] else ["lm_head.weight"]
    out = []
    for name in names:
        rows = tensors[name].reshape(-1, tensors[name].shape[-1])
        size = rows.element_size()
        for row in rows.view(torch.uint8).numpy().reshape(len(rows), -1):
            out += [row[c : c + 256 * size].tobytes() for c in range(0, len(row), 256 * size)]
    return out


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize(("tied", "shards"), [(False, 1), (True, 3)])
def test_roots_leaves_and_proofs_are_those_of_the_law(tmp_path: Path, dtype: str, tied: bool, shards: int) -> None:
    config = config_of(dtype, tied)
    tensors = tensors_of(config)
    weights = Weights.open(write_folder(tmp_path / "m", config, tensors, shards))
    leaves = law_leaves(config, tensors)
    hashes = [tree.leaf(data) for data in leaves]
    expected = tree.Tree(hashes)
    assert weights.leaves == len(leaves) and weights.root == expected.root
    for first in (0, 1, 2, 255, 256, 257, len(leaves) // 2, len(leaves) - 1):
        assert weights.leaf(first) == leaves[first]
        n = min(3, len(leaves) - first)
        assert list(weights.prove(first, n)) == expected.prove(first, n)


def test_one_flipped_bit_changes_the_root(tmp_path: Path) -> None:
    config = config_of()
    tensors = tensors_of(config)
    before = Weights.open(write_folder(tmp_path / "a", config, tensors)).root
    tensors["model.layers.1.mlp.down_proj.weight"].view(torch.int16)[299, 69] ^= 1
    assert Weights.open(write_folder(tmp_path / "b", config, tensors)).root != before


@pytest.mark.parametrize("first", [-1, 10**9])
def test_leaves_outside_are_refused(folder: Path, first: int) -> None:
    with pytest.raises(IndexOutOfRange):
        Weights.open(folder).prove(first)
    with pytest.raises(IndexOutOfRange):
        Weights.open(folder).leaf(first)


def test_tensors_are_mapped_and_read_only(folder: Path) -> None:
    weights = Weights.open(folder)
    gain, table = weights.raw("model.norm.weight"), weights.raw("model.embed_tokens.weight", slice(3, 5))
    assert gain.shape == (1, 300) and table.shape == (2, 300) and not table.flags.writeable
    assert not table.flags.owndata
    with pytest.raises(KeyError):
        weights.raw("model.layers.2.input_layernorm.weight")


def test_a_tied_head_reads_the_embedding(tmp_path: Path) -> None:
    config = config_of(tied=True)
    weights = Weights.open(write_folder(tmp_path / "m", config, tensors_of(config)))
    assert np.array_equal(weights.raw("lm_head.weight"), weights.raw("model.embed_tokens.weight"))


@pytest.mark.parametrize("dtype", list(TORCH))
def test_values_are_decoded_as_the_referee_does(tmp_path: Path, dtype: str) -> None:
    config = config_of(dtype)
    tensors = tensors_of(config)
    number = torch.int32 if dtype == "float32" else torch.int16
    torch.manual_seed(1)
    bounds = (torch.iinfo(number).min, torch.iinfo(number).max)
    tensors["lm_head.weight"] = torch.randint(*bounds, (40, 300), dtype=number).view(TORCH[dtype])  # invalid ones too
    weights = Weights.open(write_folder(tmp_path / "m", config, tensors))
    law = Dtype[dtype.upper()]
    bits = weights.raw("lm_head.weight", slice(7, 9))
    expected = [[decode_weight(int(b), law) for b in row] for row in bits]
    valid = [[0 if v == INVALID else v for v in row] for row in expected]
    assert weights.fixed("lm_head.weight", slice(7, 9)).tolist() == valid
    assert any(v == INVALID for row in expected for v in row)
    values = weights.float64("lm_head.weight", slice(7, 9))
    assert values.dtype == torch.float64
    served = tensors["lm_head.weight"][7:9].double()
    invalid = torch.tensor([[v == INVALID for v in row] for row in expected])
    assert torch.equal(values, torch.where(invalid, torch.zeros_like(served), served))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 256.0, -256.0])
def test_an_invalid_weight_is_named_with_its_index(tmp_path: Path, value: float) -> None:
    config = config_of()
    tensors = tensors_of(config)
    tensors["model.layers.1.self_attn.o_proj.weight"][123, 7] = value
    weights = Weights.open(write_folder(tmp_path / "m", config, tensors))
    for use in (lambda: weights.root, weights.check):
        with pytest.raises(InvalidWeight, match=r"model\.layers\.1\.self_attn\.o_proj\.weight\[123, 7\]"):
            use()
    assert not (tmp_path / "m" / ".plumb").exists()


def test_an_invalid_gain_is_named_and_the_largest_weight_is_not(tmp_path: Path) -> None:
    config = config_of()
    tensors = tensors_of(config)
    tensors["model.norm.weight"][:2] = torch.tensor([255.0, -255.0])
    Weights.open(write_folder(tmp_path / "m", config, tensors)).check()
    tensors["model.norm.weight"][299] = float("nan")
    with pytest.raises(
        InvalidWeight, match=r"model\.norm\.weight\[299\]: expected a number below 2\^8, got bits 0x7fc0"
    ):
        Weights.open(write_folder(tmp_path / "m", config, tensors)).check()


def test_tiles_and_threads_do_not_change_the_root(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Weights.open(folder, threads=1)._build()
    monkeypatch.setattr(module, "TILE_BYTES", 1400)
    assert np.array_equal(Weights.open(folder, threads=3)._build(), expected)


def test_the_cached_tree_is_used_only_for_the_folder_it_was_made_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Weights.open(folder).root
    (cached,) = (folder / ".plumb").iterdir()
    sound = cached.read_bytes()

    def refuse(self: Weights) -> None:
        raise AssertionError("expected the cached tree to be read")

    with monkeypatch.context() as patch:
        patch.setattr(Weights, "_build", refuse)
        again = Weights.open(folder)
        assert again.root == expected
        for data in (sound[:-1], sound + b"x", sound[:40] + bytes([sound[40] ^ 1]) + sound[41:], b""):
            cached.write_bytes(data)
            with pytest.raises(AssertionError, match="expected the cached tree"):
                _ = Weights.open(folder).root
        cached.write_bytes(sound)
        stat = (folder / "model.safetensors").stat()
        # A forger can give a file back its size and mtime, but the inode's ctime moves on.
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data)
        os.utime(folder / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with pytest.raises(AssertionError, match="expected the cached tree"):
            _ = Weights.open(folder).root
    assert Weights.open(folder).root == expected


def test_a_folder_that_cannot_be_written_still_opens(folder: Path) -> None:
    (folder / ".plumb").write_text("no folder")
    assert len(Weights.open(folder).root) == 32


def test_the_model_is_identified(folder: Path) -> None:
    weights = Weights.open(folder)

    @dataclass(frozen=True)
    class Profile:
        root: bytes = b"\x22" * 32

    model = identify(weights, Profile())
    program = build_program(weights.shape)
    assert (model.weights_root, model.weights_leaves) == (weights.root, weights.leaves)
    assert (model.program_root, model.program_leaves) == (program.root(), len(program.leaves()))
    assert (model.profile_root, model.profile_leaves) == (b"\x22" * 32, profile_cells(weights.shape))
    sizes = (model.layers, model.hidden, model.query_width, model.kv_width, model.vocabulary, model.max_positions)
    assert sizes == (2, 300, 20, 10, 40, 64)
    assert (model.weight_dtype, model.served_dtype) == (0, 0)
    assert len(model.abi_words()) == 14 * 32


def test_the_tokenizer_is_hashed_by_name_and_bytes(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"tokenizer\.json"):
        tokenizer_hash(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"a")
    one = tokenizer_hash(tmp_path)
    (tmp_path / "vocab.json").write_bytes(b"")
    assert tokenizer_hash(tmp_path) != one
    (tmp_path / "vocab.json").rename(tmp_path / "README.md")
    assert tokenizer_hash(tmp_path) == one


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def replaced(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, tensor)


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (without("model.norm.weight"), MissingTensor, "model.norm.weight"),
        (without("lm_head.weight"), MissingTensor, "lm_head.weight"),
        (replaced("model.norm.weight", torch.zeros(299, dtype=torch.bfloat16)), WrongShape, "model.norm.weight"),
        (
            replaced("model.norm.weight", torch.zeros(1, 300, dtype=torch.bfloat16)),
            WrongShape,
            r"got bfloat16 \[1, 300\]",
        ),
        (replaced("lm_head.weight", torch.zeros(300, 40, dtype=torch.bfloat16)), WrongShape, r"\[40, 300\]"),
        (replaced("lm_head.weight", torch.zeros(40, 300)), WrongShape, "got float32"),
        (replaced("lm_head.weight", torch.zeros(40, 300, dtype=torch.int8)), WrongShape, "got I8"),
    ],
)
def test_tensors_that_the_config_does_not_imply_are_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], error: type[Exception], reason: str
) -> None:
    config = config_of()
    tensors = tensors_of(config)
    change(tensors)
    with pytest.raises(error, match=reason):
        Weights.open(write_folder(tmp_path / "m", config, tensors))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    config = config_of()
    folder = write_folder(tmp_path / "m", config, tensors_of(config), 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(MissingShard, match="model-00002-of-00003"):
        Weights.open(folder)
    (folder / "config.json").unlink()
    with pytest.raises(MissingShard, match=r"config\.json"):
        Weights.open(folder)
    with pytest.raises(MissingShard):
        Weights.open(tmp_path / "nowhere")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "..", "a\\b", "", 7, None])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, shard: object) -> None:
    config = config_of()
    folder = write_folder(tmp_path / "m", config, tensors_of(config), 2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFolderError, match="expected a file name"):
        Weights.open(folder)


def test_a_shard_that_breaks_its_promise_is_named(tmp_path: Path) -> None:
    config = config_of()
    folder = write_folder(tmp_path / "m", config, tensors_of(config), 2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = index["weight_map"]
    files["model.norm.weight"] = next(f for f in files.values() if f != files["model.norm.weight"])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MissingTensor, match=r"model\.norm\.weight"):
        Weights.open(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"weight_map": {}}', '{"weight_map": 1}', "[" * 100_000, '{"a":1,"a":2}']
)
def test_a_malformed_index_is_refused(tmp_path: Path, text: str) -> None:
    config = config_of()
    folder = write_folder(tmp_path / "m", config, tensors_of(config), 2)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelFolderError, match="index"):
        Weights.open(folder)


def test_a_config_that_claims_too_much_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**config_of(), "num_hidden_layers": (1 << 32) - 1}))
    with pytest.raises(MissingTensor, match="4294967295 layers"):
        Weights.open(folder)
    (folder / "config.json").write_text(json.dumps({**config_of(), "hidden_act": "gelu"}))
    with pytest.raises(UnsupportedModel, match="gelu"):
        Weights.open(folder)
