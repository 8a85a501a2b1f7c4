"""Results in the shape of an OpenAI batch output file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from requester.batch import CHAT, Line
from verifier.commit import LIMITED, STOPPED, Output

FINISH = {STOPPED: "stop", LIMITED: "length"}


def visible(output: Output) -> list[int]:
    """The text's tokens: a stop id ends the text and is no part of it, as with OpenAI."""
    return list(output.tokens[:-1] if output.code == STOPPED else output.tokens)


def result_line(job: str, model: str, line: Line, output: Output, text: str, created: int) -> dict[str, Any]:
    """One line of the results file (OpenAI API reference, Batch: "request output object"). output: a lawful one."""
    finish = FINISH[output.code]
    if line.url == CHAT:
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "finish_reason": finish,
            "logprobs": None,
        }
        kind, prefix = "chat.completion", "chatcmpl"
    else:
        choice = {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}
        kind, prefix = "text_completion", "cmpl"
    prompt, count = len(line.request.prompt), len(output.tokens)
    body = {
        "id": f"{prefix}-{job}-{line.number}",
        "object": kind,
        "created": created,
        "model": model,
        "choices": [choice],
        "usage": {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count},
    }
    return {
        "id": f"batch_req_{line.number}",
        "custom_id": line.custom_id,
        "response": {"status_code": 200, "request_id": f"{job}-{line.number}", "body": body},
        "error": None,
    }


def error_line(number: int, custom_id: str | None, reason: str) -> dict[str, Any]:
    """The line of a request that was not run."""
    error = {"code": "invalid_request", "message": reason, "line": number}
    return {"id": f"batch_req_{number}", "custom_id": custom_id, "response": None, "error": error}


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is never seen in part."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
