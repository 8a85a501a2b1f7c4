"""What numba compiled is found again only by who would compile the same."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import pytest
from numba.core import types

from verifier import native

SIGNATURE = types.void(types.int64[::1])


def made(name: str, source: Path, number: int) -> tuple[Any, int]:
    """A program that puts `number`, as its closure tells; and what it puts."""
    import numpy as np

    def put(into: Any) -> None:
        into[0] = number

    program: Any = native.compiled(SIGNATURE, put, name, [str(source)])
    found = np.zeros(1, np.int64)
    program(found)
    return program, int(found[0])


def test_a_program_is_kept_under_its_name_and_what_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.core.config, "CACHE_DIR", str(tmp_path / "cache"))
    source = tmp_path / "source.py"
    source.write_text("one")
    first, put = made("one", source, 1)
    assert put == 1 and not first.stats.cache_hits
    again, put = made("one", source, 1)
    assert put == 1 and again.stats.cache_hits
    other, put = made("two", source, 2)
    assert put == 2 and not other.stats.cache_hits
    source.write_text("another")
    anew, put = made("one", source, 1)
    assert put == 1 and not anew.stats.cache_hits
    monkeypatch.setattr(numba.core.config, "CPU_NAME", "generic")
    elsewhere, put = made("one", source, 1)
    assert put == 1 and not elsewhere.stats.cache_hits
    indexes = {path.name.partition("-")[0] for path in (tmp_path / "cache").rglob("*.nbi")}
    assert len(indexes) == 4


def test_without_room_for_the_cache_it_is_compiled_all_the_same(tmp_path: Path) -> None:
    """In a process of its own that may write files of no bytes, as on a full disk."""
    source = tmp_path / "source.py"
    source.write_text("one")
    code = (
        "import resource, signal; from pathlib import Path\n"
        "from tests.verifier.test_native import made\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        f"print(made('one', Path({str(source)!r}), 7)[1])"
    )
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ran.stdout == "7\n", ran.stderr
