"""Bundles of random Llamas of several sizes, for speed and memory alone.

    python -m gemini.random_bundles FOLDER

4-bit blocks of 64 with zero points, rounded to nearest; `gemini.benchmarks.scaling` measures them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gemini.compress.apply import run_recipe
from gemini.compress.recipe import Recipe
from gemini.compress.specs import QuantizeInt4
from gemini.errors import GeminiEdgeError
from gemini.export.bundle import check_output, commit, describe, staging, write_companions, write_manifest
from gemini.export.exporter import export_checkpoint
from gemini.model.checkpoint import Checkpoint

# (hidden, inner, layers, heads, key/value heads): two have the shapes of SmolLM2-135M and -360M, the last
# that of Llama 3.2 1B but for its table.
SIZES = {
    "20m": (256, 768, 8, 4, 2),
    "50m": (384, 1024, 16, 6, 2),
    "135m": (576, 1536, 30, 9, 3),
    "360m": (960, 2560, 32, 15, 5),
    "700m": (1536, 4608, 26, 24, 8),
    "1b": (2048, 8192, 16, 32, 8),
}
VOCABULARY = 49_152
RECIPE = Recipe("int4, nearest", (QuantizeInt4(fit="nearest"),))


def random_checkpoint(name: str) -> Checkpoint:
    """A Llama with seeded random weights, whose tokens are the numbers below VOCABULARY."""
    hidden, inner, layers, heads, kv_heads = SIZES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    words = Tokenizer(models.WordLevel({str(token): token for token in range(VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    source = {"kind": "random", "name": name, "sha256": "", "licence": "none: random numbers"}
    return Checkpoint(
        f"random-{name}", "text-generation", "decoder", model, tokenizer, None, None, 4096, source
    )


def make_bundle(name: str, output: Path) -> None:
    """Quantize, export and write one of ``SIZES``."""
    check_output(output, force=True)
    checkpoint = random_checkpoint(name)
    with staging(output) as folder:
        run_recipe(checkpoint, RECIPE, None, progress=False)
        exported = export_checkpoint(checkpoint, folder, progress=False)
        write_companions(checkpoint, folder)
        write_manifest(folder, describe(checkpoint, exported) | {"recipe": RECIPE.to_dict()})
        commit(folder, output)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make every size in the folder."""
    parser = argparse.ArgumentParser(prog="python -m gemini.random_bundles", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    folder = parser.parse_args(arguments).folder
    try:
        for name in tqdm(SIZES, desc="bundles", disable=None):
            make_bundle(name, folder / name)
    except GeminiEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"next: python -m gemini.benchmarks.scaling {' '.join(str(folder / name) for name in SIZES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
