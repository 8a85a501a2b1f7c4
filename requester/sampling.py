"""How a line of a batch file wants its tokens drawn: OpenAI's temperature, top_p and seed, and top_k besides.

The law counts temperature and top_p in 1/65536 (docs/protocol.md, "Records"); what is asked for is rounded to that.
"""

import hashlib
import math
from typing import Any

from verifier.commit import WHOLE_TOP_P

ONE = 65536
HIGHEST_TEMPERATURE = 2  # as OpenAI's API; the law goes further
SEEDS = range(-(1 << 63), 1 << 64)


def sampling_of(body: dict[str, Any], line: bytes) -> dict[str, int]:
    """temperature, top_k, top_p and seed of a Request. What is left out has the API's default: temperature 1, top_p 1.

    A line without a seed gets one from its own bytes, so that a file read again asks for the same. Raises ValueError.
    """
    temperature = _number(body, "temperature", 1)
    if not 0 <= temperature <= HIGHEST_TEMPERATURE:
        raise ValueError(f"expected a temperature of 0 .. {HIGHEST_TEMPERATURE}, got {temperature!r}")
    top_p = _number(body, "top_p", 1)
    if not 0 <= top_p <= 1:
        raise ValueError(f"expected a top_p of 0 .. 1, got {top_p!r}")
    top_k = _whole(body, "top_k", 0)
    if top_k < 0:
        raise ValueError(f"expected a top_k of 1 or more, or 0 for all tokens, got {top_k}")
    seed = _whole(body, "seed", int.from_bytes(hashlib.sha256(line).digest()[:8], "big"))
    if seed not in SEEDS:
        raise ValueError(f"expected a seed of 64 bits, got {seed}")
    if temperature == 0:  # the most likely token, which no filter forbids and no seed changes
        return {"temperature": 0, "top_k": 0, "top_p": WHOLE_TOP_P, "seed": 0}
    return {
        # Never down to 0, which would mean something else.
        "temperature": max(1, round(temperature * ONE)),
        "top_k": top_k,
        "top_p": max(1, round(top_p * WHOLE_TOP_P)),
        "seed": seed % (1 << 64),
    }


def _number(body: dict[str, Any], key: str, default: float) -> float:
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"expected {key} to be a number, got {value!r}")
    return value


def _whole(body: dict[str, Any], key: str, default: int) -> int:
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"expected {key} to be a whole number, got {value!r}")
    return value
