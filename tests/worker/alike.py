"""Prompts that begin alike, for tests of what is shared."""

import random
from collections.abc import Sequence

from hypothesis import strategies as st

from verifier.commit import Request

SYSTEM = tuple((11 * t + 5) % 211 for t in range(50))


@st.composite
def batches(draw: st.DrawFn, longest: int = 90) -> list[Request]:
    """Prompts that go on where another's beginning ends, anywhere in it; some are the same or end within."""
    requests: list[Request] = []
    for r in range(draw(st.integers(2, 8))):
        prompt: tuple[int, ...] = ()
        if r and draw(st.integers(0, 4)):
            before = draw(st.sampled_from(requests)).prompt
            prompt = before[: draw(st.sampled_from([len(before), draw(st.integers(1, len(before)))]))]
        more = min(draw(st.integers(0 if prompt else 1, 60)), longest - len(prompt))
        dice = random.Random(draw(st.integers(0, 2**16)))
        requests.append(Request(prompt + tuple(dice.randrange(211) for _ in range(more)), draw(st.integers(1, 6))))
    return requests


def ask(*prompts: Sequence[int], limit: int = 2) -> list[Request]:
    return [Request(tuple(prompt), limit) for prompt in prompts]
