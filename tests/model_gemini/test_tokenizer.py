"""The tokenizer: nothing is lost, special tokens stay whole, files load everywhere."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from gemini.errors import UsageError
from gemini.model.gemini import (
    GeminiConfig,
    GeminiTokenizer,
    caption_prompt,
    classify_prompt,
    continue_prompt,
    denoise_prompt,
    train_tokenizer,
)
from gemini.model.gemini.tokenizer import SPECIAL_TOKENS

TEXTS = ["a small red apple on the table", "a red apple", "这个酒店很好，我喜欢这个酒店。"] * 5


@pytest.fixture(scope="module")
def tokenizer() -> GeminiTokenizer:
    return train_tokenizer(TEXTS, vocab_size=320)


def test_ids_are_those_of_the_configuration(tokenizer: GeminiTokenizer) -> None:
    config = GeminiConfig()
    assert tokenizer.pad_token_id == config.pad_token_id
    assert tokenizer.bos_token_id == config.bos_token_id == config.decoder_start_token_id
    assert tokenizer.eos_token_id == config.eos_token_id
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert len(tokenizer) <= 320


@settings(max_examples=100, deadline=None)
@given(text=st.text().filter(lambda text: not any(token in text for token in SPECIAL_TOKENS)))
def test_any_text_comes_back(tokenizer: GeminiTokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.target(text), skip_special_tokens=True) == text


def test_training_merges_what_is_frequent(tokenizer: GeminiTokenizer) -> None:
    assert len(tokenizer(" red apple").input_ids) == 2
    assert len(tokenizer("酒店").input_ids) < len("酒店".encode())


def test_prompts_begin_with_whole_tokens(tokenizer: GeminiTokenizer) -> None:
    def tokens(prompt: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids)

    assert tokens(caption_prompt()) == ["<image>", "<caption>", "<en>"]
    assert tokens(caption_prompt("zh")) == ["<image>", "<caption>", "<zh>"]
    assert tokens(continue_prompt("a"))[0] == "<continue>"
    assert tokens(classify_prompt("a"))[0] == "<classify>"
    assert tokens(denoise_prompt("a<mask>table"))[:3] == ["<denoise>", "a", "<mask>"]
    with pytest.raises(UsageError, match="en, zh"):
        caption_prompt("fr")


def test_files_load_with_and_without_transformers(tokenizer: GeminiTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    GeminiConfig().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert type(loaded) is GeminiTokenizer
    for text in (*TEXTS[:3], caption_prompt("zh"), denoise_prompt("no <mask> 🙂")):
        expected = tokenizer(text).input_ids
        assert loaded(text).input_ids == backend.encode(text).ids == expected
    assert loaded.all_special_tokens == tokenizer.all_special_tokens


def test_padding_goes_to_the_right(tokenizer: GeminiTokenizer) -> None:
    batch = tokenizer(["a", "a red apple"], padding=True)
    assert batch.attention_mask == [[1, 0, 0], [1, 1, 1]]
    assert batch.input_ids[0][1:] == [0, 0]


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match="271 or more"):
        train_tokenizer(TEXTS, vocab_size=270)
