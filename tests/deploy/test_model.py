"""`plumb model ...`: what it prints, and what it refuses."""

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from contracts.client import model_id
from deploy import model
from deploy.calibrate import SEQUENCES
from tests.verifier import tiny
from verifier.tolerance import Profile, uniform_profile
from verifier.weights import TOKENIZER_FILES, Weights, identify, tokenizer_hash

torch.set_num_threads(1)

TOKENIZER = b'{"model": {}}'


def plumb(*arguments: str) -> Result:
    return CliRunner().invoke(model.app, list(arguments))


def line(answer: Result) -> str:
    """Without the wrapping of a narrow terminal."""
    return re.sub(r"\s+", " ", answer.output)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    told: dict[str, Any] = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 101}
    weights = tiny.make_weights(tmp_path, tiny.config(**told))
    uniform_profile(weights.shape, 1, 100, 1 << 14, 1 << 20).save(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(TOKENIZER)
    return tmp_path


def test_check_tells_what_it_found(folder: Path) -> None:
    answer = plumb("check", str(folder))
    leaves = Weights.open(folder).leaves
    assert answer.exit_code == 0
    assert f"2 layers, hidden 64, {leaves} weight leaves, usable" in line(answer)


def test_id_is_recomputed_from_the_folder(folder: Path) -> None:
    weights = Weights.open(folder)
    expected = identify(weights, Profile.load(folder, weights.shape))
    answer = plumb("id", str(folder))
    assert answer.exit_code == 0
    assert answer.output.splitlines()[-1] == f"0x{model_id(expected).hex()}"
    told = line(answer).replace(" ", "")
    for root in (expected.weights_root, expected.program_root, expected.profile_root, tokenizer_hash(folder)):
        assert root.hex() in told


def test_another_profile_or_weight_is_another_model(folder: Path) -> None:
    first = plumb("id", str(folder)).output.splitlines()[-1]
    shape = Weights.open(folder).shape
    uniform_profile(shape, 1, 50, 1 << 14, 1 << 20).save(folder)
    second = plumb("id", str(folder)).output.splitlines()[-1]
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    third = plumb("id", str(folder)).output.splitlines()[-1]
    assert len({first, second, third}) == 3


def test_the_tokenizer_is_told_and_is_not_part_of_the_id(folder: Path) -> None:
    before = plumb("id", str(folder)).output.splitlines()[-1]
    (folder / "tokenizer.json").write_bytes(b"{}")
    assert plumb("id", str(folder)).output.splitlines()[-1] == before


def test_the_tokenizer_hash_covers_names_and_bytes_of_all_its_files(folder: Path) -> None:
    name = b"tokenizer.json"
    framed = len(name).to_bytes(4, "big") + len(TOKENIZER).to_bytes(8, "big") + name + TOKENIZER
    first = tokenizer_hash(folder)
    assert first == sha256(framed).digest()
    (folder / "README.md").write_text("nothing of a tokenizer's", encoding="utf-8")
    assert tokenizer_hash(folder) == first
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    renamed = tokenizer_hash(folder)
    (folder / "merges.txt").write_text("a b", encoding="utf-8")
    assert len({first, renamed, tokenizer_hash(folder)}) == 3


def test_a_folder_without_tokenizer_says_which_files_would_do(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    answer = plumb("id", str(folder))
    assert answer.exit_code == 1
    assert all(name in line(answer) for name in TOKENIZER_FILES)


@pytest.mark.parametrize("command", ["check", "id", "calibrate"])
def test_a_missing_folder_is_refused(command: str, tmp_path: Path) -> None:
    answer = plumb(command, str(tmp_path / "absent"))
    assert answer.exit_code == 1
    assert "error: expected" in answer.output and "config.json" in line(answer)


@pytest.mark.parametrize("command", ["check", "id", "calibrate"])
def test_an_unsupported_architecture_is_named_with_what_is_supported(command: str, folder: Path) -> None:
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(told | {"architectures": ["GPT2LMHeadModel"]}), encoding="utf-8")
    answer = plumb(command, str(folder))
    assert answer.exit_code == 1
    assert "GPT2LMHeadModel; supported: LlamaForCausalLM and MistralForCausalLM" in line(answer)


def test_check_names_the_weight_that_is_no_number(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    start = 8 + size + header["model.norm.weight"]["data_offsets"][0]
    data[start + 14 : start + 16] = (0x7FC0).to_bytes(2, "little")
    path.write_bytes(data)
    answer = plumb("check", str(folder))
    assert answer.exit_code == 1
    assert "model.norm.weight[7]" in line(answer) and "0x7fc0" in line(answer)


def test_an_id_needs_a_profile_of_this_very_model(folder: Path) -> None:
    (folder / "tolerance.json").unlink()
    answer = plumb("id", str(folder))
    assert answer.exit_code == 1 and "tolerance.json: there is none: see `plumb model calibrate`" in line(answer)
    (folder / "tolerance.json").write_text("[]", encoding="utf-8")
    answer = plumb("id", str(folder))
    assert answer.exit_code == 1
    assert "expected the keys" in line(answer)


@pytest.mark.parametrize("margin", ["1.2", "1.5", "nan"])
def test_a_margin_outside_of_what_was_measured_is_refused(margin: str, folder: Path) -> None:
    before = (folder / "tolerance.json").read_bytes()
    answer = plumb("calibrate", str(folder), "--margin", margin)
    assert answer.exit_code == 1
    assert "expected a margin of 1.25 to 1.4" in line(answer)
    assert (folder / "tolerance.json").read_bytes() == before


def test_calibrate_writes_the_profile_that_id_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SEQUENCES, "quick", 2)
    before = plumb("id", str(folder)).output.splitlines()[-1]
    answer = plumb("calibrate", str(folder), "--settings", "quick")
    assert answer.exit_code == 0, answer.output
    assert "token margin" in line(answer) and "tolerance.json" in line(answer)
    assert plumb("id", str(folder)).output.splitlines()[-1] != before
    told = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    assert told["profile_root"] == json.loads((folder / "tolerance.json").read_text(encoding="utf-8"))["root"]
    assert "one-token decode" in told["settings"] and min(told["kinds"]["v"]["thresholds"]) > 0


def test_settings_that_nobody_knows_are_refused(folder: Path) -> None:
    answer = plumb("calibrate", str(folder), "--settings", "some")
    assert answer.exit_code == 1 and "expected settings full or quick, got some" in line(answer)
