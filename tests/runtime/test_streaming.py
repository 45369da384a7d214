"""Text in pieces: whole characters, no lost spaces, stop strings across pieces."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from gemini.runtime.streaming import Detokenizer, StopMatcher, TextStream
from gemini.runtime.tokenizer import TextTokenizer

TEXTS = [
    "the sea is grey",
    "  two spaces, then  more \n\n and a tab\t.",
    "naïve café 你好 🙂👩‍👩‍👧 e\u0301",
    "a\ufffdb \ufffd",
    "",
]


def sentencepiece_like():
    """Words with a leading block, bytes for everything else, and a decoder that strips the first space."""
    words = [
        "<unk>",
        "<s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁the",
        "▁sea",
        "▁",
        "s",
        ",",
        "▁is",
    ]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def pieces_of(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in ids]
    return [*pieces, detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_pieces_add_up_and_hold_whole_characters(byte_tokenizer, text):
    tokenizer = TextTokenizer(byte_tokenizer)
    pieces = pieces_of(tokenizer, tokenizer.inner.encode(text).ids)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_sentencepiece_pieces_keep_spaces_and_assemble_bytes():
    tokenizer = TextTokenizer(sentencepiece_like())
    ids = [tokenizer.inner.token_to_id(t) for t in ("▁the", "▁sea", "s", "▁", "▁is")]
    ids += [2 + byte for byte in "é🙂".encode()] + [tokenizer.inner.token_to_id(t) for t in (",", "▁the")]
    pieces = pieces_of(tokenizer, ids)
    assert pieces == ["the", " sea", "s", " ", " is", "", "é", "", "", "", "🙂", ",", " the", ""]
    assert "".join(pieces) == tokenizer.decode(ids)


def test_random_byte_level_tokens_add_up_to_the_decoded_text(byte_tokenizer):
    tokenizer = TextTokenizer(byte_tokenizer)
    rng = np.random.default_rng(5)
    for _ in range(60):
        ids = rng.integers(0, tokenizer.inner.get_vocab_size(), 25).tolist()
        assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_random_words_and_characters_in_bytes_add_up_to_the_decoded_text():
    """Valid characters only: with byte fallback, a wrong byte changes how the valid ones before it decode."""
    tokenizer = TextTokenizer(sentencepiece_like())
    rng = np.random.default_rng(6)
    parts = [[2 + byte for byte in character.encode()] for character in "aé你🙂"] + [
        [258],
        [259],
        [260],
        [261],
        [1],
    ]
    for _ in range(60):
        ids = [token for part in rng.integers(0, len(parts), 20) for token in parts[part]]
        assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_half_a_character_at_the_end_comes_with_finish(byte_tokenizer):
    tokenizer = TextTokenizer(byte_tokenizer)
    half = tokenizer.inner.encode("🙂").ids[:-1]
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(token) for token in half] == [""] * len(half)
    assert detokenizer.finish() == tokenizer.decode(half)


def test_endless_garbage_and_special_tokens_do_not_pile_up(byte_tokenizer):
    tokenizer = TextTokenizer(byte_tokenizer)
    continuation = next(i for i in range(3, 300) if tokenizer.decode([i]) == "\ufffd")
    for token in (continuation, 1):
        detokenizer = Detokenizer(tokenizer)
        for _ in range(500):
            detokenizer.push(token)
            assert len(detokenizer._ids) < 100


def split(text, rng):
    cuts = sorted(rng.integers(0, len(text) + 1, 4).tolist())
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("hello END world", ["END"], "hello "),
        ("aab aaab", ["aaab"], "aab "),
        ("abcabd", ["abd"], "abc"),
        ("one two", ["two", "one t"], ""),
        ("ENDEND", ["END"], ""),
        ("almost EN", ["END"], "almost EN"),
        ("xyz", [], "xyz"),
        ("a🙂b", ["🙂"], "a"),
    ],
)
def test_stop_strings_are_found_however_the_text_is_cut(text, stops, expected):
    rng = np.random.default_rng(1)
    for _ in range(50):
        matcher = StopMatcher(stops)
        out = "".join(matcher.push(piece) for piece in split(text, rng)) + matcher.finish()
        assert out == expected
        assert matcher.stopped == any(stop in text for stop in stops)


def test_text_that_may_still_become_a_stop_is_held_back():
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("fine.\n") == "fine."
    assert matcher.push("\nUse") == ""
    assert matcher.push(" it") == "\n\nUse it"
    assert matcher.push("\n\nUser: next") == "" and matcher.stopped
    assert matcher.push("more") == "" and matcher.finish() == ""


def test_a_stop_inside_the_last_held_character_is_found(byte_tokenizer):
    stream = TextStream(TextTokenizer(byte_tokenizer), ["🙂"])
    text = "".join(stream.push(token) for token in byte_tokenizer.encode("ok🙂no").ids) + stream.finish()
    assert text == "ok" and stream.stopped
