"""Benchmarks:

one file each, `bench/<name>.py` with `run(**options) -> dict` (numbers, texts, lists, nested dicts). `plumb bench NAME
--report FILE`.
"""

import ast
import importlib
import inspect
import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).resolve().parent
_REPORTED = ("numpy", "torch", "numba", "transformers", "web3", "grpcio")


class BenchError(Exception):
    """No such benchmark, or options that it does not take."""


def names() -> dict[str, str]:
    """Name -> first line of its docstring; reads the files without importing them."""
    found = {}
    for path in sorted(_FOLDER.glob("*.py")):
        if path.stem.startswith("_"):
            continue
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = text.split("\n", 1)[0]
    return found


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """["layers=3", "model=tiny"] -> {"layers": 3, "model": "tiny"}: JSON where it is JSON, else text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.isidentifier():
            raise BenchError(f"expected key=value, got {pair!r}")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def pairs(arguments: list[str]) -> list[str]:
    """["--layers", "3", "--model=tiny"] -> ["layers=3", "model=tiny"]."""
    found: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        key, separator, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not key:
            raise BenchError(f"expected --key value, got {argument!r}")
        if not separator:
            value = next(waiting, "")
            if not value:
                raise BenchError(f"expected a value behind {argument}")
        found.append(f"{key.replace('-', '_')}={value}")
    return found


def run(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The benchmark's result, with "machine" and "options" added."""
    if name not in names():
        raise BenchError(f"no benchmark {name!r}: expected one of {', '.join(names()) or '(none yet)'}")
    chosen = importlib.import_module(f"bench.{name}").run
    try:
        inspect.signature(chosen).bind(**options)
    except TypeError as error:
        raise BenchError(f"bench {name}: {error}; it takes {inspect.signature(chosen)}") from None
    for key, value in options.items():
        kind = str(inspect.signature(chosen).parameters[key].annotation)
        if kind.startswith(("list[", "collections.abc.Sequence[")) and not isinstance(value, list):
            raise BenchError(f'bench {name}: {key}: expected a list as JSON, such as [1, 2] or ["a"], got {value!r}')
    result: dict[str, Any] = chosen(**options)
    return {"benchmark": name, "options": options, "machine": machine(), **result}


def machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "accelerators": _accelerators(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _REPORTED},
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
    }


def show(name: str, result: dict[str, Any]) -> None:
    """A table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"plumb bench {name}", show_header=False)
    for key, value in _flat(result, ""):
        table.add_row(key, value)
    Console().print(table)


def _flat(value: Any, prefix: str) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [row for key, item in value.items() for row in _flat(item, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [row for place, item in enumerate(value) for row in _flat(item, f"{prefix}[{place}]")]
    if isinstance(value, float):
        return [(prefix, f"{value:,.6g}")]
    return [(prefix, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))]


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.machine()


def _accelerators() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return answer.stdout.strip().splitlines()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"
