import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from gemini.errors import BundleError
from gemini.export.tokenizer_files import write_tokenizer
from gemini.runtime.tokenizer import MERGES_NAME, TOKENIZER_NAME, VOCABULARY_NAME, TextTokenizer

TEXTS = [
    "the sea is wide and the sun is low",
    "ein Maß für Größe: 海は広い",
    "a<|end|>b <pad> tabs\tand\nlines",
] * 3
WRITTEN = (TOKENIZER_NAME, VOCABULARY_NAME, MERGES_NAME)


class Folder:
    """As much of a bundle as a tokenizer is read from."""

    def __init__(self, path):
        self.path = path

    def has(self, name):
        return (self.path / name).is_file()

    def file(self, name):
        return self.path / name

    def text(self, name):
        return self.file(name).read_text("utf-8")


def byte_level(**options):
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken("<pad>", special=True)])  # behind the vocabulary
    tokenizer.add_tokens([AddedToken("tabs", lstrip=True)])
    return tokenizer


@pytest.mark.parametrize("options", [{}, {"ignore_merges": True, "byte_fallback": True}, {"dropout": 0.0}])
def test_a_byte_pair_encoding_comes_back_from_files_of_its_own(options, tmp_path):
    tokenizer = byte_level(**options)
    write_tokenizer(tokenizer, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(WRITTEN)
    assert len(json.loads((tmp_path / TOKENIZER_NAME).read_text("utf-8"))["model"]["vocab"]) == 3
    read = TextTokenizer.read(Folder(tmp_path))
    assert read.inner.to_str() == tokenizer.to_str()
    for text in TEXTS:
        assert read.encode(text) == tokenizer.encode(text).ids
        assert read.decode(read.encode(text)) == tokenizer.decode(tokenizer.encode(text).ids)


def of_merges_with_spaces():
    merges = [("a", " "), ("a ", "b")]
    return Tokenizer(models.BPE({"a": 0, "b": 1, " ": 2, "a ": 3, "a b": 4}, merges))


def of_words():
    return Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "sea": 2}, unk_token="[UNK]"))


def of_pieces():
    return Tokenizer(models.Unigram([("<unk>", 0.0), ("the", -1.0), (" ", -2.0)], 0, False))


@pytest.mark.parametrize("make", [of_merges_with_spaces, of_words, of_pieces])
def test_what_cannot_be_taken_apart_stays_whole(make, tmp_path):
    tokenizer = make()
    write_tokenizer(tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [TOKENIZER_NAME]
    assert TextTokenizer.read(Folder(tmp_path)).inner.to_str() == tokenizer.to_str()


@pytest.mark.parametrize(
    "name, content",
    [(VOCABULARY_NAME, "{"), (VOCABULARY_NAME, "{}"), (MERGES_NAME, "a b c\n"), (MERGES_NAME, "x y\n")],
)
def test_parts_that_do_not_fit_together_are_refused(name, content, tmp_path):
    write_tokenizer(byte_level(), tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer"):
        TextTokenizer.read(Folder(tmp_path))


def test_one_part_alone_is_refused(tmp_path):
    write_tokenizer(byte_level(), tmp_path)
    (tmp_path / MERGES_NAME).unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer"):
        TextTokenizer.read(Folder(tmp_path))
