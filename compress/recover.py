"""Quantized layers that learn while they stay quantized, and what they learn from.

    make_learnable(student)      # its packed linears can learn now
    loss = divergence(student(ids).logits, teacher(ids).logits)
    loss.backward()              # a step of an optimizer, and again
    settle(student)              # packed again, in the same format

What is learned is the second phase of EfficientQAT (Chen et al., arXiv:2407.11062, section 3.3): scales of
blocks, codes and zero points fixed; and, if asked, the codes too, straight through the rounding (Bengio et
al., arXiv:1308.3432). Neither adds a byte to what is exported.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gemini.compress.modules import QuantizedLinear
from gemini.compress.packing import pack_4bit, storable, unpack_4bit

_CHUNK = 64  # tokens: their logits stay in the processor's cache
_SMALL = 1e-3  # the least size of a tensor, for rates: biases may start at 0


class _Divergence(torch.autograd.Function):
    """The gradient is found with the value, some tokens at a time: logits are the largest tensors of all."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        count, total = len(student), student.new_zeros((), dtype=torch.float32)
        grad = torch.empty_like(student)
        for found, known, slope in zip(*(t.split(_CHUNK) for t in (student, teacher, grad)), strict=True):
            log_found, log_known = (t.float().log_softmax(-1) for t in (found, known))
            share = log_known.exp()
            total += torch.dot(share.flatten(), (log_known - log_found).flatten())
            slope.copy_(log_found.exp_().sub_(share))
        ctx.save_for_backward(grad.div_(count))
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * grads[0], None


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence KL(teacher || student) of a token in nats, from logits (..., V).

    Gradients reach the student alone.
    """
    size = student.shape[-1]
    found: Tensor = _Divergence.apply(student.reshape(-1, size), teacher.reshape(-1, size))
    return found


def state_distance(
    student: Sequence[Tensor], teacher: Sequence[Tensor], pairs: Sequence[int] | None = None
) -> Tensor:
    """Mean of ``|s - t|^2 / |t|^2`` over tokens and layers, of states (B, S, D) behind every layer.

    Each token counts alike, so the first one, whose states are hundreds of times as large as others (Sun et
    al., arXiv:2402.17762), does not outweigh the rest. ``pairs``: the teacher's layer for each of a student's
    that has fewer; evenly spaced ones if None, the last with the last.
    """
    count = len(student)
    if pairs is None:
        pairs = [-(-(index + 1) * len(teacher) // count) - 1 for index in range(count)]
    paired = [teacher[index] for index in pairs]
    distances = [
        ((s - t).square().sum(-1) / t.square().sum(-1).clamp_min(torch.finfo(t.dtype).tiny)).mean()
        for s, t in zip(student, paired, strict=True)
    ]
    return torch.stack(distances).mean()


class _Scaled(torch.autograd.Function):
    """Fixed codes (N, B, block) int16 times scales (N, B) that learn, without a float copy of the codes."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        return codes * scales.unsqueeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, (grads[0] * ctx.saved_tensors[0]).sum(-1)


