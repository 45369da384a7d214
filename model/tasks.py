"""Which task a checkpoint was trained for, and which tasks it can be compressed for.

optimum's ``TasksManager`` maps a model class to its task; the class is the one that ``config.json`` names
under ``architectures`` (its ``infer_task_from_model`` refuses local folders).
"""

from pathlib import Path
from typing import Any

from gemini.errors import CheckpointError
from gemini.model.offline import import_transformers

FAMILIES = {
    "text-generation": "decoder",
    "text-classification": "encoder",
    "feature-extraction": "encoder",
    "image-classification": "vision",
    "text2text-generation": "encoder-decoder",
    "image-to-text": "encoder-decoder",
}
SUPPORTED = ", ".join(FAMILIES)


CLASS_SUFFIXES = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
}


def infer_task(config: Any, folder: Path | None = None) -> str:
    """Return the task of a transformers configuration, one of ``FAMILIES``.

    Args:
        config: a transformers ``PreTrainedConfig``; its ``architectures`` decides.
        folder: the checkpoint's folder, if any; one written by sentence-transformers means feature-extraction
            whatever head its Transformer was pretrained with.

    Raises:
        CheckpointError: no or an unknown architecture, or a task that this version does not support.
    """
    if folder is not None and _is_sentence_transformers(folder):
        return "feature-extraction"
    name = architecture(config)
    if name is None:
        raise CheckpointError(
            "config.json names no class under `architectures`, so the task cannot be inferred.",
            f"Pass --task with one of {SUPPORTED}.",
        )
    task = _task_of(name)
    fitting = fitting_tasks(config)
    if task in fitting:
        return str(task)
    trained = f"{task!r}" if task else "a task that optimum does not know"
    remedy = (
        f"Pass --task {fitting[0]} to use it for that." if fitting else "Use a checkpoint for one of these."
    )
    raise CheckpointError(f"{name} is trained for {trained}; this version supports {SUPPORTED}.", remedy)


def choose_task(config: Any, folder: Path | None, override: str | None) -> str:
    """Return the task to load the checkpoint for: the override when it fits, else the inferred one.

    Raises:
        CheckpointError: the override is no task of this version, or the architecture lacks what it needs.
    """
    if override is None:
        return infer_task(config, folder)
    from optimum.exporters.tasks import TasksManager

    task = str(TasksManager.map_from_synonym(override))
    if task not in FAMILIES:
        raise CheckpointError(
            f"The task {override!r} is not supported in this version.", f"Use one of {SUPPORTED}."
        )
    fitting = fitting_tasks(config)
    if task not in fitting:
        fits = f"tasks that fit: {', '.join(fitting)}" if fitting else "no task of this version fits"
        raise CheckpointError(
            f"The task {task!r} does not fit {architecture(config) or config.model_type}; {fits}.",
            "Choose a task that fits, or a checkpoint trained for this one.",
        )
    return task


def fitting_tasks(config: Any) -> tuple[str, ...]:
    """The tasks of ``FAMILIES`` whose head this checkpoint carries, or that need none.

    A head is carried only when the declared class has it: another head over the same body would be random. A
    configuration without ``architectures`` may fit every task its model type has a class for; the check for
    missing weights after loading decides then.
    """
    name = architecture(config)
    if name is None:
        return tuple(task for task in FAMILIES if _class_for(task, config) is not None)
    own = _task_of(name)
    fitting = []
    for task in FAMILIES:
        # A plain body only has text states to pool if it reads tokens and has no separate decoder.
        if task == "feature-extraction":
            model_class = _declared_class(name) if task == own else _class_for(task, config)
            fits = model_class is not None and model_class.main_input_name == "input_ids"
            fits = fits and not config.is_encoder_decoder
        else:
            paired = FAMILIES[task] == "encoder-decoder"
            fits = task == own and (config.is_encoder_decoder or not paired)
            fits = fits and not (task == "text-generation" and config.is_encoder_decoder)
        if fits:
            fitting.append(task)
    return tuple(fitting)


def model_class(config: Any, task: str) -> Any:
    """The transformers class to load: the declared one if it serves the task, else its model type's."""
    name = architecture(config)
    found = _declared_class(name) if name is not None and _task_of(name) == task else _class_for(task, config)
    if found is None:
        raise CheckpointError(
            f"transformers has no class for {task!r} with the model type {config.model_type!r}.",
            f"Choose one of {', '.join(fitting_tasks(config)) or 'no task: none fits'}.",
        )
    return found


def architecture(config: Any) -> str | None:
    """The first class that the configuration names under ``architectures``, if any."""
    names = getattr(config, "architectures", None)
    return str(names[0]) if isinstance(names, (list, tuple)) and names else None


def _declared_class(name: str) -> Any:
    transformers = import_transformers()
    found = getattr(transformers, name, None) if name.isidentifier() else None
    found = found or next((own for own in _registered() if own.__name__ == name), None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise CheckpointError(
            f"The architecture {name!r} is not part of transformers {transformers.__version__}; "
            "code that comes with a checkpoint is not run.",
            "Use a checkpoint of an architecture that transformers has, or a newer transformers.",
        )
    return found


def _task_of(name: str) -> str | None:
    from optimum.exporters.tasks import TasksManager

    declared = _declared_class(name)
    if _continues_a_source(name):
        return "text2text-generation"
    try:
        return str(TasksManager.infer_task_from_model(declared, library_name="transformers"))
    except (ValueError, KeyError):
        # optimum overlooks classes that share their auto class with another; the name is a convention then.
        suffixes = (task for suffix, task in CLASS_SUFFIXES.items() if name.endswith(suffix))
        return next(suffixes, None)


def _continues_a_source(name: str) -> bool:
    """Whether it is a class for sequence-to-sequence text; optimum takes some for fill-mask models."""
    auto = import_transformers().models.auto.modeling_auto
    listed = auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()
    own = auto.AutoModelForSeq2SeqLM._model_mapping._extra_content.values()
    return name in listed or name in (found.__name__ for found in own)


def _registered() -> list[Any]:
    """Model classes that this package brings and transformers has been told of."""
    auto = import_transformers().models.auto.modeling_auto
    kinds = (auto.AutoModel, auto.AutoModelForSeq2SeqLM, auto.AutoModelForSequenceClassification)
    return [found for kind in kinds for found in kind._model_mapping._extra_content.values()]


def _class_for(task: str, config: Any) -> Any:
    from optimum.exporters.tasks import TasksManager

    auto = TasksManager.get_model_class_for_task(task, framework="pt", library="transformers")
    found = auto._model_mapping.get(type(config), None)
    return found[0] if isinstance(found, (list, tuple)) else found


def _is_sentence_transformers(folder: Path) -> bool:
    """Whether sentence-transformers wrote the folder: by its module list, or by what optimum looks for."""
    if (folder / "modules.json").is_file():
        return True
    from optimum.exporters.tasks import TasksManager

    try:
        return bool(TasksManager.infer_library_from_model(str(folder)) == "sentence_transformers")
    except Exception:
        # optimum asks the hub about folders it cannot tell; offline that is a "no", whatever it raises.
        return False
