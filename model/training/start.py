"""What a run starts from, and the Hugging Face folder it ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gemini.errors import CheckpointError
from gemini.model.gemini import (
    LABELS,
    TASK_PREFIXES,
    GeminiConfig,
    GeminiForConditionalGeneration,
    GeminiForImageClassification,
    GeminiForSequenceClassification,
    GeminiImageProcessor,
    GeminiTokenizer,
    train_tokenizer,
)
from gemini.model.training.corpus import Corpus, all_texts
from gemini.model.training.options import TrainingOptions

_HEADS = {
    "generation": GeminiForConditionalGeneration,
    "classification": GeminiForSequenceClassification,
    "regression": GeminiForSequenceClassification,
    "image-classification": GeminiForImageClassification,
}

# Without it 4 to 10 of 64 stories of gemini-nano run in a circle, with 1.05 one, with this none; and as many
# captions are right.
REPETITION_PENALTY = 1.1


def load_tokenizer(options: TrainingOptions, folder: Path, cache: Path) -> Any:
    """The tokenizer of the run resumed, of the checkpoint started from, or a new one; kept in ``folder``.

    A new one learns from all texts in the cache, whichever of them the recipe reads, so that later runs can
    start from this one. None where nothing is read.
    """
    if options.head == "image-classification":
        return None
    if (folder / "tokenizer.json").exists():
        return GeminiTokenizer.from_pretrained(folder, local_files_only=True)
    if options.start and not _is_tower(options.start):
        tokenizer = GeminiTokenizer.from_pretrained(options.start, local_files_only=True)
    else:
        tokenizer = train_tokenizer(all_texts(cache), options.vocabulary)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(options: TrainingOptions, tokenizer: Any, corpus: Corpus) -> Any:
    """A model of the recipe's size with random weights, or the checkpoint's with the recipe's head.

    Of a checkpoint that classifies images only the convolutional tower is taken.
    """
    head = _HEADS[options.head]
    labels = _outputs(options.head, corpus)
    from_tower = bool(options.start) and _is_tower(options.start)
    if options.start and from_tower == (options.head == "image-classification"):
        # What the head before told apart may be something else: then it starts anew.
        config = GeminiConfig.from_pretrained(options.start, local_files_only=True, **labels)
        before = GeminiConfig.from_pretrained(options.start, local_files_only=True)
        return head.from_pretrained(
            options.start,
            config=config,
            local_files_only=True,
            dtype=torch.float32,  # a published checkpoint has half precision
            ignore_mismatched_sizes=config.num_labels != before.num_labels,
        )
    vocabulary = {}
    if tokenizer is not None:
        vocabulary = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "decoder_start_token_id": tokenizer.bos_token_id,
            "task_specific_params": TASK_PREFIXES,
        }
    shape = {"fusion": options.fusion, **vocabulary, **labels, **options.model}
    model = head(GeminiConfig.sized(options.size, **shape))
    if from_tower:
        _copy_tower(model, options.start)
    return model


def _outputs(head: str, corpus: Corpus) -> dict[str, Any]:
    """What a head tells apart, as fields of the configuration."""
    if head == "regression":
        return {"num_labels": corpus.thoughts[1].shape[1], "problem_type": "regression"}
    classes = {"classification": tuple(LABELS), "image-classification": corpus.names}.get(head)
    if classes is None:
        return {}
    numbered = dict(enumerate(classes))
    return {
        "id2label": numbered,
        "label2id": {name: index for index, name in numbered.items()},
        "problem_type": None,
    }


def _copy_tower(model: Any, folder: str) -> None:
    """The image embedder of a checkpoint that classifies images, into a model that reads images."""
    image = model.get_encoder().image
    tower = GeminiForImageClassification.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    ).image
    try:
        image.load_state_dict(tower.state_dict())
    except RuntimeError as error:
        raise CheckpointError(
            f"The tower of {folder} does not fit: {str(error).splitlines()[-1].strip()}",
            "Train it with the same `size`, `image_channels` and `image_size`.",
        ) from error


def load_checkpoint(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a finished run, ready to be judged."""
    _check_checkpoint(str(folder))
    config = GeminiConfig.from_pretrained(folder, local_files_only=True)
    head = next(head for head in _HEADS.values() if head.__name__ in (config.architectures or ()))
    model = head.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    if head is GeminiForImageClassification:
        return model, None
    return model, GeminiTokenizer.from_pretrained(folder, local_files_only=True)


def save_final(model: Any, tokenizer: Any, folder: Path) -> None:
    """config.json, model.safetensors, generation_config.json, tokenizer's files, preprocessor_config.json."""
    if model.can_generate():
        model.generation_config.repetition_penalty = REPETITION_PENALTY
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    side = model.config.image_size
    GeminiImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)


def _is_tower(folder: str) -> bool:
    """Whether a checkpoint classifies images and does nothing else."""
    _check_checkpoint(folder)
    config = GeminiConfig.from_pretrained(folder, local_files_only=True)
    return GeminiForImageClassification.__name__ in (config.architectures or ())


def _check_checkpoint(folder: str) -> None:
    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no checkpoint (there is no config.json).",
            "Give the output folder of a finished `gemini-edge train`.",
        )
