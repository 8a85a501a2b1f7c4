"""Batch files: good lines become requests, bad ones are told by their number, and nothing else happens."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from requester.batch import CHAT, COMPLETIONS, Batch, BatchError, read_batch
from requester.results import error_line, result_line, visible, write_lines
from tests.requester.words import WORDS, write_tokenizer
from tests.verifier import tiny
from verifier.commit import LIMITED, STOPPED, Output, Request
from verifier.program import shape_from_config

SHAPE = shape_from_config(tiny.config())  # 300 tokens, 1024 positions


class Words:
    """The tokenizer's rules in plain Python: quick enough for many examples."""

    eos_token_id: int | None = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [WORDS.index(word) if word in WORDS else len(WORDS) - 1 for word in text.split()]

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        if conversation[-1]["role"] == "nobody":
            raise RuntimeError("a template's own words")
        return self.encode(" ".join(f"{m['role']} : {m['content']}" for m in conversation) + " assistant :")


def entry(custom_id: Any = "one", url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"temperature": 0, **body}}


def read(path: Path, *lines: Any) -> Batch:
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (path / "batch.jsonl").write_bytes(b"\n".join(raw))
    return read_batch(path / "batch.jsonl", Words(), SHAPE)


def test_both_endpoints_become_requests(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "the cat"}]
    batch = read(
        tmp_path,
        entry("a", prompt="the cat sat", max_tokens=5, stop=["mat", "<end>"]),
        b"",
        entry("b", CHAT, messages=messages, max_completion_tokens=3),
        entry("c", prompt=[7, 8], max_tokens=None),
    )
    assert batch.bad == ()
    assert [(line.number, line.custom_id) for line in batch.lines] == [(1, "a"), (3, "b"), (4, "c")]
    assert batch.requests == (
        Request((1, 2, 3), 5, (0, 6)),
        Request((7, 9, 1, 2, 8, 9), 3, (0,)),
        Request((7, 8), 16, (0,)),
    )


def test_sampling_parameters_become_the_laws(tmp_path: Path) -> None:
    batch = read(
        tmp_path,
        entry("a", prompt="cat", temperature=0.7, top_p=0.9, top_k=40, seed=-1),
        entry("b", prompt="cat", temperature=None),
        entry("c", prompt="cat", temperature=0, top_p=0.5, top_k=3, seed=9),
        entry("d", prompt="cat", temperature=1e-9, top_p=0, seed=9),
    )
    assert batch.bad == ()
    parts = [(r.temperature, r.top_k, r.top_p) for r in batch.requests]
    assert parts == [(45875, 40, 58982), (65536, 0, 65536), (0, 0, 65536), (1, 0, 1)]
    assert [r.seed for r in batch.requests if r is not batch.requests[1]] == [(1 << 64) - 1, 0, 9]


def test_a_line_without_a_seed_asks_for_the_same_whenever_it_is_read(tmp_path: Path) -> None:
    lines = [entry(name, prompt="cat", temperature=1) for name in ("a", "b")]
    first, again = read(tmp_path, *lines), read(tmp_path, *lines)
    assert first.requests == again.requests
    assert first.requests[0].seed != first.requests[1].seed


MESSAGE = {"role": "user", "content": "cat"}
BAD: list[tuple[Any, str]] = [
    (b"{", "expected a JSON object"),
    (b"\xff", "expected a JSON object"),
    (b"[" * 3000, "expected a JSON object"),
    (b"5", "got int"),
    (entry(5), "custom_id"),
    (b'{"custom_id": "\\ud800"}', "surrogates not allowed"),
    ({**entry(), "method": "GET"}, "method"),
    (entry(url="/v1/embeddings"), "expected url"),
    ({**entry(), "body": []}, '"body"'),
    (entry(prompt="cat", tools=[]), "unsupported parameters: tools"),
    (entry(prompt="cat", temperature=2.1), "temperature of 0 .. 2"),
    (entry(prompt="cat", temperature=-0.1), "temperature of 0 .. 2"),
    (entry(prompt="cat", temperature="0"), "temperature to be a number"),
    (entry(prompt="cat", temperature=True), "temperature to be a number"),
    (b'{"custom_id": "x", "url": "/v1/completions", "body": {"prompt": "cat", "temperature": NaN}}', "to be a number"),
    (entry(prompt="cat", temperature=1, top_p=1.1), "top_p of 0 .. 1"),
    (entry(prompt="cat", temperature=1, top_k=-1), "top_k of 1 or more"),
    (entry(prompt="cat", temperature=1, top_k=1.5), "top_k to be a whole number"),
    (entry(prompt="cat", temperature=1, top_k=301), "top_k of 0 .. 300"),
    (entry(prompt="cat", temperature=1, seed=1 << 64), "seed of 64 bits"),
    (entry(prompt="cat", temperature=1, seed="5"), "seed to be a whole number"),
    (entry(prompt="cat", n=2), "n = 2"),
    (entry(prompt="cat", stream=True), "stream = True"),
    (entry(prompt="cat", max_tokens=0), "at least 1"),
    (entry(prompt="cat", max_tokens=True), "whole number"),
    (entry(prompt="cat", max_tokens=1024), "1024 positions"),
    (entry(prompt=""), "prompt of 1 token"),
    (entry(prompt=[300]), "ids below 300"),
    (entry(prompt=[-1]), "ids below 300"),
    (entry(prompt=["cat", "mat"]), "list of token ids"),
    (entry(), '"prompt"'),
    (entry(prompt="cat", stop="the cat"), "2 tokens"),
    (entry(prompt="cat", stop=5), '"stop"'),
    (entry(prompt="cat", stop=[*WORDS[:9]]), "stop ids"),
    (entry(url=CHAT, messages=[]), '"messages"'),
    (entry(url=CHAT, messages=[{"role": "user"}]), '"messages"'),
    (entry(url=CHAT, messages=[{**MESSAGE, "content": [{"type": "image_url"}]}]), '"messages"'),
    (entry(url=CHAT, messages=[{**MESSAGE, "role": "nobody"}]), "RuntimeError: a template's own words"),
]


