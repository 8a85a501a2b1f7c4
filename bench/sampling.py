"""The sampling law: honest draws that are never convicted, and how soon each cheat is.

Honest: tokens drawn from float logits that miss the standard ones by errors within the margin, flat and peaked, under
all filters; every token is screened and what comes near is judged in canonical arithmetic, as a watchtower does.
Cheats: the same audit over tokens that another seed, temperature, filter or preference chose. Per token; `tokens_99` is
how many make a conviction 99 % sure.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from verifier import sampling
from verifier.commit import WHOLE_TOP_P, Request
from verifier.drawn import NEAR, screen
from verifier.referee.fixed import Q30
from verifier.referee.sampling import Draw
from worker.sampler import allowed, pick

MARGIN = 0.041
# In logits: 1.3 times the widest spread that bfloat16 rounding of logits up to 8 makes.
BLOCK = 500  # positions at a time

Floats = npt.NDArray[np.float64]
Sampler = Callable[[Floats, npt.NDArray[np.int64], Request], int]  # (logits, noise, request) -> token

SHAPES = ("flat", "peaked", "plain")
ERRORS = ("rounded", "widest")
REQUESTS = {
    "temperature 1": Request((1,), 1, temperature=1 << 16),
    "temperature 0.5, top_k 40": Request((1,), 1, temperature=1 << 15, top_k=40),
    "temperature 1, top_p 0.9": Request((1,), 1, temperature=1 << 16, top_p=58982),
    "temperature 1.5, top_k 40, top_p 0.95": Request((1,), 1, temperature=3 << 15, top_k=40, top_p=62259),
}
ASKED = {
    "temperature 1": REQUESTS["temperature 1"],
    "temperature 1, top_k 40, top_p 0.9": replace(REQUESTS["temperature 1, top_p 0.9"], top_k=40),
}
# What the cheats pretend to serve.


@dataclass(frozen=True)
class Outcome:
    """Of some tokens: how many were worth a canonical judgment, how many convicted, and the worst ratio."""

    tokens: int
    suspicious: int
    convicted: int
    worst: float


def standard(random: np.random.Generator, shape: str, vocabulary: int) -> Floats:
    """A row of standard logits."""
    if shape == "flat":
        return random.normal(0.0, 0.02, vocabulary)
    row = random.normal(0.0, 2.0, vocabulary)
    if shape == "peaked":
        row -= 6.0
        row[random.integers(0, vocabulary, 3)] = random.normal(7.0, 0.5, 3)
    return np.clip(row, -8.0, 8.0)


def served(random: np.random.Generator, logits: Floats, errors: str) -> Floats:
    """What an honest server computes: rounded like bfloat16, or off by half the margin either way."""
    if errors == "widest":
        return logits + MARGIN / 2 * random.choice([-1.0, 1.0], len(logits))
    mantissa, exponent = np.frexp(logits)
    return np.ldexp(np.rint(mantissa * 256.0) / 256.0, exponent)


def audit(
    tokens: int, vocabulary: int, shape: str, errors: str, request: Request, sampler: Sampler = pick, index: int = 0
) -> Outcome:
    """`tokens` draws by `sampler`, screened and judged under `request`."""
    random = np.random.default_rng([index, tokens, vocabulary])
    margin, suspicious, convicted, worst = int(MARGIN * Q30), 0, 0, 0.0
    for start in range(0, tokens, BLOCK):
        positions = range(start, min(start + BLOCK, tokens))
        noises = sampling.noise_rows(request.seed, index, positions, vocabulary)
        for position, noise in zip(positions, noises, strict=True):
            exact = np.rint(standard(random, shape, vocabulary) * Q30).astype(np.int64)
            logits = exact / Q30
            token = sampler(served(random, logits, errors), noise, request)
            seen = screen(logits, noise, token, request, MARGIN)
            worst = max(worst, seen.ratio)
            if seen.ratio > NEAR:
                parameters = (request.temperature, request.top_k, request.top_p, request.seed)
                draw = Draw(*parameters, index, position, token, seen.unit, 0)
                suspicious += 1
                convicted += sampling.convicts(exact, margin, draw)
    return Outcome(tokens, suspicious, convicted, worst)


def cheats(vocabulary: int) -> dict[str, Sampler]:
    """Samplers that are not what the request asks for."""
    random = np.random.default_rng(5)
    other = itertools.count()

    def another_seed(logits: Floats, noise: npt.NDArray[np.int64], request: Request) -> int:
        return pick(logits, sampling.noise(request.seed + 1, 0, next(other), vocabulary), request)

    def with_request(**changes: int) -> Sampler:
        return lambda logits, noise, request: pick(logits, noise, replace(request, **changes))  # type: ignore[arg-type]

    def greedy(logits: Floats, noise: npt.NDArray[np.int64], request: Request) -> int:
        return int(logits.argmax())

    def favours(logits: Floats, noise: npt.NDArray[np.int64], request: Request) -> int:
        bonus = np.zeros(vocabulary)
        bonus[: vocabulary // 20] = 1.0  # a twentieth of all tokens, e times as likely
        return pick(logits + bonus, noise, request)

    def now_and_then(logits: Floats, noise: npt.NDArray[np.int64], request: Request) -> int:
        """One token in a hundred is any allowed one."""
        if random.random() < 0.01:
            return int(random.choice(np.flatnonzero(allowed(logits, request))))
        return pick(logits, noise, request)

    return {
        "another seed": another_seed,
        "greedy": greedy,
        "temperature 1.1": with_request(temperature=72090),
        "temperature 0.7": with_request(temperature=45875),
        "no top_p": with_request(top_p=WHOLE_TOP_P),
        "top_p 0.7": with_request(top_p=45875),
        "no top_k": with_request(top_k=0),
        "no filter": with_request(top_k=0, top_p=WHOLE_TOP_P),
        "top_k 5": with_request(top_k=5),
        "favours a twentieth of the tokens": favours,
        "one token in a hundred at will": now_and_then,
    }


def run(tokens: int = 1_000_000, cheat_tokens: int = 4_000, vocabulary: int = 256) -> dict[str, Any]:
    """tokens: honest ones in all; cheat_tokens: of each cheat and shape of logits."""
    cells = list(itertools.product(SHAPES, ERRORS, REQUESTS))
    each = math.ceil(tokens / len(cells))
    honest = []
    for index, (shape, errors, name) in enumerate(cells):
        seen = audit(each, vocabulary, shape, errors, replace(REQUESTS[name], seed=index * 7919), index=index)
        honest.append({"logits": shape, "errors": errors, "request": name, **vars(seen)})
    found = []
    for asked, shape in itertools.product(ASKED, SHAPES):
        for name, sampler in cheats(vocabulary).items():
            if name in ("no top_p", "no top_k", "no filter") and "top" not in asked:
                continue
            seen = audit(cheat_tokens, vocabulary, shape, "rounded", ASKED[asked], sampler)
            rate = seen.convicted / seen.tokens
            row = {"cheat": name, "request": asked, "logits": shape, "detection_rate": rate, "tokens_99": _sure(rate)}
            found.append(row | vars(seen))
    return {
        "margin": MARGIN,
        "honest_tokens": sum(row["tokens"] for row in honest),
        "honest_convicted": sum(row["convicted"] for row in honest),
        "honest": honest,
        "cheats": found,
    }


def _sure(rate: float) -> int | None:
    """Tokens after which a conviction is 99 % sure; None where none was seen."""
    if rate >= 0.99:
        return 1
    return math.ceil(math.log(0.01) / math.log1p(-rate)) if rate > 0 else None
