"""What a forward captured, on its way to the host: from a GPU into pinned memory, on a stream of its own, so that
neither the forward nor its thread waits for it. On a CPU it is there already.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from worker.stage import Captured


@dataclass(frozen=True)
class Landing:
    """tensors: on the host, whole once `wait` has returned."""

    tensors: Captured
    done: Any = None  # torch.cuda.Event

    def wait(self) -> None:
        if self.done is not None:
            self.done.synchronize()


def land(captured: Captured) -> Landing:
    """Begins the copies; what was captured may be let go at once."""
    device = next(iter(captured.values())).device
    if device.type != "cuda":
        return Landing(captured)
    stream, tensors = _stream(device), {}
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for key, tensor in captured.items():
            tensors[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            tensors[key].copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)  # its memory is not given to others before
    return Landing(tensors, stream.record_event())


@cache
def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
