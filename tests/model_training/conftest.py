"""A data cache of a few invented examples, and a recipe that trains a tiny model on it in a second."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gemini.model.data.build import SCHEMA_VERSION
from gemini.model.training.corpus import Corpus, load_corpus
from gemini.model.training.options import TrainingOptions
from gemini.model.training.start import load_tokenizer, make_model

COLOURS = {"red": "红", "green": "绿", "blue": "蓝", "black": "黑"}
SHAPES = {"circle": "圆", "square": "方"}
TABLE = {
    "name": "tiny",
    "steps": 8,
    "learning_rate": 3e-3,
    "warmup": 2,
    "save_every": 2,
    "evaluate_every": 4,
    "vocabulary": 400,
    "encoder_tokens": 32,
    "decoder_tokens": 32,
    "model": {
        "hidden_size": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_channels": [4, 8, 16],
    },
    "tasks": {
        "caption": {"batch": 4, "label_smoothing": 0.1},
        "continue": {"batch": 2},
        "denoise": {"batch": 2, "every": 2},
        "classify": {"batch": 4, "noise": 0.1},
    },
}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files of a cache, in the form that `gemini-edge data` writes."""
    folder = tmp_path_factory.mktemp("cache")
    generator = np.random.default_rng(0)
    drawings, pixels = [], []
    for split in ("train", "valid", "test", "unseen"):
        for colour, zh_colour in COLOURS.items():
            for shape, zh_shape in SHAPES.items():
                drawings.append(
                    {"set": split, "key": colour, "en": f"{colour} {shape}", "zh": zh_colour + zh_shape}
                    | {"split": split}
                )
                pixels.append(generator.integers(0, 256, (64, 64, 4), dtype=np.uint8))
    np.save(folder / "drawings.npy", np.stack(pixels))
    words = {"en": (["bad", "poor", "sad"], ["good", "fine", "glad"]), "zh": (["差", "坏"], ["好", "棒"])}
    reviews = [
        {"text": " ".join(generator.choice(words[language][label], 6)) + f" {split} {index}", "label": label}
        | {"language": language, "split": split}
        for split in ("train", "valid", "test")
        for language in words
        for label in (0, 1)
        for index in range(8)
    ]
    nouns = ["bird", "boat", "tree", "house", "river", "song", "apple", "stone", "lamp", "cloud", "bear"]
    texts = [
        {"text": " ".join(f"The {a} saw a {b}." for a, b in generator.choice(nouns, (6, 2))), "split": split}
        | {"source": "invented"}
        for split in ("train", "valid", "test")
        for _ in range(6)
    ]
    for name, rows in (("drawings", drawings), ("sentiment", reviews), ("text", texts)):
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "sources.json").write_text(json.dumps({"schema_version": SCHEMA_VERSION}))
    return folder


@pytest.fixture(scope="session")
def options() -> TrainingOptions:
    return TrainingOptions.from_dict(TABLE)


@pytest.fixture(scope="session")
def corpus(cache: Path, options: TrainingOptions) -> Corpus:
    return load_corpus(cache, "train", options.tasks)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, options: TrainingOptions, cache: Path):
    return load_tokenizer(options, tmp_path_factory.mktemp("tokenizer"), cache)


@pytest.fixture
def model(options: TrainingOptions, tokenizer, corpus: Corpus):
    torch.manual_seed(0)
    return make_model(options, tokenizer, corpus).eval()


@pytest.fixture
def one_thread():
    """Sums in one order, whatever machine the test runs on."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
