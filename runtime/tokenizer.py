"""Text to token ids and back with the bundle's tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from tokenizers.models import BPE

from gemini.errors import RequestError
from gemini.runtime.bundle import Bundle
from gemini.runtime.fields import damaged

TOKENIZER_NAME = "tokenizer.json"
VOCABULARY_NAME, MERGES_NAME = "vocab.json", "merges.txt"
# Fields of a byte-pair encoding beside its vocabulary and merges.
_FIELDS = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
    "ignore_merges",
)
_PAD_TOKENS = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>")


@dataclass(frozen=True)
class TokenBatch:
    """A right-padded batch: three int64 arrays (B, S), 0 in ``attention_mask`` marks padding."""

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    token_type_ids: NDArray[np.int64]


def with_merges(text: str, vocabulary: Path, merges: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json whose byte-pair encoding lies in two files of its own.

    The library reads these in less time than from within the JSON, and with 2 instead of 28 MB that it has no
    use for afterwards (49 thousand tokens). Any Exception if they do not fit together.
    """
    fields = json.loads(text)["model"]
    known = {name: fields[name] for name in _FIELDS if fields.get(name) is not None}
    tokenizer = Tokenizer.from_str(text)
    tokenizer.model = BPE.from_file(str(vocabulary), str(merges), **known)
    return tokenizer


class TextTokenizer:
    """A tokenizer whose own padding and truncation settings are off, so that no text is cut unnoticed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        padding = tokenizer.padding or {}
        known = (tokenizer.token_to_id(token) for token in _PAD_TOKENS)
        self.pad_id = int(padding.get("pad_id", next((i for i in known if i is not None), 0)))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.inner = tokenizer

    @classmethod
    def read(cls, bundle: Bundle) -> TextTokenizer:
        """The tokenizer of a bundle; BundleError if the file is not one."""
        text = bundle.text(TOKENIZER_NAME)
        apart = [bundle.file(name) for name in (VOCABULARY_NAME, MERGES_NAME) if bundle.has(name)]
        try:
            return cls(with_merges(text, *apart) if apart else Tokenizer.from_str(text))
        except Exception as error:  # tokenizers raises plain Exception
            raise damaged(f"{TOKENIZER_NAME} is not a tokenizer") from error

    def encode(self, text: str, special_tokens: bool = True, bos: int | None = None) -> list[int]:
        """Token ids of a prompt. An empty text becomes [bos] if the model has one, else RequestError."""
        ids: list[int] = self._encode([text], special_tokens)[0].ids
        if not ids and bos is not None:
            return [bos]
        if not ids:
            raise RequestError("The prompt is empty.", "Give at least one character.")
        return ids

    def encode_rows(self, texts: Sequence[str], context_length: int) -> list[Encoding]:
        """Each text with its special tokens, cut at ``context_length``.

        Cutting keeps the special tokens at the end: it removes text, as the model was trained.
        """
        encodings = self._encode(texts, True)
        for row, encoding in enumerate(encodings):
            if len(encoding.ids) > context_length:
                encodings[row] = self._truncated(texts[row], context_length)
        return encodings

    def stack(self, encodings: Sequence[Encoding], pad_id: int | None = None) -> TokenBatch:
        """One batch of encoded texts, padded to the longest."""
        shape = (len(encodings), max(len(encoding.ids) for encoding in encodings))
        if shape[1] == 0:
            raise RequestError("A text is empty and this tokenizer adds nothing to it.", "Give some text.")
        ids = np.full(shape, self.pad_id if pad_id is None else pad_id, np.int64)
        mask, types = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, encoding in enumerate(encodings):
            count = len(encoding.ids)
            ids[row, :count] = encoding.ids
            mask[row, :count] = 1
            types[row, :count] = encoding.type_ids
        return TokenBatch(ids, mask, types)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens; bytes that are no character become U+FFFD."""
        return str(self.inner.decode(list(ids), skip_special_tokens=True))

    def token(self, index: int | None) -> str | None:
        """The text of one token as the vocabulary spells it, e.g. "<s>"; None for None or an unknown id."""
        return None if index is None else self.inner.id_to_token(index)

    def _truncated(self, text: str, length: int) -> Encoding:
        body = self.inner.encode(text, add_special_tokens=False)
        body.truncate(max(0, length - self.inner.num_special_tokens_to_add(False)))
        return self.inner.post_process(body, None, True)

    def _encode(self, texts: Sequence[str], special_tokens: bool) -> list[Encoding]:
        if not texts or not all(isinstance(text, str) for text in texts):
            raise RequestError("The input is not a text or a list of texts.", "Give at least one str.")
        try:
            if len(texts) == 1:  # encode_batch would start a thread pool for nothing
                return [self.inner.encode(texts[0], add_special_tokens=special_tokens)]
            return list(self.inner.encode_batch(list(texts), add_special_tokens=special_tokens))
        except Exception as error:  # lone surrogates; tokenizers raises plain Exception or TypeError
            raise RequestError("The text cannot be tokenized.", "Give valid Unicode text.") from error
