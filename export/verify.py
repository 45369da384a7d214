"""Compare an exported graph with the torch module that it came from.

The graph runs in float32 arithmetic (see float_compute) with onnxruntime and numpy feeds, over the shapes
that serving meets: prefill of unequal rows, several decode steps, a chunk of one sequence, one token.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from gemini.compress.cache import rounded
from gemini.errors import VerificationError
from gemini.export import stages
from gemini.export.forms import Form
from gemini.export.graphs import sample_inputs
from gemini.model.checkpoint import Checkpoint
from gemini.runtime import kernels
from gemini.runtime.checks import CACHE_DTYPES
from gemini.runtime.schema import LayerShape
from gemini.runtime.threads import usable_threads

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Largest difference of logits allowed, relative to the largest logit (at least 1): float32 sums in another
# order over a few dozen layers differ by some 1e-5; every real mistake that we have met was above 1e-2.
TOLERANCE = 1e-3
# A key at the border between two codes may get either of them: one of 127 steps in one channel of one token.
CODES_TOLERANCE = 1e-2
# The same of graphs in half precision. The first token of a text has activations of some thousands in many
# models (arXiv:2402.17762), which 11 bits hold to 1: its logits are off by up to 2 %, others by 0.2 %.
HALF_TOLERANCE = 5e-2
STEPS = 3
GREEDY = 8


@dataclass(frozen=True)
class Case:
    """One comparison: largest absolute difference of logits, the largest logit for scale, what is allowed,
    and the root of the mean square of all differences."""

    name: str
    batch: int
    past: int
    new: int
    difference: float
    magnitude: float
    tolerance: float
    typical: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance * max(1.0, self.magnitude)  # false for NaN


@dataclass
class Verification:
    """What was compared; goes into the manifest."""

    form: str
    cases: list[Case] = field(default_factory=list)
    greedy_tokens: int = 0
    tolerance: float = TOLERANCE

    @property
    def largest_difference(self) -> float:
        return max((case.difference for case in self.cases), default=0.0)

    @property
    def typical_difference(self) -> float:
        """The root of the mean square of differences, every case as much as the others."""
        return float(np.sqrt(np.mean([case.typical**2 for case in self.cases])))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "largest_difference": self.largest_difference}

    def record(
        self,
        name: str,
        shape: tuple[int, int, int],
        actual: np.ndarray,
        expected: np.ndarray,
        tolerance: float = 0.0,
    ) -> None:
        """Add a case; VerificationError if it is out of its tolerance and of that of all cases."""
        difference = float(np.abs(actual - expected).max())
        allowed = max(tolerance, self.tolerance)
        typical = float(np.sqrt(np.mean(np.square(actual - expected, dtype=np.float64))))
        case = Case(name, *shape, difference, float(np.abs(expected).max()), allowed, typical)
        self.cases.append(case)
        if not case.passed:
            raise VerificationError(
                f"The graph differs from torch by {difference:.3g} in {name} (batch, past, new = {shape}).",
                "This form of the model is wrong; please report the architecture.",
            )


def open_graph(path: Path) -> Any:
    """An onnxruntime session for a graph under test, on CPU with every core."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Packed matrices of floats take their memory twice and save nothing in short runs. Blocks of codes that
    # were not packed once are unpacked by every run, the head's too: 1.1 s a step of SmolLM2 instead of 0.1.
    nodes = onnx.load(path, load_external_data=False).graph.node
    in_blocks = any(node.op_type == "MatMulNBits" for node in nodes)
    if any(node.domain == stages.DOMAIN for node in nodes):
        kernels.register(options, usable_threads())
    options.add_session_config_entry("session.disable_prepacking", "0" if in_blocks else "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def verify_decoder(
    path: Path, checkpoint: Checkpoint, form: Form, layers: list[LayerShape], tolerance: float = TOLERANCE
) -> Verification:
    """Prefill (ragged if the form allows), decode steps, a chunk, greedy tokens."""
    verification = Verification(str(form), tolerance=tolerance)
    session = open_graph(path)
    ids = sample_inputs(checkpoint, batch=3, length=12)["input_ids"].numpy()
    expected = [_torch_logits(checkpoint, row) for row in ids]
    lengths = [9, 5, 1] if form.shared_cache else [9, 9, 9]

    run = DecoderRun(session, form, layers, batch=3, capacity=ids.shape[1])
    logits = run(ids[:, : max(lengths)], lengths)
    for row, length in enumerate(lengths):
        name = f"prefill, row {row} of {length} tokens"
        verification.record(name, (3, 0, max(lengths)), logits[row, :length], expected[row][:length])
    for step in range(STEPS):
        at = [length + step for length in lengths]
        logits = run(np.stack([ids[r, a : a + 1] for r, a in enumerate(at)]), [a + 1 for a in at])
        reference = np.stack([expected[r][a : a + 1] for r, a in enumerate(at)])
        verification.record(f"decode step {step}", (3, at[0], 1), logits, reference)

    run = DecoderRun(session, form, layers, batch=1, capacity=ids.shape[1] + GREEDY)
    logits = run(ids[:1, :7], [7])
    verification.record("prefill of one row", (1, 0, 7), logits[0], expected[0][:7])
    logits = run(ids[:1, 7:], [ids.shape[1]])
    verification.record("chunk of one row", (1, 7, 5), logits[0], expected[0][7:])
    verification.greedy_tokens = verify_greedy(
        run, lambda tokens: _torch_logits(checkpoint, tokens), ids[0], logits[0, -1], tolerance
    )
    return verification


