"""When sessions use the own kernels, and that they say the same as onnxruntime's."""

from pathlib import Path

import onnxruntime as ort
import pytest

from gemini.errors import UsageError
from gemini.pretrained import shipped_bundle
from gemini.runtime import kernels, load
from gemini.runtime.session import session_options

built = pytest.mark.skipif(not kernels.available(), reason="the kernels are not built or do not fit here")


class Library:
    """Says of the processor what it is told to."""

    def __init__(self, processor: int) -> None:
        self.processor = processor

    def gemini_processor(self) -> int:
        return self.processor


@pytest.fixture
def on(monkeypatch):
    def pretend(processor, asked=None):
        found = None if processor is None else (Library(processor), None)
        monkeypatch.setattr(kernels, "_library", lambda: found)
        monkeypatch.delenv(kernels.VARIABLE, raising=False)
        if asked is not None:
            monkeypatch.setenv(kernels.VARIABLE, asked)

    return pretend


@pytest.mark.parametrize(
    "processor, asked, expected",
    [
        (None, None, False),  # not built
        (0, None, False),  # no AVX2
        (1, None, True),
        (2, None, False),  # AVX-VNNI, which onnxruntime's kernels use
        (2, "own", True),
        (3, None, True),  # AVX-512 VNNI
        (3, "avx2", True),
        (4, None, True),  # with BF16, too
        (1, "onnxruntime", False),
        (None, "onnxruntime", False),
        (1, "", True),
    ],
)
def test_the_faster_kernels_are_wanted_or_those_asked_for(processor, asked, expected, on):
    on(processor, asked)
    assert kernels.wanted() is expected


@pytest.mark.parametrize(
    "processor, asked, expected",
    [
        (None, None, "not built"),
        (0, None, "unfit"),
        (1, None, "AVX2"),
        (2, None, "not used"),
        (3, None, "AVX-512 VNNI"),
        (3, "avx2", "AVX2"),
        (4, None, "AVX-512 VNNI and BF16"),
        (4, "avx2", "AVX2"),
        (3, "onnxruntime", "not used"),
    ],
)
def test_what_becomes_of_them_is_said_in_a_word(processor, asked, expected, on):
    on(processor, asked)
    assert kernels.state() == expected


@pytest.mark.parametrize(
    "processor, asked", [(None, "own"), (None, "avx2"), (0, "own"), (0, "avx2"), (1, "fastest")]
)
def test_what_cannot_be_is_a_usage_error(processor, asked, on):
    on(processor, asked)
    with pytest.raises(UsageError, match=kernels.VARIABLE):
        kernels.wanted()


def test_a_library_that_cannot_be_loaded_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "kernels.py"))
    kernels._library.cache_clear()
    try:
        assert not kernels.available()
        for suffix in kernels.EXTENSION_SUFFIXES:
            (tmp_path / f"_fused{suffix}").write_bytes(b"no library")
        kernels._library.cache_clear()
        assert not kernels.available()
    finally:
        kernels._library.cache_clear()


@built
def test_the_shipped_bundle_says_the_same_with_both(monkeypatch):
    texts, labels = [], []
    for asked in ("own", "avx2", "onnxruntime"):
        monkeypatch.setenv(kernels.VARIABLE, asked)
        session = load(shipped_bundle("gemini-nano"), threads=2)
        opened = {Path(graph.session._model_path).name for graph in (session.graph, session.encoder_graph)}
        assert opened == {
            f"{part}{'' if asked == 'onnxruntime' else '.fused'}.onnx" for part in ("decoder", "encoder")
        }
        texts.append(session.generate("Once upon a time", max_new_tokens=24).text)
        labels.append(session.classify(["What a wonderful film"])[0])
    assert texts[0] == texts[1] == texts[2]
    # Both round activations to 8 bits, to codes that differ where a sum in another order falls on a border.
    for *ours, theirs in zip(*labels, strict=True):
        assert all(abs(own.score - theirs.score) < 0.02 for own in ours)


@built
def test_a_session_without_such_nodes_does_not_mind():
    options = session_options(1)
    kernels.register(options, 1)
    kernels.register(session_options(1), 3)
    assert isinstance(options, ort.SessionOptions)
