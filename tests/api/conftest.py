"""The toy bundles of tests/runtime, with a report inside, as the command line meets them."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gemini.benchmarks.text import default_text
from gemini.model.gemini import (
    TASKS,
    GeminiConfig,
    GeminiForConditionalGeneration,
    GeminiImageProcessor,
    train_tokenizer,
)
from gemini.pipeline import compress_model

TABLE = [
    {"name": "fp32", "size_mb": 538.1, "perplexity": 20.0},
    {"name": "bundle", "size_mb": 91.25, "perplexity": 22.5, "kl": 0.1},
]


def load_toys() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "runtime" / "conftest.py"
    spec = importlib.util.spec_from_file_location("runtime_toys", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{kind: bundle folder}: two generators, an embedder, two classifiers, an encoder-decoder with images."""
    make, root = load_toys(), tmp_path_factory.mktemp("bundles")
    paths = {
        "shared": make.make_decoder(root / "shared", "shared").path,
        "concat": make.make_decoder(root / "concat", "concat").path,
        "embedder": make.make_encoder(root / "embedder", "feature-extraction").path,
        "classifier": make.make_encoder(root / "classifier", "text-classification").path,
        "vision": make.make_vision(root / "vision").path,
        "pair": make.make_pair(root / "pair").path,
    }
    paths["reported"] = add_report(make, paths["shared"], root / "reported")
    return paths


def add_report(make: ModuleType, source: Path, target: Path) -> Path:
    """The same bundle with everything that `compress` adds to a manifest."""
    manifest = json.loads((source / "manifest.json").read_text())
    files = {name: (source / name).read_bytes() for name in manifest.pop("files")}
    files["report.json"] = json.dumps({"table": TABLE}).encode()
    extra: dict[str, Any] = {
        "name": "toy",
        "recipe": {"name": "int4", "specs": [{"type": "int4", "block_size": 64}]},
        "passes": [
            {
                "type": "int4",
                "options": {"block_size": 64},
                "layers": [{"name": "q"}],
                "skipped": [{"name": "conv", "reason": "convolutions stay fp32"}],
                "bits_per_weight": 4.5,
            }
        ],
        "provenance": {"source": {"kind": "folder", "name": "toy"}, "tools": {"torch": "2.13.0"}},
        "bytes": {"embedding": 1000, "attention": 2_000_000},
        "fusions": {"skip_norm": 3},
        "requirements": {"onnxruntime": "1.31", "operators": ["com.microsoft::GroupQueryAttention"]},
    }
    manifest.pop("digest")
    path: Path = make.write_bundle(target, manifest | extra, files)
    return path


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("images") / "cat.png"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture(scope="session")
def gemini_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Gemini, as training leaves it."""
    path = tmp_path_factory.mktemp("gemini")
    train_tokenizer([default_text().calibration[:20000]], vocab_size=400).save_pretrained(path)
    GeminiImageProcessor(size={"height": 16, "width": 16}).save_pretrained(path)
    torch.manual_seed(0)
    config = GeminiConfig(
        vocab_size=400,
        hidden_size=64,
        encoder_layers=1,
        decoder_layers=1,
        num_attention_heads=2,
        intermediate_size=96,
        image_size=16,
        image_channels=(16, 16, 32),
        max_position_embeddings=128,
        task_specific_params=TASKS,
    )
    GeminiForConditionalGeneration(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def gemini_bundle(gemini_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 bundle of the tiny random Gemini."""
    bundle = tmp_path_factory.mktemp("bundles") / "gemini"
    compress_model(str(gemini_folder), bundle, "fp32", progress=False)
    return bundle
