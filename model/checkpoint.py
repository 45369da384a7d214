"""Loading a checkpoint: `load_checkpoint("smollm2-135m")`, a Hugging Face folder, or a `.gguf` file."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemini.errors import CheckpointError
from gemini.model import catalog, disk, folder, gguf_reader, text, vision
from gemini.model.gguf import check_gguf
from gemini.model.pooling import Pooling, SentenceFolder, read_sentence_folder
from gemini.model.safetensors_check import INDEX_FILE, check_weights
from gemini.model.tasks import FAMILIES, choose_task
from gemini.model.weights import Stored, load_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

__all__ = ["Checkpoint", "Pooling", "load_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A trained model in memory with all that is needed to feed it.

    Attributes:
        name: catalog name, folder name or GGUF file name without its suffix.
        task: one of ``tasks.FAMILIES``.
        family: ``decoder``, ``encoder``, ``vision`` or ``encoder-decoder``.
        model: transformers model, fp32, evaluation mode, no gradients. A decoder's
            ``generation_config.eos_token_id`` holds every token that ends a generation.
        tokenizer: fast tokenizer; None for vision.
        processor: image processor (PIL backend); None for what reads no images.
        pooling: how token states become an embedding; feature-extraction only.
        context_length: longest input in tokens; None for vision, or when nothing limits it.
        source: ``kind`` (folder, gguf, catalog), ``name``, ``sha256`` over configuration, weight and
            tokenizer files, ``licence``; ``default_prompt`` when a sentence encoder prefixes every text.
    """

    name: str
    task: str
    family: str
    model: "torch.nn.Module"
    tokenizer: "PreTrainedTokenizerFast | None"
    processor: object | None
    pooling: Pooling | None
    context_length: int | None
    source: dict[str, str]


def load_checkpoint(source: str | Path, task: str | None = None) -> Checkpoint:
    """Load a checkpoint without touching the network and without running code or pickles that come with it.

    Args:
        source: a folder with config.json and safetensors, a ``.gguf`` file, or a catalog name. A bare name
            that the catalog knows means the catalog; write ``./name`` for a folder of that name.
        task: overrides the task inferred from the checkpoint's architecture.

    Raises:
        CheckpointError: the source does not exist, is damaged, does not fit the task, or is of a kind that
            cannot be compressed; the message has the cause and the remedy.
    """
    if isinstance(source, str) and source in catalog.CATALOG:
        entry = catalog.CATALOG[source]
        path = catalog.find(source)
        origin = {"kind": "catalog", "name": source, "licence": entry.licence}
    else:
        path = _existing(source)
        origin = {"kind": "gguf" if path.is_file() else "folder", "name": path.resolve().name}
    return _load_gguf(path, task, origin) if path.is_file() else _load_folder(path, task, origin)


