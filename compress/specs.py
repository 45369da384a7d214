"""Specs: one frozen dataclass per pass, holding exactly the options that a recipe may set.

    QuantizeInt4(block_size=32, symmetric=True).to_dict()
    spec_from_dict({"type": "quantize_int4", "block_size": 32})

Every spec checks itself when it is made, so a pass never meets an impossible option.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from gemini.errors import RecipeError

# onnxruntime has fast MatMulNBits kernels for these block sizes only; any other falls back to a slow loop.
BLOCK_SIZES = (16, 32, 64, 128, 256)
# bitsandbytes quantizes blocks of these sizes on CPU, and MatMulBnb4 reads them.
BNB_BLOCK_SIZES = (64, 128, 256, 512)
FITS = ("moments", "hqq", "nearest")
MIXED_FORMATS = ("int4-64", "int4-32", "int8-64")  # bits and block size
SPLIT_FORMATS = ("split-16", "split-8", "split-4")  # of a table: the first 16th, 8th, 4th of rows is wide


@dataclass(frozen=True)
class PerChannel:
    """One scale for each output channel; activations become int8 per call (DynamicQuantizeMatMul)."""

    type: ClassVar[str] = "per_channel"


@dataclass(frozen=True)
class PerBlock:
    """One scale for each ``size`` consecutive input features of an output channel (MatMulNBits)."""

    type: ClassVar[str] = "per_block"
    size: int = 64

    def __post_init__(self) -> None:
        _check_choice("size", self.size, BLOCK_SIZES)


@dataclass(frozen=True)
class ByFamily:
    """Per channel for encoders and image models, per block for generators.

    The per-channel product is the fastest int8 kernel on long inputs. It gives all activations of a call one
    scale, which an encoder bears and a generator's outliers do not.
    """

    type: ClassVar[str] = "by_family"


Granularity = PerChannel | PerBlock | ByFamily


@dataclass(frozen=True)
class Dynamic:
    """Every call finds the range of the activations at hand; those of convolutions stay float."""

    type: ClassVar[str] = "dynamic"


@dataclass(frozen=True)
class MinMax:
    """A fixed range: from the smallest to the largest activation of calibration."""

    type: ClassVar[str] = "min_max"


@dataclass(frozen=True)
class Percentile:
    """A fixed range that holds ``percent`` of the activations of calibration, as many cut off at each end."""

    type: ClassVar[str] = "percentile"
    percent: float = 99.99

    def __post_init__(self) -> None:
        number = isinstance(self.percent, int | float) and not isinstance(self.percent, bool)
        if not number or not 50.0 <= self.percent <= 100.0:
            raise RecipeError(f"`percent` is {self.percent!r}.", "Write a number from 50 to 100, like 99.99.")


@dataclass(frozen=True)
class Entropy:
    """A fixed range that leaves the least divergence between activations and their codes (TensorRT)."""

    type: ClassVar[str] = "entropy"


Activations = Dynamic | MinMax | Percentile | Entropy


@dataclass(frozen=True)
class QuantizeInt8:
    """Weights of linears and convolutions and the token embedding at 8 bits, round to nearest, symmetric.

    A convolution has one scale an output channel. ``activations`` says where the ranges of activations come
    from (`gemini.compress.ranges`): found in every call, or fixed in calibration, for layers per channel and
    for convolutions. ``smoothing`` moves so much of the activations' range into the weights of linears per
    channel (`gemini.compress.smooth`; 0: nothing), ``block_smoothing`` that of linears per block, where a
    norm can take it in (`gemini.compress.awq.fold_smoothing`); all three need calibration. ``skip`` holds
    glob patterns over module names that stay fp32.
    """

    type: ClassVar[str] = "quantize_int8"
    granularity: Granularity = field(default_factory=ByFamily)
    activations: Activations = field(default_factory=Dynamic)
    smoothing: float = 0.0
    block_smoothing: float = 0.0
    embeddings: bool = True
    embedding_block_size: int = 64
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.granularity, Granularity):
            raise RecipeError(
                f"`granularity` of quantize_int8 is {self.granularity!r}.",
                'Write { type = "per_channel" } or { type = "per_block", size = 64 }.',
            )
        if not isinstance(self.activations, Activations):
            raise RecipeError(
                f"`activations` of quantize_int8 is {self.activations!r}.",
                'Write { type = "dynamic" }, "min_max", "percentile" or "entropy".',
            )
        if self.static and isinstance(self.granularity, PerBlock):
            raise RecipeError(
                "Layers in blocks find the ranges of their activations in every call.",
                'Use granularity = { type = "per_channel" } or activations = { type = "dynamic" }.',
            )
        _check_share("smoothing", self.smoothing)
        _check_share("block_smoothing", self.block_smoothing)
        _check_bool("embeddings", self.embeddings)
        _check_choice("embedding_block_size", self.embedding_block_size, BLOCK_SIZES)
        _check_globs(self.skip)

    @property
    def static(self) -> bool:
        """Whether the ranges of activations are fixed."""
        return not isinstance(self.activations, Dynamic)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON/TOML values; ``spec_from_dict`` is the inverse."""
        return _to_dict(self)


