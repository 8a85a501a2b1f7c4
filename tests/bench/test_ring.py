"""The emulated ring serves a whole batch through the worker's own links."""

from functools import partial
from pathlib import Path

import torch

from bench._models import write_llama
from bench._ring import EmulatedStage, measure
from verifier.commit import Request
from worker.config import Serving


def test_every_token_comes_back_and_stages_tell_their_times(tmp_path: Path) -> None:
    write_llama(tmp_path, torch.float32, hidden=32, layers=2)
    builds = [partial(EmulatedStage, tmp_path, i, i + 1) for i in range(2)]
    requests = [Request(prompt=(1, 2), limit=3) for _ in range(6)]
    returned = measure(builds, requests, Serving(max_rows=2), [0.3, 0.3])
    assert sum(row.tokens for row in returned) == 18
    assert all(row.slowest_seconds >= EmulatedStage.seconds for row in returned)
    assert all(row.busy_seconds >= 2 * EmulatedStage.seconds for row in returned)
    assert returned[-1].microbatches > 3  # more than a ring without latency would hold
