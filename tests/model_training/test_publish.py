"""What is published is the run's model in half the bytes, readable by everything that reads checkpoints."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from gemini.errors import CheckpointError, UsageError
from gemini.model.checkpoint import load_checkpoint
from gemini.model.training import start
from gemini.model.training.publish import publish
from gemini.model.training.start import make_model, save_final


@pytest.fixture
def run(model, tokenizer, tmp_path):
    save_final(model, tokenizer, tmp_path / "run")
    (tmp_path / "run" / "README.md").write_text("card")
    (tmp_path / "run" / "state").mkdir()
    return tmp_path / "run"


def test_half_the_bytes_and_the_same_model(run, model, options, tokenizer, corpus, tmp_path):
    publish(run, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "README.md", "preprocessor_config.json", "tokenizer.json"} < names
    assert "state" not in names and [path.name for path in tmp_path.glob(".*")] == []
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.float16}
    loaded = load_checkpoint(str(tmp_path / "out"), None).model
    again = make_model(dataclasses.replace(options, start=str(tmp_path / "out")), tokenizer, corpus)
    for one in (loaded, again, start.load_checkpoint(tmp_path / "out")[0]):
        assert next(one.parameters()).dtype == torch.float32
    for (name, tensor), own in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, own, rtol=1e-3, atol=1e-6, msg=name)


def test_nothing_is_overwritten_and_what_does_not_fit_is_refused(run, model, tokenizer, tmp_path):
    with pytest.raises(UsageError, match="exists"):
        publish(run, tmp_path)
    with torch.no_grad():
        next(model.parameters()).fill_(1e6)
    save_final(model, tokenizer, run)
    with pytest.raises(CheckpointError, match="fp16"):
        publish(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
