"""Blocks chosen by measurement: which of those that cost about the same accuracy this machine multiplies in.

    tuned = tune_recipe(checkpoint, load_recipe("int4"))
    tuned.recipe        # the recipe with other blocks, or as it was
    tuned.to_dict()     # what was measured, and the portable choice, for the manifest

Kernels rank otherwise on other processors: blocks of 64 take 15 to 40 % less than blocks of 32 with AVX-512
VNNI, and more than symmetric ones of 32 with AVX2 alone (benchmarks/LOG.md). A recipe's own blocks are a
choice for all of them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from tqdm import tqdm

from gemini.compress.apply import settled
from gemini.compress.layers import Integers, quantized
from gemini.compress.recipe import Recipe
from gemini.compress.select import select_layers, weight_of
from gemini.compress.specs import PerBlock, QuantizeInt4, QuantizeInt8
from gemini.errors import RecipeError
from gemini.export.twins.linear import INT8_ACTIVATIONS
from gemini.export.twins.operators import CONTRIB
from gemini.model.checkpoint import Checkpoint
from gemini.runtime.session import session_options

Shapes: TypeAlias = Mapping[tuple[int, int], int]  # (K, N) of a product -> how many a token needs
Clock: TypeAlias = Callable[[Shapes, Sequence[Integers]], list[float]]

ERROR_LIMIT = 1.25  # squared error of the weights over that of the recipe's own blocks
MIN_GAIN = 0.03  # of the time: less is noise
ROUNDS = 15
SAMPLED_LAYERS = 12
# So many copies of the weights of a shape that no cache of a core holds them, as it is with a whole model.
_COPIES_BYTES = 32 << 20


@dataclass(frozen=True)
class Candidate:
    """Blocks with what they cost: seconds of all products of a token, error over that of the recipe's own."""

    blocks: Integers
    seconds: float
    error: float


