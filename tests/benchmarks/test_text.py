import hashlib
import itertools
import re

import numpy as np
import pytest

from gemini.benchmarks import text as text_module
from gemini.benchmarks.text import (
    default_sentences,
    default_text,
    read_text,
    split_sentences,
    spread,
    token_windows,
)
from gemini.errors import UsageError


def paragraphs(text):
    return {" ".join(part.split()) for part in re.split(r"\n\s*\n", text)}


def test_default_halves_share_no_paragraph():
    text = default_text()
    assert paragraphs(text.calibration).isdisjoint(paragraphs(text.evaluation))


def test_default_halves_are_about_equally_long_and_hashed():
    text = default_text()
    share = len(text.calibration) / (len(text.calibration) + len(text.evaluation))
    assert 0.4 < share < 0.6  # the cut falls on a topic boundary, topics are up to 40 kB of 370
    assert text.evaluation_sha256 == hashlib.sha256(text.evaluation.encode()).hexdigest()
    assert text.calibration_sha256 != text.evaluation_sha256


def test_default_text_is_the_same_every_time():
    assert default_text() == default_text()


def test_read_text_drops_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfGr\xc3\xbc\xc3\x9fe\n")
    assert read_text(path) == "Grüße\n"


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        (b"caf\xe9 is latin-1", "not UTF-8"),
        (b"\x7fELF\x02\x00\x00", "binary"),
        (b"\xff\xfeh\x00i\x00", "not UTF-8"),
    ],
)
def test_unusable_text_files_are_refused(tmp_path, data, cause):
    path = tmp_path / "bad.txt"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=cause) as caught:
        read_text(path)
    assert caught.value.remedy


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no text file"):
        read_text(tmp_path / "absent.txt")
    with pytest.raises(UsageError, match="cannot be read"):
        read_text(tmp_path)


def test_huge_file_is_refused_without_reading_it_all(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "MAX_TEXT_BYTES", 1 << 20)
    path = tmp_path / "huge.txt"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: reading it whole would not fit in memory
    with pytest.raises(UsageError, match="larger than 1 MB"):
        read_text(path)


@pytest.mark.parametrize(
    ("size", "window", "count"), [(1000, 64, 7), (999, 100, 9), (128, 64, 2), (65, 64, 1), (777, 7, 111)]
)
def test_windows_are_spread_and_do_not_overlap(size, window, count):
    windows = token_windows(range(size), window, count)
    starts = [int(ids[0, 0]) for ids in windows]
    assert len(windows) == count
    assert all(ids.shape == (1, window) and ids.dtype == np.int64 for ids in windows)
    assert all(after - before >= window for before, after in itertools.pairwise(starts))
    assert starts[0] == 0
    assert count == 1 or starts[-1] == size - window


def test_short_text_gives_fewer_or_shorter_windows():
    assert len(token_windows(range(150), 64, 10)) == 2
    (only,) = token_windows([5, 6, 7], 64, 10)
    assert only.tolist() == [[5, 6, 7]]


@pytest.mark.parametrize("arguments", [([1], 64, 4), ([], 64, 4), (range(99), 1, 4), (range(99), 8, 0)])
def test_unscorable_windows_are_refused(arguments):
    with pytest.raises(UsageError):
        token_windows(*arguments)


def test_default_sentences_are_distinct_prose_of_sensible_length():
    sentences = default_sentences(300)
    # The text of another Python has other sentences.
    assert 200 < len(sentences) == len(set(sentences)) <= 300
    assert all(40 <= len(sentence) <= 200 and sentence[-1] in ".!?" for sentence in sentences)
    assert not any("\n" in sentence or ">>>" in sentence for sentence in sentences)


def test_code_tables_and_fragments_are_no_sentences():
    text = "Code follows this sentence, which is long enough to be kept."
    text += "\n\n   print('A long line of code that is no prose.')"
    text += "\n\n+-----+\n| A table cell that is long enough to count. |\n+-----+\n\nToo short."
    assert split_sentences(text) == ["Code follows this sentence, which is long enough to be kept."]


def test_spread_keeps_order_and_both_halves():
    assert spread(list("abcdefghij"), 5) == list("acegi")
    assert spread(["a"], 5) == ["a"]
