"""A batch file in the OpenAI batch format, turned into requests of token ids.

Each line is `{"custom_id", "method": "POST", "url": "/v1/completions" | "/v1/chat/completions", "body": {...}}`
(OpenAI API reference, Batch). Only token ids are law: text is encoded here, with the tokenizer of the model's folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from requester.sampling import sampling_of
from verifier.commit import InvalidRequest, Request, validate_request
from verifier.program import ModelShape

MAX_LINES = 50_000
MAX_FILE_BYTES = 200 * 2**20
MAX_STOPS = 8
DEFAULT_LIMIT = 16  # as OpenAI's completions endpoint

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
KNOWN_KEYS = {
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "stop",
    "seed",
    "stream",
    "user",
}


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    eos_token_id: int | None

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...


@dataclass(frozen=True)
class Line:
    """One request of a batch file: its line number (from 1), the caller's id, the endpoint and the request itself."""

    number: int
    custom_id: str
    url: str
    request: Request


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be run, and why."""

    number: int
    custom_id: str | None
    reason: str

    def __str__(self) -> str:
        name = f" ({self.custom_id})" if self.custom_id else ""
        return f"line {self.number}{name}: {self.reason}"


class BatchError(ValueError):
    """A batch file that cannot be read, or one with bad lines where none was allowed."""


@dataclass(frozen=True)
class Batch:
    lines: tuple[Line, ...]
    bad: tuple[BadLine, ...]

    @property
    def requests(self) -> tuple[Request, ...]:
        return tuple(line.request for line in self.lines)


def read_batch(path: Path, tokenizer: Tokenizer, shape: ModelShape) -> Batch:
    """Reads a batch file.

    Bad lines are collected, not raised. Raises BatchError if the file is missing, too large or empty.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise BatchError(f"cannot read the batch file {path}: {error.strerror}") from error
    if size > MAX_FILE_BYTES:
        raise BatchError(f"{path} has {size} bytes; at most {MAX_FILE_BYTES} are accepted")
    lines: list[Line] = []
    bad: list[BadLine] = []
    seen: set[str] = set()
    for number, raw in _lines(path):
        if len(lines) + len(bad) >= MAX_LINES:
            raise BatchError(f"{path} has more than {MAX_LINES} requests")
        custom_id: str | None = None
        try:
            entry = _object(raw)
            custom_id = _custom_id(entry)
            if custom_id in seen:
                raise ValueError(f"custom_id {custom_id!r} was used before")
            _check(entry)
            request = _request(entry, raw.strip(), tokenizer)
            validate_request(request, shape)
        except (ValueError, InvalidRequest) as error:
            bad.append(BadLine(number, custom_id, str(error)))
            continue
        seen.add(custom_id)
        lines.append(Line(number, custom_id, entry["url"], request))
    if not lines and not bad:
        raise BatchError(f"{path} holds no request")
    return Batch(tuple(lines), tuple(bad))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield number, raw


def _object(raw: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(raw)
        json.dumps(entry, ensure_ascii=False).encode()  # JSON may spell half a character, which nobody can write out
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a JSON object, but {error}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"expected a JSON object, got {type(entry).__name__}")
    return entry


def _custom_id(entry: dict[str, Any]) -> str:
    found = entry.get("custom_id")
    if not isinstance(found, str):
        raise ValueError('expected a string under "custom_id"')
    return found


def _check(entry: dict[str, Any]) -> None:
    if entry.get("method", "POST") != "POST":
        raise ValueError(f'expected method "POST", got {entry["method"]!r}')
    if entry.get("url") not in (COMPLETIONS, CHAT):
        raise ValueError(f"expected url {COMPLETIONS!r} or {CHAT!r}, got {entry.get('url')!r}")
    if not isinstance(entry.get("body"), dict):
        raise ValueError('expected an object under "body"')
    unknown = sorted(set(entry["body"]) - KNOWN_KEYS)
    if unknown:
        raise ValueError(f"unsupported parameters: {', '.join(unknown)}")


def _request(entry: dict[str, Any], raw: bytes, tokenizer: Tokenizer) -> Request:
    body = entry["body"]
    for key, served in (("n", 1), ("stream", False)):
        if body.get(key) not in (None, served):
            raise ValueError(f"{key} = {body[key]!r} is not served; expected {served!r}")
    given = [body[key] for key in ("max_completion_tokens", "max_tokens") if body.get(key) is not None]
    limit = given[0] if given else DEFAULT_LIMIT
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ValueError(f"expected max_tokens to be a whole number of at least 1, got {limit!r}")
    prompt = tuple(_prompt(entry["url"], body, tokenizer))
    return Request(prompt, limit, _stops(body, tokenizer), **sampling_of(body, raw))


def _prompt(url: str, body: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    if url == CHAT:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
            raise ValueError('expected one or more objects with the strings "role" and "content" under "messages"')
        chat = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        return _encoded(tokenizer.apply_chat_template, messages, **chat)
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return _encoded(tokenizer.encode, prompt)
    if isinstance(prompt, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
        return prompt
    raise ValueError('expected text or a list of token ids under "prompt"')


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _encoded(encode: Callable[..., Any], text: Any, **options: bool) -> list[int]:
    """Token ids. Raises ValueError."""
    try:
        return [int(token) for token in encode(text, **options)]
    except (
        Exception
    ) as error:  # a model's own template and tokenizer raise what they like; the line is bad all the same
        raise ValueError(f"the tokenizer refuses it: {type(error).__name__}: {error}") from error


def _stops(body: dict[str, Any], tokenizer: Tokenizer) -> tuple[int, ...]:
    """The end-of-text token, and each stop string that is one token."""
    stop = body.get("stop") or []
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError('expected a string or a list of strings under "stop"')
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in texts:
        encoded = _encoded(tokenizer.encode, text, add_special_tokens=False)
        if len(encoded) != 1:
            raise ValueError(f"stop {text!r} is {len(encoded)} tokens; only single tokens can be judged")
        ids.append(encoded[0])
    unique = tuple(dict.fromkeys(ids))
    if len(unique) > MAX_STOPS:
        raise ValueError(f"{len(unique)} stop ids, at most {MAX_STOPS} are accepted")
    return unique
