"""Starts the demo's players as processes of their own, forked from one that has imported torch and transformers: a
fresh interpreter spends ten seconds of a core on those imports, and the demo starts a dozen players.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

STOP_SECONDS = 10.0
_LOADED = ["challenger.agent", "challenger.cli", "deploy.demo.players", "plumb", "worker.agent", "worker.cli"]

_context = multiprocessing.get_context("forkserver")


def warm() -> None:
    """Begins the imports in the background, and returns."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the players share the machine
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _context.set_forkserver_preload(_LOADED)
    forkserver.ensure_running()


def start(command: Sequence[str], log: Path) -> BaseProcess:
    """Runs `plumb ...` or `players ...` (deploy/demo/players.py) with its output in `log`. Ends with this process."""
    warm()
    process = _context.Process(target=_become, args=(list(command), str(log)), daemon=True)
    process.start()
    return process


def stop(process: BaseProcess) -> None:
    process.terminate()
    process.join(STOP_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()


def _become(command: list[str], log: str) -> None:
    """In the new process: what the command line would have run."""
    import plumb
    from deploy.demo import players

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    os.close(output)
    sys.argv = command
    {"plumb": plumb.main, "players": players.main}[command[0]]()
