"""The front door: quick to show itself, and no party's absence closes it for the others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import bench
import plumb

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "plumb", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_help_names_every_command_and_imports_none_of_them() -> None:
    script = "import sys, plumb\nplumb.compose(None)\nprint(sorted({m.split('.')[0] for m in sys.modules}))"
    answer = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    loaded = set(answer.stdout.replace("'", "").strip("[]\n").split(", "))
    assert loaded & {"torch", "web3", "transformers", "numba", "worker", "deploy", "contracts"} == set()
    shown = run("--help").stdout
    assert all(
        name in shown
        for name in ("worker", "challenger", "request", "model", "demo", "devnet", "deploy", "bench", "plan", "profit")
    )


def test_an_absent_party_says_so_and_breaks_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(plumb._PARTIES, "worker", ("worker_that_is_absent.cli", "Absent."))
    assert isinstance(plumb.compose("bench"), typer.Typer)
    with pytest.raises(SystemExit) as refused:
        plumb.compose("worker")
    assert refused.value.code == 1
    assert "worker_that_is_absent" in capsys.readouterr().err


def test_an_unknown_benchmark_is_refused_with_the_known_ones() -> None:
    answer = run("bench", "nothing")
    assert answer.returncode == 1
    assert "no benchmark 'nothing'" in answer.stderr


def test_a_deployment_without_its_keystore_is_refused_in_one_line(tmp_path: Path) -> None:
    answer = run(
        *("deploy", "--rpc", "http://127.0.0.1:1", "--keystore", str(tmp_path / "none.json")),
        *("--password", str(tmp_path / "none"), "--addresses", str(tmp_path / "addresses.json")),
    )
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: no keystore at ")


def test_a_benchmarks_options_may_be_plain_ones() -> None:
    assert bench.pairs(["--shape", "demo", "--max-rows=3"]) == ["shape=demo", "max_rows=3"]
    for wrong in (["shape"], ["--shape"], ["--"]):
        with pytest.raises(bench.BenchError):
            bench.pairs(wrong)


def test_options_of_a_benchmark_are_json_where_they_can_be() -> None:
    assert bench.parse_options(["layers=3", "model=tiny", "sizes=[1, 2]", "fast=true"]) == {
        "layers": 3,
        "model": "tiny",
        "sizes": [1, 2],
        "fast": True,
    }
    with pytest.raises(bench.BenchError, match="expected key=value, got 'layers'"):
        bench.parse_options(["layers"])


def test_a_list_is_asked_for_as_one() -> None:
    for name, key in (("commit", "models"), ("audit", "strategies")):
        with pytest.raises(bench.BenchError, match=f"{name}: {key}: expected a list as JSON.*got 'demo'"):
            bench.run(name, {key: "demo"})


def test_a_report_tells_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "noop.py").write_text('"""Does nothing."""\ndef run(times: int = 1): return {"seconds": 0.5 * times}\n')
    monkeypatch.setattr(bench, "_FOLDER", tmp_path)
    monkeypatch.setattr(bench, "__path__", [str(tmp_path)])
    assert bench.names() == {"noop": "Does nothing."}
    result = bench.run("noop", {"times": 4})
    assert (result["seconds"], result["benchmark"]) == (2.0, "noop")
    assert result["machine"]["cores"] >= 1
    assert result["machine"]["packages"]["numpy"] != "absent"
    json.dumps(result)
    with pytest.raises(bench.BenchError, match="it takes"):
        bench.run("noop", {"unknown": 1})


def test_a_plan_needs_a_file_that_can_be_read(tmp_path: Path) -> None:
    answer = run("plan", str(tmp_path / "none.toml"))
    assert answer.returncode == 1
    assert answer.stderr == f"error: {tmp_path / 'none.toml'}: No such file or directory\n"


def test_a_pipeline_needs_accounts() -> None:
    answer = run("worker", "propose", "bob", "--config", "none.toml")
    assert answer.returncode == 1 and "expected accounts of 20 bytes in hex, got 'bob'" in answer.stderr


def test_profit_tells_the_bar() -> None:
    assert run("profit").stdout == run("profit", "--tokens-per-second", "1071").stdout.splitlines()[0] + "\n"
    assert "6.56 $/day elsewhere" in run("profit", "--tokens-per-second", "1071").stdout
