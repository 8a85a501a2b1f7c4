"""How a stage multiplies rows by the model's matrices: from where the weights are mapped, or from a copy of them that
suits the processor.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from worker.errors import ConfigError

_ONEDNN = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


class Packed(nn.Module):
    """A linear layer over bfloat16 whose weights lie as oneDNN's products on a CPU want them, once and not anew for
    each: the same bits, from a copy of the same size. Where a CPU has instructions for bfloat16, that laying out takes
    longer than the product of a few rows.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Raises ConfigError where there is no oneDNN for such weights."""
        super().__init__()
        came = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}"
        if weight.device.type != "cpu" or weight.dtype is not torch.bfloat16 or not _ONEDNN:
            raise ConfigError(f"products: packed is for bfloat16 on a CPU, by torch with oneDNN; came {came}")
        try:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        except RuntimeError as error:  # a processor that is too old
            raise ConfigError(f"products: packed, {came}: {error}") from error
        self.bias = bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        return product


class Widened(nn.Module):
    """A linear layer over 16-bit numbers in float32: each product and sum exact to float32, the result rounded once.

    Where a CPU has no instructions for 16-bit floats this is several times faster, for twice the memory besides the
    mapped file.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.float(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(rows.float(), self.weight, self.bias).to(rows.dtype)


_LAYERS: Mapping[str, Callable[[torch.Tensor, torch.Tensor | None], nn.Module]] = {
    "packed": Packed,
    "widened": Widened,
}


def product(products: str, matrix: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """What makes rows [n, columns] into [n, rows of the matrix], in one dtype."""
    layer = _LAYERS.get(products)
    return layer(matrix, None) if layer else lambda rows: nn.functional.linear(rows, matrix)


def remake(module: nn.Module, products: str) -> None:
    """The linear layers within compute so from now on."""
    if (layer := _LAYERS.get(products)) is not None:
        for name, child in list(module.named_modules()):
            if isinstance(child, nn.Linear):
                module.set_submodule(name, layer(child.weight, child.bias))


def fastest(dtype: torch.dtype) -> str:
    """Which of worker.config.PRODUCTS this machine's CPU is fastest at, for `dtype`."""
    if dtype is torch.float32:
        return "mapped"
    have: Mapping[str, Any] = torch.cpu.get_capabilities()
    name = "bf16" if dtype is torch.bfloat16 else "fp16"
    # An Arm core that runs torch at all has products of halves; of bfloat16 some do.
    arm = {"bf16": "bf16", "fp16": "fp16_arith"}[name]
    if not any(have.get(key) for key in (f"avx512_{name}", f"amx_{name}", arm)):
        return "widened"
    packs = dtype is torch.bfloat16 and (have.get("avx512_bf16") or have.get("amx_bf16"))
    return "packed" if packs and _ONEDNN else "mapped"