def verify_greedy(
    run: DecoderRun,
    torch_logits: Callable[[np.ndarray], np.ndarray],
    prompt: np.ndarray,
    logits: np.ndarray,
    tolerance: float,
) -> int:
    """Generate with the graph, then let torch score the text: its best tokens must be the same."""
    tokens = list(prompt)
    for _ in range(GREEDY):
        tokens.append(int(logits.argmax()))
        logits = run(np.array([tokens[-1:]]), [len(tokens)])[0, -1]
    reference = torch_logits(np.array(tokens))[len(prompt) - 1 : -1]
    chosen = np.array(tokens[len(prompt) :])
    margin = reference.max(-1) - reference[np.arange(GREEDY), chosen]
    if (margin > tolerance * max(1.0, float(np.abs(reference).max()))).any():
        raise VerificationError(
            "Greedy generation with the graph leaves the tokens that torch prefers.",
            "This form of the model is wrong; please report the architecture.",
        )
    return GREEDY


class RoundedCache(DynamicCache):
    """torch's cache, whose keys and values are rounded as the graph rounds them."""

    def __init__(self, scales: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self.scales = scales

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (
            rounded(x, s) for x, s in zip((key_states, value_states), self.scales[layer_idx], strict=True)
        )
        return super().update(keys, values, layer_idx, *args, **kwargs)


def verify_cache(
    path: Path,
    checkpoint: Checkpoint,
    form: Form,
    layers: list[LayerShape],
    scales: Sequence[tuple[torch.Tensor, torch.Tensor]],
    verification: Verification,
) -> None:
    """A decoder with an 8-bit cache: ragged prefill, a step, a chunk, against torch with `RoundedCache`."""
    session = open_graph(path)
    ids = sample_inputs(checkpoint, batch=2, length=12)["input_ids"].numpy()
    expected = [_torch_logits(checkpoint, row, RoundedCache(scales)) for row in ids]
    run = DecoderRun(session, form, layers, batch=2, capacity=ids.shape[1])
    logits = run(ids[:, :9], [9, 5])
    for row, length in enumerate((9, 5)):
        verification.record(
            f"8-bit cache, row {row} of {length} tokens",
            (2, 0, 9),
            logits[row, :length],
            expected[row][:length],
            CODES_TOLERANCE,
        )
    logits = run(np.stack([ids[0, 9:10], ids[1, 5:6]]), [10, 6])
    reference = np.stack([expected[0][9:10], expected[1][5:6]])
    verification.record("8-bit cache, decode step", (2, 9, 1), logits, reference, CODES_TOLERANCE)
    run = DecoderRun(session, form, layers, batch=1, capacity=ids.shape[1])
    run(ids[:1, :7], [7])
    logits = run(ids[:1, 7:], [ids.shape[1]])
    verification.record("8-bit cache, chunk", (1, 7, 5), logits[0], expected[0][7:], CODES_TOLERANCE)


class DecoderRun:
    """Feeds a decoder graph the way the runtime does, with plain arrays; ``constants`` go into every call."""

    def __init__(
        self,
        session: Any,
        form: Form,
        layers: list[LayerShape],
        batch: int,
        capacity: int,
        constants: dict[str, np.ndarray] | None = None,
    ) -> None:
        self.session, self.constants = session, constants or {}
        types = {node.name: node.type for node in session.get_inputs()}
        dtype = CACHE_DTYPES[types["past.0.key"]]
        past = capacity if form.shared_cache else 0
        self.cache: dict[str, np.ndarray] = {
            f"past.{i}.{part}": np.zeros((batch, layer.kv_heads, past, width), dtype)
            for i, layer in enumerate(layers)
            for part, width in (("key", layer.key_dim), ("value", layer.value_dim))
        }
        self.outputs = [output.name for output in session.get_outputs()]

    def __call__(self, ids: np.ndarray, lengths: list[int]) -> np.ndarray:
        batch, new = ids.shape
        feeds = {
            "input_ids": ids.astype(np.int64),
            "seqlens_k": np.array(lengths, np.int32) - 1,
            "total_sequence_length": np.array(max(lengths), np.int32),
            "logit_positions": np.tile(np.arange(new), (batch, 1)),
        }
        feeds |= self.constants
        results = dict(zip(self.outputs, self.session.run(None, {**feeds, **self.cache}), strict=True))
        self.cache = {name: results[name.replace("past", "present", 1)] for name in self.cache}
        return results["logits"]


def _torch_logits(checkpoint: Checkpoint, row: np.ndarray, cache: DynamicCache | None = None) -> np.ndarray:
    with torch.no_grad():
        output = checkpoint.model(input_ids=torch.from_numpy(row[None]), past_key_values=cache)
    return output.logits[0].float().numpy()


def verify_encoder(
    path: Path, checkpoint: Checkpoint, form: Form, reference: torch.nn.Module, tolerance: float = TOLERANCE
) -> Verification:
    """Batches of one and three, with and without padding; ``reference`` pools as the graph does."""
    verification = Verification(str(form), tolerance=tolerance)
    session = open_graph(path)
    for batch, length, kept in ((3, 11, (11, 6, 1)), (1, 8, (8,)), (2, 2, (2, 2))):
        inputs = sample_inputs(checkpoint, batch, length)
        for row, count in enumerate(kept):
            inputs["attention_mask"][row, count:] = 0
        name = f"padded to {length}, rows of {kept}"
        _compare(verification, session, inputs, reference, name)
    return verification


def verify_vision(
    path: Path, checkpoint: Checkpoint, form: Form, reference: torch.nn.Module, tolerance: float = TOLERANCE
) -> Verification:
    """Batches of one and three."""
    verification = Verification(str(form), tolerance=tolerance)
    session = open_graph(path)
    for batch in (1, 3):
        _compare(verification, session, sample_inputs(checkpoint, batch), reference, f"{batch} images")
    return verification


def _compare(
    verification: Verification,
    session: Any,
    inputs: dict[str, torch.Tensor],
    reference: Callable[..., torch.Tensor],
    name: str,
) -> None:
    with torch.no_grad():
        expected = reference(*inputs.values()).float().numpy()
    (actual,) = session.run(None, {k: v.numpy() for k, v in inputs.items()})
    first = next(iter(inputs.values()))
    verification.record(name, (first.shape[0], 0, first.shape[1]), actual, expected)
