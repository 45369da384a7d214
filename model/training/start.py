"""What a run starts from, and the Hugging Face folder it ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gemini.errors import CheckpointError
from gemini.model.gemini import (
    LABELS,
    TASKS,
    GeminiConfig,
    GeminiForConditionalGeneration,
    GeminiForImageClassification,
    GeminiForSequenceClassification,
    GeminiImageProcessor,
    GeminiTokenizer,
    train_tokenizer,
)
from gemini.model.gemini.embedders import ImageEmbedder
from gemini.model.training.corpus import Corpus, all_texts
from gemini.model.training.options import TrainingOptions
from gemini.model.training.tasks import encode

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

    Of a checkpoint that classifies images only the convolutional tower and its prototypes are taken.
    """
    head = _HEADS[options.head]
    labels = _outputs(options, corpus)
    before = _read_config(options.start) if options.start else GeminiConfig()
    if options.start and not _is_new(options):
        model = _continued(head, options.start, before, labels)
    else:
        vocabulary = {}
        if tokenizer is not None:
            vocabulary = {
                "vocab_size": len(tokenizer),
                "pad_token_id": tokenizer.pad_token_id,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "decoder_start_token_id": tokenizer.bos_token_id,
                "task_specific_params": TASKS,
            }
        kept = {"image_prototypes": before.image_prototypes}
        shape = {"fusion": options.fusion, **vocabulary, **kept, **labels, **options.model}
        model = head(GeminiConfig.sized(options.size, **shape))
        if options.start:
            _copy_tower(model, options.start)
    if head is GeminiForConditionalGeneration and head.__name__ not in (before.architectures or ()):
        _name_prototypes(model, tokenizer, corpus)
    return model


def _is_new(options: TrainingOptions) -> bool:
    """Whether a model takes no more than a tower from the checkpoint it starts from: the kinds differ."""
    return options.prototypes or _is_tower(options.start) != (options.head == "image-classification")


def _continued(head: Any, folder: str, before: GeminiConfig, labels: dict[str, Any]) -> Any:
    """The checkpoint with this head."""
    config = _read_config(folder, **labels)
    return head.from_pretrained(
        folder,
        config=config,
        local_files_only=True,
        dtype=torch.float32,  # a published checkpoint has half precision
        # What the head before told apart may be something else: then it starts anew.
        ignore_mismatched_sizes=config.num_labels != before.num_labels,
    )


def _read_config(folder: str, **changes: Any) -> GeminiConfig:
    _check_checkpoint(folder)
    return GeminiConfig.from_pretrained(folder, local_files_only=True, **changes)


def _outputs(options: TrainingOptions, corpus: Corpus) -> dict[str, Any]:
    """What a head tells apart, as fields of the configuration."""
    if options.head == "regression":
        return {"num_labels": corpus.thoughts[1].shape[1], "problem_type": "regression"}
    classes = {"classification": tuple(LABELS), "image-classification": corpus.names}.get(options.head)
    if classes is None:
        return {}
    numbered = dict(enumerate(classes))
    return {
        "id2label": numbered,
        "label2id": {name: index for index, name in numbered.items()},
        "problem_type": None,
        **({"image_prototypes": len(classes)} if options.prototypes else {}),
    }


def image_embedder(model: Any) -> ImageEmbedder:
    """The part of a model of the family that sees."""
    return model.image if isinstance(model, GeminiForImageClassification) else model.get_encoder().image


def freeze_tower(model: Any) -> None:
    """Keep the tower, and where names are not what is learnt, what prototypes are recognized by."""
    image = image_embedder(model)
    image.tower.requires_grad_(False)
    if image.prototypes is not None and not isinstance(model, GeminiForImageClassification):
        image.prototypes.requires_grad_(False)
        image.prototypes.values.requires_grad_(True)


def _copy_tower(model: Any, folder: str) -> None:
    """The tower of a checkpoint that classifies images, and its prototypes, into a model that sees."""
    image = image_embedder(model)
    source = GeminiForImageClassification.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    ).image
    try:
        image.tower.load_state_dict(source.tower.state_dict())
        if image.prototypes is not None and source.prototypes is not None:
            image.prototypes.load_state_dict(source.prototypes.state_dict())
    except RuntimeError as error:
        raise CheckpointError(
            f"The tower of {folder} does not fit: {str(error).splitlines()[-1].strip()}",
            "Train it with the same `size`, `image_channels` and `image_size`.",
        ) from error


@torch.no_grad()
def _name_prototypes(model: Any, tokenizer: Any, corpus: Corpus) -> None:
    """Start the vector of each prototype as the sum of the tokens of its names: decoders soon learn to spell
    that. From random vectors it would have to learn nearly two thousand names one by one.
    """
    prototypes = image_embedder(model).prototypes
    if prototypes is None or not len(corpus.drawings):
        return
    count = prototypes.values.in_features
    if count != len(corpus.names):
        raise CheckpointError(
            f"The checkpoint tells {count} names apart, the data have {len(corpus.names)}.",
            "Train it anew with `gemini-edge train recall` on these data.",
        )
    both = {en: f"{en} {zh}" for en, zh in zip(corpus.drawings.en, corpus.drawings.zh, strict=True)}
    table, scale = model.get_input_embeddings().weight, model.get_encoder().text.scale
    for number, name in enumerate(corpus.names):
        ids = encode(tokenizer, [both[name]])[0]
        prototypes.values.weight[:, number] = scale * table[ids].sum(0) / len(ids) ** 0.5


def load_checkpoint(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a finished run, ready to be judged."""
    config = _read_config(str(folder))
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
    return GeminiForImageClassification.__name__ in (_read_config(folder).architectures or ())


def _check_checkpoint(folder: str) -> None:
    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no checkpoint (there is no config.json).",
            "Give the output folder of a finished `gemini-edge train`.",
        )
