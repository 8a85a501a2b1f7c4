"""The dimensions of a model that the law covers, from its Hugging Face config."""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal, localcontext
from typing import Any

from verifier.referee.codec import BLOCK
from verifier.referee.floats import Dtype
from verifier.rope import Rope, law_context

MAX_POSITIONS = 1 << 20
# A softmax sum stays at 2^60 (i64) and a weighted sum at 2^110 (i128).
MIN_EPS60 = 1 << 24
# The smallest eps60 for which 1 / sqrt(eps) in Q40 fits i64: 2^58.


class UnsupportedModel(ValueError):
    """The law has no program for this model. The message names the option and what is supported."""


@dataclass(frozen=True)
class ModelShape:
    """The dimensions and constants of a Llama-like model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int
    rms_eps: Decimal
    rope: Rope
    tied: bool
    weight_dtype: Dtype
    served_dtype: Dtype

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def blocks(self) -> int:
        """Row blocks of 256 columns of the hidden width."""
        return -(-self.hidden // BLOCK)


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a Hugging Face config.json describes. Raises UnsupportedModel."""
    architecture = (config.get("architectures") or ["none"])[0]
    _require(
        architecture in ("LlamaForCausalLM", "MistralForCausalLM"),
        f"architecture {architecture}",
        "LlamaForCausalLM and MistralForCausalLM",
    )
    # Rationale: a missing key means 4096 to transformers' MistralConfig, so a Mistral must say null.
    window = config.get("sliding_window", 4096 if architecture == "MistralForCausalLM" else None)
    _require(window is None, f"sliding_window {window}", "null")
    for option in ("attention_bias", "mlp_bias", "quantization_config"):
        _require(not config.get(option), f"{option} {config.get(option)}", "none")
    act = config.get("hidden_act", "silu")
    _require(act == "silu", f"hidden_act {act}", "silu")

    def whole(name: str, default: Any = None) -> int:
        value = config.get(name)
        value = default if value is None else value
        fits = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 32
        _require(fits, f"{name} {value}", "a positive 32-bit integer")
        return int(value)

    heads, hidden = whole("num_attention_heads"), whole("hidden_size")
    name = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.").upper()
    _require(name in Dtype.__members__, f"dtype {name.lower()}", "bfloat16, float16 and float32")
    shape = ModelShape(
        layers=whole("num_hidden_layers"),
        hidden=hidden,
        intermediate=whole("intermediate_size"),
        heads=heads,
        kv_heads=whole("num_key_value_heads", heads),
        head_dim=whole("head_dim", hidden // heads),
        vocabulary=whole("vocab_size"),
        max_positions=whole("max_position_embeddings"),
        rms_eps=_decimal(config.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
        rope=_rope(config),
        tied=bool(config.get("tie_word_embeddings", False)),
        weight_dtype=Dtype[name],
        served_dtype=Dtype[name],
    )
    check_shape(shape)
    return shape


def _rope(config: Mapping[str, Any]) -> Rope:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    told: dict[str, Any] = {"rope_theta": config.get("rope_theta") or 10000.0}
    told |= config.get("rope_scaling") or {}
    told |= config.get("rope_parameters") or {}
    kind = told.get("rope_type", told.get("type", "default"))
    _require(kind in ("default", "linear", "llama3"), f"rope_type {kind}", "default, linear and llama3")
    partial = told.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    _require(partial == 1, f"partial_rotary_factor {partial}", "1.0")
    theta = _decimal(told["rope_theta"], "rope_theta")
    _require(theta >= 1, f"rope_theta {theta}", "1 or more")
    if kind == "default":
        return Rope(theta)
    factor = _decimal(told.get("factor"), "rope factor")
    _require(factor >= 1, f"rope factor {factor}", "1 or more")
    if kind == "linear":
        return Rope(theta, kind, factor)
    low, high = (_decimal(told.get(key), key) for key in ("low_freq_factor", "high_freq_factor"))
    _require(0 < low < high, f"low_freq_factor {low}, high_freq_factor {high}", "0 < low < high")
    original = told.get("original_max_position_embeddings")
    _require(
        isinstance(original, int) and original > 0, f"original_max_position_embeddings {original}", "a positive integer"
    )
    return Rope(theta, kind, factor, low, high, int(original or 0))


def check_shape(shape: ModelShape) -> None:
    """Raises UnsupportedModel for what no program can hold, or what would leave the bounds of canonical.md."""
    hd = shape.head_dim
    _require(hd <= BLOCK and hd % 2 == 0, f"head_dim {hd}", "an even number up to 256")
    _require(shape.heads % shape.kv_heads == 0, f"{shape.heads} heads, {shape.kv_heads} key heads", "a multiple")
    _require(shape.max_positions <= MAX_POSITIONS, f"max_position_embeddings {shape.max_positions}", "up to 1,048,576")
    # INVARIANT: EMBED compares raw bits of served rows and of weights.
    _require(
        shape.served_dtype == shape.weight_dtype,
        f"weights in {shape.weight_dtype.name.lower()}, served in {shape.served_dtype.name.lower()}",
        "one dtype for both",
    )
    _require(MIN_EPS60 <= eps60(shape) < 1 << 64, f"rms_norm_eps {shape.rms_eps}", "2^-36 up to 16")


def _require(holds: bool, found: str, supported: str) -> None:
    if not holds:
        raise UnsupportedModel(f"the law does not cover {found}; supported: {supported}")


def _decimal(value: object, name: str) -> Decimal:
    """A config's number as it is written there, not as the nearest float."""
    number = isinstance(value, int | float | Decimal | str) and not isinstance(value, bool)
    try:
        decimal = Decimal(str(value)) if number else Decimal("NaN")
    except ArithmeticError:
        decimal = Decimal("NaN")
    _require(decimal.is_finite(), f"{name} {value}", "a number")
    return decimal


def eps60(shape: ModelShape) -> int:
    """floor(eps x 2^60), the `a` of RSQRT."""
    with localcontext(law_context()):
        return int((shape.rms_eps * (1 << 60)).to_integral_value(ROUND_FLOOR))
