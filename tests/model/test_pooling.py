"""Pooling modes as sentence-transformers writes them, old flags and new names."""

import json
from pathlib import Path
from typing import Any

import pytest

from gemini.model.pooling import Pooling, read_sentence_folder


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": True}, "mean"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["mean"]}, "mean"),
    ],
)
def test_pooling_modes(sentence: Path, config: dict[str, Any], mode: str) -> None:
    (sentence / "1_Pooling" / "config.json").write_text(json.dumps(config))
    entries = json.loads((sentence / "modules.json").read_text())[:2]
    (sentence / "modules.json").write_text(json.dumps(entries))
    found = read_sentence_folder(sentence)
    assert found is not None
    assert found.pooling == Pooling(mode, normalize=False, declared=True)


def test_folder_without_module_list_has_no_declared_pooling(masked: Path) -> None:
    assert read_sentence_folder(masked) is None
