"""What a requester remembers of its jobs: enough to hand the prompts over again and to read the results, whatever
becomes of the batch file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from requester.client import RequesterError
from requester.results import write_whole


@dataclass(frozen=True)
class Remembered:
    """block: the chain's head before the job was opened. batch: a copy. model: folder of tokenizer and
    configuration.
    """

    id: bytes
    block: int
    batch: Path
    model: Path


class Notebook:
    """Two files a job in one folder: JOB.json and JOB.jsonl."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser()

    def remember(self, id: bytes, block: int, batch: bytes, model: Path) -> None:
        """Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path(id, "jsonl").write_bytes(batch)
        text = json.dumps({"job": id.hex(), "block": block, "model": str(model.resolve())}, indent=2)
        write_whole(self._path(id, "json"), text + "\n")

    def forget(self, id: bytes) -> None:
        for kind in ("json", "jsonl"):
            self._path(id, kind).unlink(missing_ok=True)

    def recall(self, id: bytes) -> Remembered:
        """Raises RequesterError."""
        path = self._path(id, "json")
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            return Remembered(id, int(known["block"]), self._path(id, "jsonl"), Path(known["model"]))
        except FileNotFoundError:
            raise RequesterError(f"job 0x{id.hex()} was not submitted from here: expected {path}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise RequesterError(f"{path} is damaged: {error!r}") from error

    def block(self, id: bytes, default: int = 0) -> int:
        """Where the job's events may begin."""
        try:
            return self.recall(id).block
        except RequesterError:
            return default

    def _path(self, id: bytes, kind: str) -> Path:
        return self.folder / f"{id.hex()}.{kind}"
