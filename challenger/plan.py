"""What an audit leads to: a challenge as it is stored before anything about it is sent, and back; and the receipt."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

from challenger.charge import segment_of
from challenger.store import GameRow
from contracts.client import challenge_id
from verifier.audit import Verdict
from verifier.program import Kind


def plan(account: str, job: bytes, verdict: Verdict, block: int) -> GameRow:
    """A new challenge by `account`, with a salt of its own. block: the next one that was not read yet."""
    segment, salt = segment_of(job, verdict), secrets.token_bytes(32)
    facts = {"ratio": str(verdict.ratio), "token": verdict.token, "reason": verdict.reason}
    return GameRow(
        id=challenge_id(account, segment, salt).hex(),
        job=job.hex(),
        segment={**asdict(segment), "job": job.hex()},
        salt=salt,
        block=block,
        evidence=facts,
    )


def verdict_of(row: GameRow) -> Verdict:
    """The verdict that a stored game was planned on."""
    place, evidence = row.segment, row.evidence
    at = (place["request"], place["layer"], place["position"], place["unit"])
    return Verdict(float(evidence["ratio"]), place["stage"], Kind(place["kind"]), *at, int(evidence["token"]))


def write_receipt(folder: Path, receipt: dict[str, Any]) -> None:
    """folder/JOB.json: what was compared and by how much it missed. Appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{receipt['job']}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)