@dataclass(frozen=True)
class QuantizeInt4:
    """Linear weights in 4-bit blocks, the token embedding and the head at ``embedding_bits``.

    Convolutions get 8 bits: they hold few of the weights and the pixels nearest to the input.
    ``fit`` says where scales and zero points come from: "moments" the error weighted by E[x^2], "hqq" an
    error norm that bears outliers, without any data (`gemini.compress.hqq`), "nearest" the range.
    ``gptq`` then rounds feature by feature, those to come making up for the error, each layer with everything
    before it already quantized (`gemini.compress.gptq`); it needs calibration.
    ``awq`` first moves so much of the activations' size into the weights as rounds best
    (`gemini.compress.awq`), where that costs no operation; it needs calibration.
    A table in 4 bits is rounded by GPTQ wherever there is calibration; ``embedding_wide_share`` of its rows,
    the first and so the most frequent, get ``embedding_wide_bits`` in blocks of ``embedding_wide_block_size``
    (0: as the others).
    The layers with the largest relative error, up to ``sensitive_share`` of the linear weights, get 8 bits.
    """

    type: ClassVar[str] = "quantize_int4"
    block_size: int = 64
    symmetric: bool = False
    fit: str = "moments"
    gptq: bool = False
    awq: bool = False
    embedding_bits: int = 8
    embedding_block_size: int = 64
    embedding_wide_share: float = 0.0
    embedding_wide_bits: int = 8
    embedding_wide_block_size: int = 0
    sensitive_share: float = 0.0
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_choice("block_size", self.block_size, BLOCK_SIZES)
        _check_bool("symmetric", self.symmetric)
        if self.fit not in FITS or (self.fit == "hqq" and self.symmetric):
            raise RecipeError(
                f"`fit` is {self.fit!r} with symmetric = {str(self.symmetric).lower()}.",
                f"Choose one of {', '.join(FITS)}; hqq needs symmetric = false.",
            )
        _check_bool("gptq", self.gptq)
        _check_bool("awq", self.awq)
        _check_choice("embedding_bits", self.embedding_bits, (4, 8, 32))
        _check_choice("embedding_block_size", self.embedding_block_size, BLOCK_SIZES)
        _check_share("embedding_wide_share", self.embedding_wide_share)
        if self.embedding_wide_share and self.embedding_bits != 4:
            raise RecipeError(
                f"`embedding_wide_share` is {self.embedding_wide_share!r} with embedding_bits = "
                f"{self.embedding_bits}.",
                "It is for embedding_bits = 4: that share of the rows gets more.",
            )
        _check_choice("embedding_wide_bits", self.embedding_wide_bits, (4, 8))
        _check_choice("embedding_wide_block_size", self.embedding_wide_block_size, (0, *BLOCK_SIZES))
        _check_share("sensitive_share", self.sensitive_share)
        _check_globs(self.skip)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON/TOML values; ``spec_from_dict`` is the inverse."""
        return _to_dict(self)


@dataclass(frozen=True)
class QuantizeMixed:
    """Linears, and the token embedding with the head, in the formats that their bytes are best spent on.

    4-bit blocks of 64 or 32 with zero points, or 8-bit blocks, chosen by the divergence that each is expected
    to add (`gemini.compress.plan`), so that a weight costs ``target_bpw`` bits on average, scales and zero
    points included. ``formats`` settles them beforehand: a key of `gemini.compress.plan.FORMATS` for each
    module, the embedding's name standing for the head too; what it does not name stays fp32. A table of
    tokens may also be split ("split-8"): 8 bits for the first eighth of its rows, 4 bits in blocks of 32 for
    the rest. ``gptq`` as in `QuantizeInt4`. It needs calibration.
    """

    type: ClassVar[str] = "quantize_mixed"
    target_bpw: float = 5.0
    formats: Mapping[str, str] = field(default_factory=dict)
    gptq: bool = True
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        number = isinstance(self.target_bpw, int | float) and not isinstance(self.target_bpw, bool)
        if not number or not 4.0 < self.target_bpw <= 32.0:
            raise RecipeError(f"`target_bpw` is {self.target_bpw!r}.", "Write a number from 4.4 to 8.3.")
        for name, form in self.formats.items() if isinstance(self.formats, Mapping) else [("formats", None)]:
            if form not in MIXED_FORMATS + SPLIT_FORMATS:
                raise RecipeError(
                    f"The format of `{name}` is {form!r}.",
                    f"Choose {', '.join(MIXED_FORMATS)}; for a table of tokens also "
                    f"{', '.join(SPLIT_FORMATS)}.",
                )
        _check_bool("gptq", self.gptq)
        _check_globs(self.skip)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON/TOML values; ``spec_from_dict`` is the inverse."""
        return _to_dict(self)


