"""TOPLOC (PyPI package `toploc`, arXiv 2501.16007) on the same served tensors, in a virtual environment of its own.

It commits to the largest 128 values of the last hidden state, every 32 tokens, and compares them with the verifier's
own. Its compiled part must be built against this torch, so the first use takes a compiler and minutes.
Run as a script, `python bench/_toploc.py FILE`, it is the side that lives there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "tools" / "toploc"
VERSION = "0.1.6"
TOP, BATCH = 128, 32  # values a proof, tokens a proof: the paper's
EXPONENTS, MEAN, MEDIAN = 38, 10.0, 8.0
# The paper's thresholds for bfloat16: mismatched exponents, mean and median error of the mantissas.


class ToplocFailed(RuntimeError):
    """The other environment could not be made, or came to a bad end. Says which command and its last words."""


def install() -> Path:
    """The Python of the environment, made if need be. Raises ToplocFailed."""
    python = PLACE / "bin" / "python"
    packages = PLACE / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    if not (packages / "toploc").is_dir():
        venv.create(PLACE, with_pip=True)
        # Its torch is this project's: another would be gigabytes, and another arithmetic.
        (packages / "torch_of_the_project.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*pip, "wheel==0.45.1", "setuptools==80.9.0", "ninja==1.13.0"])
        _run([*pip, "--no-deps", "--no-build-isolation", "--no-binary", "toploc", f"toploc=={VERSION}"])
    return python


def flagged(python: Path, pairs: Mapping[str, Any]) -> dict[str, list[bool]]:
    """Which requests TOPLOC refuses, by row of the report. pairs: name -> (served, verifier's own), bfloat16 tensors
    [requests, positions, hidden], and the prompts' length. Raises ToplocFailed.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix="plumb-toploc-") as name:
        place = Path(name)
        tensors: dict[str, Any] = {}
        for index, (served, own, _) in enumerate(pairs.values()):
            tensors |= {f"{index}.served": served.contiguous(), f"{index}.own": own.contiguous()}
        save_file(tensors, place / "tensors")
        (place / "prompts.json").write_text(json.dumps([prompt for _, _, prompt in pairs.values()]), encoding="utf-8")
        answer = _run([str(python), str(Path(__file__).resolve()), name])
    told: list[list[bool]] = json.loads(answer.splitlines()[-1])
    return dict(zip(pairs, told, strict=True))


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = done.stderr.strip().splitlines()[-1:] or ["(silent)"]
        raise ToplocFailed(f"{' '.join(command)}: expected exit code 0, got {done.returncode}: {words[0]}")
    return done.stdout


def _other_side(place: Path) -> None:
    from safetensors.torch import load_file
    from toploc import build_proofs_bytes, verify_proofs_bytes

    tensors = load_file(place / "tensors")
    refused: list[list[bool]] = []
    for index, prompt in enumerate(json.loads((place / "prompts.json").read_text(encoding="utf-8"))):
        refused.append([])
        for served, own in zip(tensors[f"{index}.served"], tensors[f"{index}.own"], strict=True):
            told, true = ([rows[:prompt], *rows[prompt:].split(1)] for rows in (served, own))
            proofs = build_proofs_bytes(told, BATCH, TOP)
            results = verify_proofs_bytes(true, proofs, BATCH, TOP)
            wrong = (
                r.exp_mismatches > EXPONENTS or r.mant_err_mean > MEAN or r.mant_err_median > MEDIAN for r in results
            )
            refused[-1].append(any(wrong))
    sys.stdout.write(json.dumps(refused) + "\n")


if __name__ == "__main__":
    _other_side(Path(sys.argv[1]))