def _existing(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        raise CheckpointError(
            f"{path.name} is a file and not a .gguf.", "Pass the folder that holds it with its config.json."
        )
    looks_like_path = isinstance(source, Path) or "/" in source or "\\" in source or source.endswith(".gguf")
    if looks_like_path or not source:
        raise CheckpointError(
            f"There is no checkpoint at {str(source)!r}.", "Check the path; nothing is downloaded from a hub."
        )
    raise CheckpointError(
        f"There is no checkpoint {source!r}; the catalog has {', '.join(catalog.CATALOG)}.",
        catalog.suggestion(str(source)),
    )


def _load_folder(path: Path, task: str | None, origin: dict[str, str]) -> Checkpoint:
    sentence = read_sentence_folder(path)
    root = sentence.root if sentence is not None else path
    folder.check_folder(root)
    table = check_weights(root)
    config = folder.read_config(root)
    chosen = choose_task(config, path, task)
    stored = Stored(len(table.names), table.elements)
    with disk.as_float32(root, table) as weights:
        model: Any = load_model(weights, config, chosen, stored, trust_remote_code=False)
    tokenizer, processor, length = None, None, None
    if FAMILIES[chosen] == "vision" or (FAMILIES[chosen] == "encoder-decoder" and _reads_images(model)):
        processor = vision.load_processor(root)
        _check_image_size(model, processor)
    if FAMILIES[chosen] != "vision":
        rows = text.token_rows(model)
        tokenizer = text.load_tokenizer(root, rows, lowercase=sentence is not None and sentence.lowercase)
        length = text.context_length(model, tokenizer, sentence.max_tokens if sentence is not None else None)
    if "decoder" in FAMILIES[chosen]:
        text.settle_end_tokens(model, tokenizer)
    licence = origin.get("licence") or folder.read_licence(path)
    return Checkpoint(
        name=origin["name"],
        task=chosen,
        family=FAMILIES[chosen],
        model=model,
        tokenizer=tokenizer,
        processor=processor,
        pooling=_pooling(chosen, sentence),
        context_length=length,
        source={
            **origin,
            "licence": licence,
            "sha256": _hash_folder(path, root, table.files),
            **({"default_prompt": sentence.prompt} if sentence is not None and sentence.prompt else {}),
        },
    )


def _load_gguf(path: Path, task: str | None, origin: dict[str, str]) -> Checkpoint:
    header = check_gguf(path)
    with gguf_reader.one_reader(path):
        config = gguf_reader.read_config(path, header)
        chosen = choose_task(config, None, task)
        model: Any = load_model(
            path.parent, config, chosen, header.stored, **gguf_reader.loading_options(path)
        )
        disk.settle(model, header.stored.elements)
        rows = model.get_input_embeddings().num_embeddings
        tokenizer = text.load_tokenizer(path.parent, rows, gguf_file=path.name)
    if chosen == "text-generation":
        text.settle_end_tokens(model, tokenizer, gguf_reader.further_end_tokens(header))
    licence = origin.get("licence") or str(header.metadata.get("general.license", "unknown"))
    return Checkpoint(
        name=origin["name"] if origin["kind"] == "catalog" else path.stem,
        task=chosen,
        family=FAMILIES[chosen],
        model=model,
        tokenizer=tokenizer,
        processor=None,
        pooling=_pooling(chosen, None),
        context_length=text.context_length(model, tokenizer),
        source={**origin, "licence": licence, "sha256": folder.hash_files(path.parent, [path])},
    )


def _pooling(task: str, sentence: SentenceFolder | None) -> Pooling | None:
    if task != "feature-extraction":
        return None
    return sentence.pooling if sentence is not None else Pooling("mean", normalize=False, declared=False)


def _reads_images(model: Any) -> bool:
    return model.main_input_name == "pixel_values" or hasattr(model, "get_image_features")


def _check_image_size(model: Any, processor: object) -> None:
    """The pixels that the processor makes must be the pixels that the model takes."""
    import torch

    height, width = vision.output_size(vision.normalized_preprocessor(processor))
    encode = getattr(model, "get_image_features", None)
    if encode is None:
        encode = model.get_encoder() if model.config.is_encoder_decoder else model
    try:
        with torch.inference_mode():
            encode(pixel_values=torch.zeros(1, 3, height, width))
    except Exception as error:  # any type: each architecture checks its input in its own way
        raise CheckpointError(
            f"The model does not take the {height}x{width} RGB images that its processor makes.",
            "Use the preprocessor_config.json that was saved with this model.",
        ) from error


def _hash_folder(path: Path, root: Path, weights: tuple[Path, ...]) -> str:
    names = ("config.json", "generation_config.json", "sentence_bert_config.json", INDEX_FILE)
    files = [root / name for name in (*names, *text.TOKENIZER_FILES, *vision.PROCESSOR_FILES)]
    modules = [path / "modules.json", path / "config_sentence_transformers.json", *path.glob("*/config.json")]
    return folder.hash_files(path, {*files, *modules, *weights})