@dataclass(frozen=True)
class Tuned:
    """The recipe with the chosen blocks, and how they were chosen."""

    recipe: Recipe
    portable: Integers
    chosen: Integers
    candidates: tuple[Candidate, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values for the manifest: times in milliseconds, errors relative to the portable choice's."""
        return {
            "portable": _described(self.portable),
            "chosen": _described(self.chosen),
            "candidates": [
                _described(each.blocks)
                | {"ms_per_token": round(1e3 * each.seconds, 4), "error": round(each.error, 3)}
                for each in self.candidates
            ],
        }


def tune_recipe(
    checkpoint: Checkpoint, recipe: Recipe, *, progress: bool = True, clock: Clock | None = None
) -> Tuned:
    """Measure the recipe's blocks beside others with its bits and take the fastest that are as accurate.

    Those whose rounding error on a sample of the model's layers is more than ERROR_LIMIT times that of the
    recipe's own are not considered, and a gain below MIN_GAIN changes nothing. ``clock`` measures, by default
    `product_seconds`. RecipeError where the recipe has no single kind of blocks.
    """
    specs = [settled(spec, checkpoint.family) for spec in recipe.specs]
    blocks = [found for spec in specs if (found := _blocks_of(spec)) is not None]
    if len(blocks) != 1:
        raise RecipeError(
            f"The recipe {recipe.name} has no blocks of weights to choose for this model.",
            "Tune int4 recipes, or int8 ones of generators; leave --tune out for others.",
        )
    (own,) = blocks
    shapes, layers = _products(checkpoint.model, own, specs)
    shortest = min(columns for columns, _ in shapes)  # a block that a row does not fill is padded
    others = [
        replace(own, block_size=size, symmetric=symmetric)
        for size in (16, 32, 64, 128)
        for symmetric in (True, False)
        if size <= shortest and not (symmetric and own.fit == "hqq") and (symmetric or own.bits == 4)
    ]
    formats = [own, *(each for each in others if each != own)]
    errors = [_error(layers, each) for each in formats]
    limit = ERROR_LIMIT * errors[0]
    kept = [(each, error) for each, error in zip(formats, errors, strict=True) if error <= limit]
    seconds = (clock or partial(product_seconds, progress=progress))(shapes, [each for each, _ in kept])
    candidates = tuple(
        Candidate(each, spent, error / errors[0] if errors[0] else 1.0)
        for (each, error), spent in zip(kept, seconds, strict=True)
    )
    fastest = min(candidates, key=lambda each: each.seconds)
    pays = fastest.seconds < (1 - MIN_GAIN) * candidates[0].seconds
    chosen = fastest.blocks if pays else own
    changed = tuple(_with_blocks(spec, chosen) for spec in specs)
    tuned = recipe if chosen == own else replace(recipe, name=f"{recipe.name}, tuned", specs=changed)
    return Tuned(tuned, own, chosen, candidates)


def product_seconds(shapes: Shapes, formats: Sequence[Integers], *, progress: bool = False) -> list[float]:
    """Seconds that all products of one token, a row of float32 each, take in each format on one thread.

    Random weights, the least of ROUNDS; the formats in turn, so that a change of the machine's speed meets
    all. With more threads the idle ones of the other sessions, which poll for work, would be measured.
    """
    totals = [0.0] * len(formats)
    generator = np.random.default_rng(0)
    bar = tqdm(shapes.items(), desc="time blocks", unit="shape", delay=2, leave=False, disable=not progress)
    for (columns, rows), count in bar:
        copies = min(count, max(1, _COPIES_BYTES // (columns * rows // 2)))
        sessions = [_session(columns, rows, copies, each, generator) for each in formats]
        feeds = {"x": generator.standard_normal((1, columns), np.float32)}
        times: list[list[float]] = [[] for _ in formats]
        for session in sessions:
            session.run(None, feeds)
        for _ in range(ROUNDS):
            for spent, session in zip(times, sessions, strict=True):
                start = time.perf_counter()
                session.run(None, feeds)
                spent.append(time.perf_counter() - start)
        for number, spent in enumerate(times):
            totals[number] += count / copies * min(spent)
    return totals


def _session(
    columns: int, rows: int, copies: int, form: Integers, generator: np.random.Generator
) -> ort.InferenceSession:
    """A graph of ``copies`` products of one input with weights of their own; their sum comes out."""
    blocks = -(-columns // form.block_size)
    nodes, weights = [], []
    for copy in range(copies):
        arrays = {
            "codes": generator.integers(0, 256, (rows, blocks, form.block_size * form.bits // 8), np.uint8),
            "scales": generator.standard_normal((rows, blocks), np.float32),
        }
        if not form.symmetric:
            arrays["zeros"] = generator.integers(0, 256, (rows, -(-blocks * form.bits // 8)), np.uint8)
        weights += [numpy_helper.from_array(array, f"{name}{copy}") for name, array in arrays.items()]
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                ["x", *(f"{name}{copy}" for name in arrays)],
                [f"y{copy}"],
                domain=CONTRIB,
                K=columns,
                N=rows,
                bits=form.bits,
                block_size=form.block_size,
                accuracy_level=INT8_ACTIVATIONS,
            )
        )
    nodes.append(helper.make_node("Sum", [node.output[0] for node in nodes], ["y"]))
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, rows])],
        weights,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(
        model.SerializeToString(), session_options(threads=1), providers=["CPUExecutionProvider"]
    )


def _products(model: nn.Module, own: Integers, specs: Sequence[Any]) -> tuple[Shapes, list[torch.Tensor]]:
    """How many products of each shape there are, and some of their weights (N, K), spread over the model."""
    (spec,) = [each for each in specs if _blocks_of(each) is not None]
    names = select_layers(model, own.block_size, spec.skip, None).linears
    if not names:
        raise RecipeError("The model has no linear layer to tune for.", "Leave --tune out.")
    weights = [weight_of(model.get_submodule(name)) for name in names]
    shapes = Counter((weight.shape[1], weight.shape[0]) for weight in weights)
    some = np.linspace(0, len(weights) - 1, min(len(weights), SAMPLED_LAYERS)).round().astype(int)
    return shapes, [weights[number] for number in dict.fromkeys(some.tolist())]


def _error(weights: Sequence[torch.Tensor], form: Integers) -> float:
    """Squared error of the rounded weights over their squares, summed over the weights."""
    error = total = 0.0
    for weight in weights:
        dense = weight.float()
        error += float((quantized(dense, form).dequantized() - dense).square().sum())
        total += float(dense.square().sum())
    return error / total if total else 0.0


def _blocks_of(spec: Any) -> Integers | None:
    if isinstance(spec, QuantizeInt4):
        return Integers(4, spec.block_size, spec.symmetric, spec.fit)
    if isinstance(spec, QuantizeInt8) and isinstance(spec.granularity, PerBlock):
        return Integers(8, spec.granularity.size)
    return None


def _with_blocks(spec: Any, blocks: Integers) -> Any:
    if isinstance(spec, QuantizeInt4):
        return replace(spec, block_size=blocks.block_size, symmetric=blocks.symmetric)
    if _blocks_of(spec) is not None:
        return replace(spec, granularity=PerBlock(blocks.block_size))
    return spec


def _described(blocks: Integers) -> dict[str, Any]:
    name = f"{blocks.bits}-bit blocks of {blocks.block_size}" + (
        "" if blocks.symmetric else " with zero points"
    )
    return {"name": name, "bits": blocks.bits, "block_size": blocks.block_size, "symmetric": blocks.symmetric}