class _Rounded(torch.autograd.Function):
    """Latent codes rounded and kept between two ends; gradients pass as if they were not, inside the ends."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, low: Tensor, high: Tensor) -> Tensor:
        codes = latent.round().clamp_(low, high)
        ctx.save_for_backward((codes - latent).abs_() <= 0.5)
        return codes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.saved_tensors[0], None, None


class LearnableLinear(nn.Module):
    """A ``QuantizedLinear`` whose scales learn, and whose codes do if they may.

    It computes with what it will be packed into, at every step. ``gain`` (N, B) multiplies the scales, so
    that one learning rate fits all of them. ``latent`` (N, B, block) stands for the codes less their zero
    point; it rounds to another code once it has moved by half a step.
    """

    scales: Tensor
    zero_points: Tensor | None
    zeros: Tensor

    def __init__(self, packed: QuantizedLinear, codes: bool = False) -> None:
        """``codes``: whether they learn too."""
        super().__init__()
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.bits, self.block_size = packed.bits, packed.block_size
        self.register_buffer("scales", packed.scales)
        self.register_buffer("zero_points", packed.zero_points)
        stored = _unpacked(packed.qweight, packed.bits, packed.block_size)
        if packed.zero_points is None:
            zeros = torch.full_like(stored[..., :1], 1 << (packed.bits - 1))
        else:
            zeros = _unpacked(packed.zero_points, packed.bits, stored.shape[1]).unsqueeze(-1)
        self.register_buffer("zeros", zeros.to(torch.int16))
        signed = stored.to(torch.int16) - self.zeros
        self.latent = nn.Parameter(signed.float()) if codes else None
        self.register_buffer("fixed", None if codes else signed)
        self.gain = nn.Parameter(torch.ones_like(packed.scales))
        self.bias = None if packed.bias is None else nn.Parameter(packed.bias.clone())

    @property
    def weight(self) -> Tensor:
        """The float weight (N, K) that the codes stand for."""
        codes, scales = self._codes(), self.scales * self.gain
        spelled = _Scaled.apply(codes, scales) if self.latent is None else codes * scales.unsqueeze(-1)
        return spelled.flatten(1)[:, : self.in_features]

    def _codes(self) -> Tensor:
        """Codes less their zero point (N, B, block)."""
        if self.latent is None:
            return self.fixed
        codes: Tensor = _Rounded.apply(self.latent, -self.zeros, (1 << self.bits) - 1 - self.zeros)
        return codes

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return functional.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def settled(self) -> QuantizedLinear:
        """The packed layer with what was learned: same bits, blocks and zero points."""
        codes = (self._codes() + self.zeros).to(torch.uint8)
        return QuantizedLinear(
            self.in_features,
            self.out_features,
            self.bits,
            self.block_size,
            pack_4bit(codes) if self.bits == 4 else codes,
            storable(self.scales * self.gain),
            self.zero_points,
            None if self.bias is None else self.bias.detach(),
        )


def twin(model: nn.Module) -> nn.Module:
    """The same model over the same tensors, for one of the two to have modules replaced."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def make_learnable(model: nn.Module, codes: bool = False) -> None:
    """Let scales, norms and biases of a quantized model learn, and 4-bit ``codes`` if asked, as new modules.

    Token embedding and head stay as they are, and no tensor that another model may share changes.
    """
    model.requires_grad_(False)
    ends = _ends(model)
    for name, module in [(n, m) for n, m in model.named_modules() if m not in ends]:
        if isinstance(module, QuantizedLinear):
            # A step of an 8-bit code is too small to matter.
            model.set_submodule(name, LearnableLinear(module, codes and module.bits == 4))
        elif any(parameter.ndim == 1 for parameter in module.parameters(recurse=False)):
            own = copy.deepcopy(module)
            for parameter in own.parameters(recurse=False):
                parameter.requires_grad_(parameter.ndim == 1)
            model.set_submodule(name, own)


def let_weights_learn(model: nn.Module) -> None:
    """Let every parameter of a float model learn but those of token embedding and head."""
    model.requires_grad_(True)
    for end in _ends(model):
        end.requires_grad_(False)


def settle(model: nn.Module) -> None:
    """Pack what has learned, in place."""
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, LearnableLinear)]:
        model.set_submodule(name, module.settled())
    model.requires_grad_(False)


def learning_groups(model: nn.Module, rate: float, code_rate: float) -> list[dict[str, Any]]:
    """Groups for an optimizer, each with its own "base" rate: ``code_rate`` for codes, and for any other
    tensor ``rate`` times its root mean square (Shazeer and Stern, arXiv:1804.04235, section 8)."""
    return [
        {"params": [p], "base": code_rate if name.endswith(".latent") else rate * _size(name, p)}
        for name, p in model.named_parameters()
        if p.requires_grad
    ]


def _size(name: str, tensor: Tensor) -> float:
    if ".lora_" in name:  # a factor of what it adds, and 0 at first
        return 1.0
    return max(_SMALL, float(tensor.detach().square().mean().sqrt()))


def _unpacked(stored: Tensor, bits: int, count: int) -> Tensor:
    return unpack_4bit(stored, count) if bits == 4 else stored


def _ends(model: nn.Module) -> set[nn.Module]:
    """Token embedding and head, with their parts."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {part for end in ends if end is not None for part in end.modules()}
