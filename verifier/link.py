"""What shows a LINK: single elements of the layer's tensors and of the next one's input (docs/protocol.md, "Segments").

It has no program: the model's id tells width and dtype, and the chain adds up raw bits where it checks the openings.
"""

from verifier.referee.codec import Opening, Tensor
from verifier.sources import Judged, ServedTensors
from verifier.trace import tensor_key


def premises(segment: Judged, trace: ServedTensors) -> list[Opening]:
    """h and attn_out, whose sum `prepare` computes. trace: of the stage that holds the layer."""
    return [_element(segment, trace, segment.layer, tensor) for tensor in (Tensor.H, Tensor.ATTN_OUT)]


def conclusion(segment: Judged, trace: ServedTensors, after: ServedTensors | None = None) -> list[Opening]:
    """mlp_out, and what the next layer reads (or `out`). after: of the stage that holds it, if that is another one."""
    received, layer = after or trace, segment.layer + 1
    held = layer < received.end_layer
    judged = _element(segment, received, layer, Tensor.H if held else Tensor.OUT)
    return [_element(segment, trace, segment.layer, Tensor.MLP_OUT), judged]


def _element(segment: Judged, trace: ServedTensors, layer: int, tensor: Tensor) -> Opening:
    return trace.open_row(tensor_key(layer, tensor), segment.position, segment.unit, segment.unit + 1)
