"""Building the torch model from checked weights, and the checks that only a built model allows."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemini.errors import CheckpointError
from gemini.model.offline import first_line
from gemini.model.tasks import FAMILIES, fitting_tasks, model_class
from gemini.model.vision import pixel_shape

if TYPE_CHECKING:
    import torch

# A model may be a little larger than its file (tied weights, buffers, a pooler that was never saved), but one
# that is several times larger comes from a configuration that does not belong to the file.
_MAX_GROWTH = 4
_SLACK_ELEMENTS = 64 * 2**20
_MAX_BUFFER_ELEMENTS = 2**31


@dataclass(frozen=True)
class Stored:
    """What the weight files hold in all, known before any weight is read."""

    tensors: int
    elements: int


def load_model(folder: Path, config: Any, task: str, stored: Stored, **options: Any) -> "torch.nn.Module":
    """Load the weights as an fp32 model in evaluation mode without gradients.

    Args:
        folder: holds the weights (and nothing is read from elsewhere).
        config: the transformers configuration, already checked.
        task: one of ``FAMILIES``.
        stored: number of tensors and elements in the files.
        options: further arguments of ``from_pretrained`` (``gguf_file``).

    Raises:
        CheckpointError: the configuration does not describe these weights, or the task needs weights that
            the files lack.
    """
    import torch

    cls = model_class(config, task)
    _check_size(cls, config, stored)
    try:
        model, info = cls.from_pretrained(
            str(folder),
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are reported by us, with names
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # any type: a wrong configuration fails anywhere inside the architecture
        raise CheckpointError(
            f"transformers cannot build {cls.__name__} from the checkpoint: {first_line(error)}.",
            "Check that config.json and the weights belong together.",
        ) from error
    _check_shapes(info["mismatched_keys"])
    _check_depth(model, info["unexpected_keys"])
    _forget_container(model)
    model = model.float().eval().requires_grad_(False)
    state = model.state_dict()
    missing = sorted(
        name for name in info["missing_keys"] if name in state and state[name].is_floating_point()
    )
    if missing and task != "feature-extraction":
        raise _misfit(model, task, missing)
    # A body saved under another head may lack its pooler, which our pooling does not use. NaN in what is
    # missing shows in the output if it is used after all; zeros afterwards keep two runs identical.
    for name in missing:
        state[name].fill_(float("nan"))
    _check_probe(model, task, missing)
    for name in missing:
        state[name].zero_()
    return model


def probe_ids(model: Any, length: int = 5) -> "torch.Tensor":
    """Token ids (1, length) int64 that every text model accepts: one id repeated, never the padding id."""
    import torch

    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    return torch.full((1, length), 1 if pad == 0 else 0, dtype=torch.int64)


def _forget_container(model: Any) -> None:
    """Remove what transformers keeps of the GGUF: the model is plain fp32 and must be treated as such."""
    for holder, key in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(holder, key):
            delattr(holder, key)
    model.is_quantized = False


def _check_size(cls: Any, config: Any, stored: Stored) -> None:
    """Refuse a configuration that would allocate far more than the files hold, before it does."""
    import torch

    remedy = "Use the config.json that was saved with these weights."
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > stored.tensors:
        raise CheckpointError(
            f"The configuration asks for {layers} layers and the files hold {stored.tensors} tensors.", remedy
        )
    try:
        with torch.device("meta"):
            model = cls(config)
    except Exception as error:
        raise CheckpointError(
            f"The configuration does not describe a {cls.__name__}: {first_line(error)}.", remedy
        ) from error
    elements = sum(parameter.numel() for parameter in model.parameters())
    if elements > _MAX_GROWTH * stored.elements + _SLACK_ELEMENTS:
        raise CheckpointError(
            f"The configuration describes {elements:,} weights and the files hold {stored.elements:,}.",
            remedy,
        )
    buffers = sum(buffer.numel() for buffer in model.buffers())
    if buffers > _MAX_BUFFER_ELEMENTS:
        raise CheckpointError(f"The configuration asks for tables of {buffers:,} elements.", remedy)


def _check_shapes(mismatched: Any) -> None:
    for key, *shapes in sorted(mismatched, key=str):
        stored, wanted = (tuple(shape) for shape in shapes[:2])
        raise CheckpointError(
            f"The weights do not fit config.json: {key} is {stored} in the file, {wanted} in the model.",
            "Use the config.json that was saved with these weights.",
        )


def _check_depth(model: Any, unexpected: Any) -> None:
    """Refuse files with more layers than the configuration: the model would silently be cut short.

    Other unused tensors are harmless (a head that the task does not need). A further layer is told from them
    by its name, which equals that of a loaded parameter but for the number.
    """
    known = {re.sub(r"\d+", "#", name) for name, _ in model.named_parameters()}
    for name in sorted(unexpected):
        plain = re.sub(r"\d+", "#", name)
        if "#" in plain and any(plain == other or plain.endswith("." + other) for other in known):
            raise CheckpointError(
                f"The file holds {name}, a layer that the configuration does not have.",
                "Use the config.json that was saved with these weights.",
            )


def _check_probe(model: Any, task: str, missing: list[str]) -> None:
    """Run the model once on a tiny input: the task's output must be there and finite."""
    import torch

    key = "last_hidden_state" if task == "feature-extraction" else "logits"
    try:
        with torch.inference_mode():
            output = model(**_probe_input(model, task))[key]
    except Exception as error:
        raise CheckpointError(
            f"{type(model).__name__} cannot be run for {task!r}: {first_line(error)}.",
            "Choose another task with --task, or another checkpoint.",
        ) from error
    if bool(torch.isfinite(output).all()):
        return
    if missing:
        raise _misfit(model, task, missing)
    raise CheckpointError(
        f"{type(model).__name__} returns numbers that are not finite.",
        "The weights are damaged; copy them again.",
    )


def _probe_input(model: Any, task: str) -> dict[str, Any]:
    import torch

    ids = probe_ids(model)
    answer = {"decoder_input_ids": ids} if FAMILIES[task] == "encoder-decoder" else {}
    if task in ("image-classification", "image-to-text"):
        return {"pixel_values": torch.zeros(1, *pixel_shape(model)), **answer}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **answer}


def _misfit(model: Any, task: str, missing: list[str]) -> CheckpointError:
    others = [other for other in fitting_tasks(model.config) if other != task]
    return CheckpointError(
        f"The task {task!r} does not fit: the file lacks {len(missing)} weights, such as {missing[0]}.",
        f"Use a checkpoint trained for it{', or --task ' + others[0] if others else ''}.",
    )
