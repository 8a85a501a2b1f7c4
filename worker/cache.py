"""Keys and values of the requests in flight: a growing pair of buffers a request and layer, no padding."""

import torch

FIRST_CAPACITY = 64  # positions; buffers double from here, so n appends copy O(n) rows


class Pair:
    """Keys and values of one request at one layer, [key heads, positions, head size] each."""

    def __init__(self, heads: int, head_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.length = 0
        self._keys = torch.empty(heads, 0, head_size, dtype=dtype, device=device)
        self._values = torch.empty(heads, 0, head_size, dtype=dtype, device=device)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [heads, n, head size] each; returns views of all positions so far."""
        end = self.length + keys.shape[1]
        if end > self._keys.shape[1]:
            capacity = max(FIRST_CAPACITY, 2 * self._keys.shape[1], end)
            self._keys = self._grown(self._keys, capacity)
            self._values = self._grown(self._values, capacity)
        self._keys[:, self.length : end] = keys
        self._values[:, self.length : end] = values
        self.length = end
        return self._keys[:, :end], self._values[:, :end]

    def _grown(self, old: torch.Tensor, capacity: int) -> torch.Tensor:
        new = torch.empty(old.shape[0], capacity, old.shape[2], dtype=old.dtype, device=old.device)
        new[:, : self.length] = old[:, : self.length]
        return new


class Cache:
    """All requests of one job at one stage."""

    def __init__(self, heads: int, head_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._heads = heads
        self._head_size = head_size
        self._dtype = dtype
        self._device = device
        self._pairs: dict[int, dict[int, Pair]] = {}  # request -> layer -> pair
        self._lengths: dict[int, int] = {}

    def positions(self, request: int) -> int:
        """Positions of `request` that the last finished forward left here."""
        return self._lengths.get(request, 0)

    def pair(self, request: int, layer: int) -> Pair:
        layers = self._pairs.setdefault(request, {})
        if layer not in layers:
            layers[layer] = Pair(self._heads, self._head_size, self._dtype, self._device)
        return layers[layer]

    def advance(self, request: int, count: int) -> None:
        self._lengths[request] = self.positions(request) + count

    def drop(self, request: int) -> None:
        """Frees the buffers of a request that has ended."""
        self._lengths.pop(request, None)
        self._pairs.pop(request, None)
