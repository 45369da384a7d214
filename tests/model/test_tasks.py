"""Which task each architecture stands for, and which override fits."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from gemini.errors import CheckpointError
from gemini.model.gemini import GeminiConfig
from gemini.model.tasks import FAMILIES, choose_task, fitting_tasks, infer_task, model_class


def config_of(name: str) -> Any:
    """A default configuration that declares the class (no weights are built)."""
    config = getattr(transformers, name).config_class()
    config.architectures = [name]
    return config


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("LlamaForCausalLM", "text-generation"),
        ("Qwen2ForCausalLM", "text-generation"),
        ("Qwen3ForCausalLM", "text-generation"),
        ("MistralForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
        ("Gemma3ForCausalLM", "text-generation"),
        ("Phi3ForCausalLM", "text-generation"),
        ("SmolLM3ForCausalLM", "text-generation"),
        ("BertForSequenceClassification", "text-classification"),
        ("DistilBertForSequenceClassification", "text-classification"),
        ("RobertaForSequenceClassification", "text-classification"),
        ("LlamaForSequenceClassification", "text-classification"),
        ("BertModel", "feature-extraction"),
        ("DistilBertModel", "feature-extraction"),
        ("RobertaModel", "feature-extraction"),
        ("MPNetModel", "feature-extraction"),
        ("LlamaModel", "feature-extraction"),
        ("ViTForImageClassification", "image-classification"),
        ("BeitForImageClassification", "image-classification"),
        ("Dinov2ForImageClassification", "image-classification"),
        ("T5ForConditionalGeneration", "text2text-generation"),
        ("BartForConditionalGeneration", "text2text-generation"),
        ("MarianMTModel", "text2text-generation"),
    ],
)
def test_task_of_the_declared_class(name: str, task: str) -> None:
    config = config_of(name)
    assert infer_task(config) == task
    assert choose_task(config, None, task) == task
    assert model_class(config, task).__name__ == name


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("GeminiForConditionalGeneration", "text2text-generation"),
        ("GeminiForSequenceClassification", "text-classification"),
    ],
)
def test_task_of_a_class_of_our_own(name: str, task: str) -> None:
    config = GeminiConfig(architectures=[name])
    assert infer_task(config) == task
    assert model_class(config, task).__name__ == name


@pytest.mark.parametrize(
    "name",
    [
        "WhisperForConditionalGeneration",
        "Gemma3ForConditionalGeneration",
        "BlipForConditionalGeneration",
        "DetrForObjectDetection",
        "BertForTokenClassification",
        "BertForQuestionAnswering",
        "BertForMaskedLM",
        "ViTModel",
        "T5Model",
    ],
)
def test_other_tasks_are_refused_with_the_supported_ones(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        infer_task(config_of(name))
    assert all(task in str(caught.value) for task in FAMILIES)


def test_masked_language_model_is_offered_as_an_embedder() -> None:
    config = config_of("BertForMaskedLM")
    assert fitting_tasks(config) == ("feature-extraction",)
    with pytest.raises(CheckpointError, match="--task feature-extraction"):
        infer_task(config)
    assert choose_task(config, None, "feature-extraction") == "feature-extraction"


@pytest.mark.parametrize(
    ("name", "task", "fitting"),
    [
        ("LlamaForCausalLM", "text-classification", "text-generation, feature-extraction"),
        ("LlamaForCausalLM", "image-classification", "text-generation, feature-extraction"),
        ("BertModel", "text-generation", "feature-extraction"),
        ("BertForSequenceClassification", "text-generation", "text-classification, feature-extraction"),
        ("ViTForImageClassification", "feature-extraction", "image-classification"),
        ("T5ForConditionalGeneration", "text-generation", "text2text-generation"),
        ("WhisperForConditionalGeneration", "text-generation", "no task"),
    ],
)
def test_override_that_does_not_fit_lists_what_does(name: str, task: str, fitting: str) -> None:
    with pytest.raises(CheckpointError, match="does not fit") as caught:
        choose_task(config_of(name), None, task)
    assert fitting in str(caught.value)


def test_unknown_task_name() -> None:
    with pytest.raises(CheckpointError, match=r"'object-detection' is not supported.*text-generation"):
        choose_task(config_of("LlamaForCausalLM"), None, "object-detection")


def test_synonyms_of_optimum_are_understood() -> None:
    assert choose_task(config_of("LlamaForCausalLM"), None, "causal-lm") == "text-generation"


def test_configuration_without_architectures_needs_a_task() -> None:
    config = transformers.BertConfig()
    with pytest.raises(CheckpointError, match="Pass --task"):
        infer_task(config)
    assert choose_task(config, None, "feature-extraction") == "feature-extraction"
    with pytest.raises(CheckpointError, match="does not fit"):
        choose_task(config, None, "image-classification")


def test_sentence_transformers_folder_is_told_by_its_module_list(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[]")
    assert infer_task(config_of("BertForMaskedLM"), tmp_path) == "feature-extraction"


def test_class_that_shares_its_auto_class_is_known_by_its_name():
    from transformers import DeiTConfig

    config = DeiTConfig(architectures=["DeiTForImageClassification"])
    assert infer_task(config) == "image-classification"
