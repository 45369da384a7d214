"""Damaged GGUF files are refused by the header walk: quickly, without large allocations or a crash."""

import random
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemini.errors import CheckpointError
from gemini.model import load_checkpoint
from gemini.model.gguf import check_gguf


def refused(path: Path, pattern: str) -> None:
    with pytest.raises(CheckpointError, match=pattern) as caught:
        load_checkpoint(path)
    assert caught.value.remedy and "\n" not in str(caught.value)


def patched(path: Path, offset: int, data: bytes) -> Path:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(data)] = data
    path.write_bytes(raw)
    return path


def after_key(path: Path, key: str) -> int:
    """Offset of the value type of a metadata key."""
    return path.read_bytes().index(key.encode()) + len(key)


def test_header_of_a_good_file(gguf_file: Path) -> None:
    header = check_gguf(gguf_file)
    assert header.metadata["general.architecture"] == "llama"
    assert len(header.metadata["tokenizer.ggml.tokens"]) == 64
    assert header.shapes["blk.0.ffn_down.weight"] == (64, 32)
    assert header.stored.tensors == 11
    assert header.stored.elements == 64 * 32 + 4 * 32 * 32 + 3 * 64 * 32 + 3 * 32


def test_every_truncation_is_refused(gguf_file: Path) -> None:
    data = gguf_file.read_bytes()
    cuts = random.Random(0).sample(range(1, len(data) - 32), 150)
    for cut in (*cuts, 0, 3, 4, 8, 23, 24):
        gguf_file.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match=r"tiny\.gguf"):
            check_gguf(gguf_file)


def test_random_bytes_in_the_header_never_crash(gguf_file: Path) -> None:
    data = gguf_file.read_bytes()
    generator = random.Random(1)
    for _ in range(400):
        raw = bytearray(data)
        for _ in range(generator.randint(1, 4)):
            raw[generator.randrange(2500)] = generator.randrange(256)
        gguf_file.write_bytes(raw)
        try:
            check_gguf(gguf_file)  # a changed letter of a token is not detectable, hence no error demanded
        except CheckpointError:
            continue


def test_truncated_file_through_the_front_door(gguf_file: Path) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:-100])
    refused(gguf_file, "truncated or corrupt: tensor .* ends at byte")


def test_wrong_magic(gguf_file: Path) -> None:
    refused(patched(gguf_file, 0, b"GGML"), "not a GGUF")


@pytest.mark.parametrize(("version", "named"), [(1, "version 1"), (4, "version 4"), (3 << 24, "big-endian")])
def test_other_versions(gguf_file: Path, version: int, named: str) -> None:
    refused(patched(gguf_file, 4, struct.pack("<I", version)), named)


@pytest.mark.parametrize("offset", [8, 16])
def test_huge_counts_allocate_nothing(gguf_file: Path, offset: int) -> None:
    refused(patched(gguf_file, offset, struct.pack("<Q", 2**62)), "promises")


def test_huge_array_allocates_nothing(gguf_file: Path) -> None:
    place = after_key(gguf_file, "tokenizer.ggml.tokens") + 4 + 4
    refused(patched(gguf_file, place, struct.pack("<Q", 2**61)), "promises")


def test_huge_text_allocates_nothing(gguf_file: Path) -> None:
    place = after_key(gguf_file, "general.name") + 4
    refused(patched(gguf_file, place, struct.pack("<Q", 2**61)), "needs")


def test_nested_array_is_refused(gguf_file: Path) -> None:
    place = after_key(gguf_file, "tokenizer.ggml.tokens") + 4
    refused(patched(gguf_file, place, struct.pack("<I", 9)), "array of type 9")


def test_unknown_value_type(gguf_file: Path) -> None:
    refused(
        patched(gguf_file, after_key(gguf_file, "general.name"), struct.pack("<I", 77)), "unknown type 77"
    )


@pytest.mark.parametrize(
    ("skip", "data", "named"),
    [
        (0, struct.pack("<I", 9), "9 dimensions"),
        (4, struct.pack("<Q", 2**50), "crooked|ends at byte|width"),
        (4, struct.pack("<Q", 0), "crooked"),
        (20, struct.pack("<I", 999), "unknown to gguf"),
        (24, struct.pack("<Q", 2**50), "ends at byte"),
        (24, struct.pack("<Q", 7), "crooked"),
    ],
)
def test_crooked_tensor_table(gguf_file: Path, skip: int, data: bytes, named: str) -> None:
    place = gguf_file.read_bytes().index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight")
    refused(patched(gguf_file, place + skip, data), named)


def test_overlapping_tensors(gguf_file: Path) -> None:
    place = gguf_file.read_bytes().index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 24
    refused(patched(gguf_file, place, struct.pack("<Q", 0)), "overlap")


@pytest.mark.parametrize(("counts", "named"), [({"layers": 10**6}, "layers"), ({"width": 64}, "width of 64")])
def test_hyperparameters_that_contradict_the_tensors(
    tiny: SimpleNamespace, tmp_path: Path, counts: dict[str, int], named: str
) -> None:
    tiny.write_gguf(tmp_path / "odd.gguf", **counts)
    refused(tmp_path / "odd.gguf", named)


def test_more_layers_than_the_file_holds(tiny: SimpleNamespace, tmp_path: Path) -> None:
    tiny.write_gguf(tmp_path / "odd.gguf", layers=2)
    refused(tmp_path / "odd.gguf", "does not fit: the file lacks")


def test_architecture_that_transformers_does_not_read(tiny: SimpleNamespace, tmp_path: Path) -> None:
    tiny.write_gguf(tmp_path / "odd.gguf", architecture="rwkv7")
    refused(tmp_path / "odd.gguf", "cannot read the architecture 'rwkv7'")


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    refused(tmp_path / "empty.gguf", "not a GGUF")


def test_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.gguf", "no checkpoint at")


def test_library_is_as_before_after_loading(gguf_file: Path) -> None:
    import gguf

    before = gguf.GGUFReader, gguf.get_tensor_name_map
    load_checkpoint(gguf_file)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
