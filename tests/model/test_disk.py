"""Weights in files: the same numbers, mapped, and nothing left behind."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemini.errors import UsageError
from gemini.model import disk
from gemini.model.checkpoint import load_checkpoint
from gemini.model.disk import WORKING, kept, room_for

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")


@pytest.fixture(autouse=True)
def even_small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_SMALLEST", 1)


def file_of(tensor: torch.Tensor) -> str:
    """The file that a tensor's memory is mapped from, "" for none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *rest = line.split(maxsplit=5)
        begin, end = (int(part, 16) for part in span.split("-"))
        if begin <= tensor.data_ptr() < end:
            return rest[4] if len(rest) > 4 and rest[4].startswith("/") else ""
    return ""


def in_half(folder: Path, target: Path, dtype: torch.dtype) -> Path:
    """The same checkpoint with weights of that type."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    save_file({name: each.to(dtype) for name, each in weights.items()}, target / "model.safetensors")
    return target


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_become_float32_in_files(llama: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    source = in_half(llama, tmp_path / "half", dtype)
    plain = load_checkpoint(source)
    assert not any(file_of(each) for each in plain.model.parameters())
    with room_for(tmp_path / "out", WORKING) as room:
        checkpoint = load_checkpoint(source)
        assert not [path for path in room.folder.rglob("*") if path.suffix == ".safetensors"]
        for (name, expected), actual in zip(
            plain.model.named_parameters(), checkpoint.model.parameters(), strict=True
        ):
            assert str(room.folder) in file_of(actual), name
            assert torch.equal(actual, expected), name
        assert checkpoint.source == plain.source
        ends = [each.model.generation_config.eos_token_id for each in (checkpoint, plain)]
        assert ends[0] == ends[1]
    assert not list(tmp_path.glob(".out*"))
    assert torch.equal(next(checkpoint.model.parameters()), next(plain.model.parameters()))


def test_float32_files_are_mapped_where_they_lie(llama: Path, tmp_path: Path) -> None:
    with room_for(tmp_path / "out", WORKING) as room:
        checkpoint = load_checkpoint(llama)
        assert list(room.folder.iterdir()) == []
        assert {file_of(each) for each in checkpoint.model.parameters()} == {str(llama / "model.safetensors")}


def test_shards(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    plain = load_checkpoint(llama)
    plain.model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="4KB")
    plain.tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    with room_for(tmp_path / "out", WORKING) as room:
        checkpoint = load_checkpoint(folder)
        for actual, expected in zip(checkpoint.model.parameters(), plain.model.parameters(), strict=True):
            assert str(room.folder) in file_of(actual)
            assert torch.equal(actual, expected.float())


def test_gguf(gguf_file: Path, tmp_path: Path) -> None:
    plain = load_checkpoint(gguf_file)
    with room_for(tmp_path / "out", WORKING) as room:
        checkpoint = load_checkpoint(gguf_file)
        assert [path for path in room.folder.rglob("*") if path.is_file()] == []
        for actual, expected in zip(checkpoint.model.parameters(), plain.model.parameters(), strict=True):
            assert str(room.folder) in file_of(actual)
            assert torch.equal(actual, expected)


def test_integers_stay_integers(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6).view(2, 3),
        "b": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "c": torch.tensor([True, False, True]),
        "d": torch.tensor(3.0, dtype=torch.bfloat16),
        "e": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "source.safetensors")
    disk._write_float32(tmp_path / "source.safetensors", tmp_path / "target.safetensors")
    made = load_file(tmp_path / "target.safetensors")
    assert made.keys() == tensors.keys()
    for name, expected in tensors.items():
        wanted = expected.float() if expected.is_floating_point() else expected
        assert made[name].dtype == wanted.dtype
        assert torch.equal(made[name], wanted)


def test_what_fits_stays_where_it_is(llama: Path, tmp_path: Path) -> None:
    weight = torch.ones(300, 300)
    assert kept(weight) is weight
    for limit in (None, 2 * WORKING):
        with room_for(tmp_path / "out", limit) as room:
            load_checkpoint(llama)
            assert kept(weight) is weight
            assert room.to_dict()["weights_on_disk"] is False


def test_a_kept_tensor_may_be_changed(llama: Path, tmp_path: Path) -> None:
    weight = torch.arange(12.0).view(3, 4).T  # not contiguous
    with room_for(tmp_path / "out", WORKING) as room:
        load_checkpoint(llama)
        other = kept(weight)
        assert str(room.folder) in file_of(other)
        assert torch.equal(other, weight)
        other.mul_(2)
    assert torch.equal(other, 2 * weight)


def test_too_little_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too little memory"), room_for(tmp_path / "out", 1e9):
        pass
    with pytest.raises(UsageError), room_for(tmp_path / "out", float("nan")):
        pass
    assert not list(tmp_path.iterdir())
