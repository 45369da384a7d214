"""A tokenizer as a bundle holds it: in files that a device reads quickly."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gemini.runtime.tokenizer import MERGES_NAME, TOKENIZER_NAME, VOCABULARY_NAME, with_merges


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, and a byte-pair encoding's vocabulary and merges beside it.

    tokenizer.json keeps all but those, and of the vocabulary the added tokens. It stays whole where they
    would not come back as they were: a merge whose parts hold spaces, for one, cannot be written as a line.
    """
    whole = tokenizer.to_str()
    document = json.loads(whole)
    if document["model"].get("type") == "BPE" and _write_apart(document, whole, folder):
        return
    (folder / TOKENIZER_NAME).write_text(whole, encoding="utf-8")


def _write_apart(document: dict[str, Any], whole: str, folder: Path) -> bool:
    model = document["model"]
    added = {token["content"]: token["id"] for token in document["added_tokens"]}
    texts = {
        TOKENIZER_NAME: _json(document | {"model": model | {"vocab": added, "merges": []}}),
        VOCABULARY_NAME: _json(model["vocab"]),
        MERGES_NAME: "".join(f"{first} {second}\n" for first, second in model["merges"]),
    }
    files = {name: folder / name for name in texts}
    for name, text in texts.items():
        files[name].write_bytes(text.encode())
    with suppress(Exception):  # tokenizers raises plain Exception
        if with_merges(texts[TOKENIZER_NAME], files[VOCABULARY_NAME], files[MERGES_NAME]).to_str() == whole:
            return True
    for file in files.values():
        file.unlink()
    return False


def _json(document: Any) -> str:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))