@dataclass(frozen=True)
class QuantizeNF4:
    """Linear weights as bitsandbytes NF4 (4-bit codes at the quantiles of a normal distribution)."""

    type: ClassVar[str] = "quantize_nf4"
    block_size: int = 64
    embedding_bits: int = 8
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_choice("block_size", self.block_size, BNB_BLOCK_SIZES)
        _check_choice("embedding_bits", self.embedding_bits, (4, 8, 32))
        _check_globs(self.skip)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON/TOML values; ``spec_from_dict`` is the inverse."""
        return _to_dict(self)


@dataclass(frozen=True)
class QuantizeCache:
    """Keys and values of past tokens at 8 bits, a scale a channel (`gemini.compress.cache`).

    For generators without an encoder; it needs calibration, and comes after the passes over weights.
    """

    type: ClassVar[str] = "quantize_cache"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON/TOML values; ``spec_from_dict`` is the inverse."""
        return _to_dict(self)


Spec = QuantizeInt8 | QuantizeInt4 | QuantizeMixed | QuantizeNF4 | QuantizeCache
SPECS: dict[str, type[Spec]] = {
    spec.type: spec for spec in (QuantizeInt8, QuantizeInt4, QuantizeMixed, QuantizeNF4, QuantizeCache)
}
CHOICES: dict[str, dict[str, Any]] = {
    "granularity": {kind.type: kind for kind in (PerChannel, PerBlock, ByFamily)},
    "activations": {kind.type: kind for kind in (Dynamic, MinMax, Percentile, Entropy)},
}


def spec_from_dict(table: Mapping[str, Any]) -> Spec:
    """The spec that ``table`` describes; RecipeError for an unknown type, an unknown key or a wrong value."""
    kind, options = _split(table, SPECS, "pass")
    for key, kinds in CHOICES.items():
        if isinstance(options.get(key), Mapping):
            inner, inner_options = _split(options[key], kinds, key)
            options[key] = inner(**inner_options)
    if isinstance(options.get("skip"), list):
        options["skip"] = tuple(options["skip"])
    return kind(**options)


def reject_unknown(keys: Iterable[str], valid: Iterable[str], where: str) -> None:
    """Raise RecipeError for the first of ``keys`` that is not in ``valid``, with the nearest valid one."""
    names = sorted(valid)
    for key in keys:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"Did you mean `{near[0]}`? " if near else ""
            raise RecipeError(f"Unknown key `{key}` in {where}.", f"{hint}Valid: {', '.join(names)}.")


def _split(table: Mapping[str, Any], kinds: Mapping[str, Any], noun: str) -> tuple[Any, dict[str, Any]]:
    """The class that ``table["type"]`` names and the remaining keys, all of them valid for that class."""
    valid = ", ".join(sorted(kinds))
    name = table.get("type")
    if name is None:
        raise RecipeError(f"A {noun} has no `type`.", f"Add one of: {valid}.")
    if not isinstance(name, str) or name not in kinds:
        near = difflib.get_close_matches(str(name), list(kinds), n=1)
        hint = f"Did you mean `{near[0]}`? " if near else ""
        raise RecipeError(f"Unknown {noun} type `{name}`.", f"{hint}Valid: {valid}.")
    options = {key: value for key, value in table.items() if key != "type"}
    reject_unknown(options, (item.name for item in fields(kinds[name])), f"{noun} `{name}`")
    return kinds[name], options


def _to_dict(spec: Any) -> dict[str, Any]:
    table: dict[str, Any] = {"type": spec.type}
    for item in fields(spec):
        value = getattr(spec, item.name)
        if isinstance(value, Granularity | Activations):
            value = _to_dict(value)
        if isinstance(value, Mapping):
            value = dict(value)
        table[item.name] = list(value) if isinstance(value, tuple) else value
    return table


def _check_choice(key: str, value: object, choices: tuple[int, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value not in choices:
        raise RecipeError(f"`{key}` is {value!r}.", f"Choose one of {', '.join(map(str, choices))}.")


def _check_bool(key: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RecipeError(f"`{key}` is {value!r}.", "Write true or false.")


def _check_share(key: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0.0 <= float(value) <= 1.0:  # type: ignore[arg-type]
        raise RecipeError(f"`{key}` is {value!r}.", "Write a number between 0 and 1.")


def _check_globs(value: object) -> None:
    if not isinstance(value, tuple) or not all(isinstance(item, str) and item for item in value):
        raise RecipeError(
            f"`skip` is {value!r}.", 'Write a list of module name patterns, e.g. ["*.down_proj"].'
        )
