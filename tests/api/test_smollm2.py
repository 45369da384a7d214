"""SmolLM2-135M, the real thing: the fp32 bundle says what transformers says. Slow: about two minutes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gemini import pipeline
from gemini.errors import CheckpointError
from gemini.model import catalog
from gemini.model.checkpoint import load_checkpoint
from gemini.runtime import load
from gemini.runtime.options import GenerationOptions

pytestmark = pytest.mark.slow

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Three ways to save energy at home:\n1.",
    "Dear Sir or Madam,\nI am writing to",
)
# Largest difference of any logit that float32 sums in another order may make over 30 layers.
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def checkpoint():
    try:
        catalog.find("smollm2-135m")
    except CheckpointError as error:
        pytest.skip(str(error))
    return load_checkpoint("smollm2-135m")


@pytest.fixture(scope="module")
def session(checkpoint, tmp_path_factory):
    path: Path = tmp_path_factory.mktemp("smollm2") / "fp32"
    pipeline.compress_model("smollm2-135m", path, "fp32", progress=False)
    return load(path)


def test_greedy_tokens_are_those_of_transformers(checkpoint, session):
    for prompt in PROMPTS:
        ids = session.tokenizer.encode(prompt)
        ours = session.generate_ids([ids], GenerationOptions(max_new_tokens=64))[0]
        with torch.no_grad():
            expected = checkpoint.model.generate(
                torch.tensor([ids]), max_new_tokens=64, do_sample=False, pad_token_id=0
            )
        assert list(ours) == expected[0, len(ids) :].tolist(), prompt


def test_logits_of_prefill_and_decode_stay_within_tolerance(checkpoint, session):
    rows = [session.tokenizer.encode(prompt) for prompt in PROMPTS[:3]]
    for batch in (rows[:1], rows):
        decoder = session.decoder(4)
        logits = [decoder.prefill(batch).copy()]
        tokens = [list(row) for row in batch]
        for _ in range(4):
            chosen = logits[-1].argmax(-1)
            for row, token in zip(tokens, chosen, strict=True):
                row.append(int(token))
            logits.append(decoder.step(chosen).copy())
        decoder.close()
        worst = 0.0
        for row, text in enumerate(tokens):
            with torch.no_grad():
                expected = checkpoint.model(torch.tensor([text])).logits[0, -5:].numpy()
            worst = max(worst, float(np.abs(np.stack([step[row] for step in logits]) - expected).max()))
        print(f"batch {len(batch)}: largest difference {worst:.2e}")
        assert worst <= TOLERANCE
