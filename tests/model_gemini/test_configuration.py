"""Configurations: what is refused, what a file keeps."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from gemini.errors import UsageError
from gemini.model.gemini import GeminiConfig


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"hidden_size": 250}, "4 heads"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": 9, "num_attention_heads": 1, "positions": "sinusoidal"}, "hidden_size 9"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"image_blur": 1.5}, "image_blur is 1.5"),
        ({"image_prototypes": -1}, "image_prototypes is -1"),
        ({"prototype_sharpness": 0}, "prototype_sharpness is 0"),
        ({"positions": "rotary"}, "'rotary'"),
        ({"fusion": "middle"}, "'middle'"),
        ({"fusion": "late", "encoder_layers": 1}, "each modality"),
        ({"fusion": "hybrid", "joint_layers": 2}, "2 of 3"),
        ({"fusion": "hybrid", "joint_layers": 0}, "0 of 3"),
        ({"fusion": "hybrid", "joint_layers": 3, "image_prototypes": 9}, "3 of 3"),
        ({"image_size": 60}, "60"),
        ({"image_channels": (32, 0, 96)}, "(32, 0, 96)"),
        ({"image_channels": ()}, "()"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], cause: str) -> None:
    with pytest.raises(UsageError) as caught:
        GeminiConfig(**changes)
    assert cause in caught.value.cause
    assert caught.value.remedy


def test_unknown_size_lists_the_sizes() -> None:
    with pytest.raises(UsageError, match="nano, base, large"):
        GeminiConfig.sized("huge")


def test_file_keeps_everything(tmp_path: Path) -> None:
    config = GeminiConfig.sized("base", fusion="hybrid", positions="sinusoidal", num_labels=3)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is GeminiConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.layer_split == config.layer_split == (2, 2, 2)