@pytest.mark.parametrize(("line", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_bad_line_is_told_and_the_others_stay(tmp_path: Path, line: Any, reason: str) -> None:
    batch = read(tmp_path, entry("first", prompt="cat"), line, entry("last", prompt="mat"))
    assert [good.custom_id for good in batch.lines] == ["first", "last"]
    (bad,) = batch.bad
    assert bad.number == 2 and reason in str(bad) and str(bad).startswith("line 2")


def test_an_id_used_twice(tmp_path: Path) -> None:
    batch = read(tmp_path, entry(prompt="cat"), entry(prompt="mat"))
    assert len(batch.lines) == 1 and "used before" in batch.bad[0].reason


def test_files_that_hold_no_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BatchError, match="cannot read"):
        read_batch(tmp_path / "none", Words(), SHAPE)
    with pytest.raises(BatchError, match="holds no request"):
        read(tmp_path, b"", b"  ")
    monkeypatch.setattr("requester.batch.MAX_LINES", 2)
    with pytest.raises(BatchError, match="more than 2"):
        read(tmp_path, *(entry(str(i), prompt="cat") for i in range(3)))
    monkeypatch.setattr("requester.batch.MAX_FILE_BYTES", 10)
    with pytest.raises(BatchError, match="at most 10"):
        read(tmp_path, entry(prompt="cat"))


BODIES = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0, 1, None, "0", True]) | st.floats(),
        "top_p": st.floats() | st.none(),
        "top_k": st.integers(-1, 400),
        "seed": st.integers(-(1 << 70), 1 << 70),
        "prompt": st.text(max_size=8) | st.lists(st.integers(-1, 400), max_size=4) | st.none(),
        "messages": st.lists(st.dictionaries(st.sampled_from(["role", "content"]), st.text(max_size=4)), max_size=2),
        "max_tokens": st.integers(-1, 2000) | st.floats() | st.none(),
        "stop": st.text(max_size=6) | st.lists(st.text(max_size=4), max_size=3),
        "n": st.integers(0, 2),
    },
)
LINES = st.binary(max_size=12) | st.builds(
    lambda id, url, body: json.dumps({"custom_id": id, "url": url, "body": body}).encode(),
    st.text(max_size=2) | st.integers(),
    st.sampled_from([COMPLETIONS, CHAT, "/"]),
    BODIES,
)


@given(st.lists(LINES, max_size=6))
def test_every_line_is_good_or_bad_and_good_ones_can_be_run(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    lines = [line.replace(b"\n", b"") for line in lines]
    full = [number for number, line in enumerate(lines, start=1) if line.strip()]
    folder = tmp_path_factory.getbasetemp()
    if not full:
        with pytest.raises(BatchError):
            read(folder, *lines)
        return
    batch = read(folder, *lines)
    told = [line.number for line in batch.lines] + [bad.number for bad in batch.bad]
    assert sorted(told) == full
    assert len({line.custom_id for line in batch.lines}) == len(batch.lines)
    for request in batch.requests:
        assert request.prompt and len(request.prompt) + request.limit <= SHAPE.max_positions
        assert all(0 <= token < SHAPE.vocabulary for token in (*request.prompt, *request.stops))
        assert len(request.record(0)) == 100


def test_the_real_tokenizer_says_the_same(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path)
    real = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False, local_files_only=True)
    told = read(
        tmp_path,
        entry("a", prompt="the cat sat", stop="mat"),
        entry("b", CHAT, messages=[{"role": "user", "content": "on a mat"}]),
        entry("c", prompt=""),
    )
    again = read_batch(tmp_path / "batch.jsonl", real, SHAPE)
    assert again.requests == told.requests and [bad.number for bad in again.bad] == [3]


def test_results_have_openais_shape(tmp_path: Path) -> None:
    batch = read(
        tmp_path,
        entry("a", prompt="the cat"),
        entry("b", CHAT, messages=[MESSAGE]),
        entry("c", prompt="cat", n=2),
    )
    stopped, limited = Output(0, 2, STOPPED, (3, 0)), Output(2, 1, LIMITED, (0,))
    assert visible(stopped) == [3] and visible(limited) == [0]
    rows = [
        result_line("j", "m", batch.lines[0], stopped, "sat\u2028", 5),
        result_line("j", "m", batch.lines[1], limited, "", 5),
        error_line(3, "c", batch.bad[0].reason),
    ]
    write_lines(tmp_path / "out.jsonl", rows)
    first, second, third = map(json.loads, (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")[:-1])
    assert first["custom_id"] == "a" and first["error"] is None and first["response"]["status_code"] == 200
    body = first["response"]["body"]
    assert body["object"] == "text_completion" and body["choices"][0]["text"] == "sat\u2028"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
    chat = second["response"]["body"]
    assert chat["object"] == "chat.completion" and chat["choices"][0]["finish_reason"] == "length"
    assert chat["choices"][0]["message"]["role"] == "assistant"
    assert third["response"] is None and third["error"]["line"] == 3
    assert not list(tmp_path.glob("*.part"))
