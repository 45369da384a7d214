"""What a run starts from, and the Hugging Face folder it ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemini.errors import CheckpointError
from gemini.model.gemini import (
    LABELS,
    TASK_PREFIXES,
    GeminiConfig,
    GeminiForConditionalGeneration,
    GeminiForSequenceClassification,
    GeminiImageProcessor,
    GeminiTokenizer,
    train_tokenizer,
)
from gemini.model.training.corpus import Corpus
from gemini.model.training.options import TrainingOptions


def load_tokenizer(options: TrainingOptions, folder: Path, corpus: Corpus) -> Any:
    """The tokenizer of the run resumed, of the checkpoint started from, or a new one; kept in ``folder``."""
    if (folder / "tokenizer.json").exists():
        return GeminiTokenizer.from_pretrained(folder, local_files_only=True)
    if options.start:
        _check_checkpoint(options.start)
        tokenizer = GeminiTokenizer.from_pretrained(options.start, local_files_only=True)
    else:
        tokenizer = train_tokenizer(corpus.all_texts(), options.vocabulary)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(options: TrainingOptions, tokenizer: Any) -> Any:
    """A model of the recipe's size with random weights, or the checkpoint's with the recipe's head."""
    heads = {
        "generation": GeminiForConditionalGeneration,
        "classification": GeminiForSequenceClassification,
    }
    labels: dict[str, Any] = {}
    if options.head == "classification":
        names = dict(enumerate(LABELS))
        labels = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    if options.start:
        return heads[options.head].from_pretrained(options.start, local_files_only=True, **labels)
    config = GeminiConfig.sized(
        options.size,
        **{
            "fusion": options.fusion,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "decoder_start_token_id": tokenizer.bos_token_id,
            "task_specific_params": TASK_PREFIXES,
            **labels,
            **options.model,
        },
    )
    return heads[options.head](config)


def load_checkpoint(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a finished run, ready to be judged."""
    _check_checkpoint(str(folder))
    config = GeminiConfig.from_pretrained(folder, local_files_only=True)
    classifies = "GeminiForSequenceClassification" in (config.architectures or ())
    head = GeminiForSequenceClassification if classifies else GeminiForConditionalGeneration
    model = head.from_pretrained(folder, local_files_only=True).eval()
    return model, GeminiTokenizer.from_pretrained(folder, local_files_only=True)


def save_final(model: Any, tokenizer: Any, folder: Path) -> None:
    """config.json, model.safetensors, the tokenizer's files, preprocessor_config.json."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = model.config.image_size
    GeminiImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)


def _check_checkpoint(folder: str) -> None:
    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no checkpoint (there is no config.json).",
            "Give the output folder of a finished `gemini-edge train`.",
        )
