"""Whole runs of a tiny model: they learn, they can be killed, their result is a Hugging Face folder."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gemini.errors import CheckpointError, UsageError
from gemini.model.training import corpus, loop
from gemini.model.training.corpus import load_corpus
from gemini.model.training.loop import train
from gemini.model.training.options import TaskOptions
from gemini.model.training.start import load_checkpoint, load_tokenizer, make_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, options, cache):
    """The folder and the summary of an unbroken run."""
    folder = tmp_path_factory.mktemp("run") / "out"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    summary = train(options, folder, cache)
    torch.set_num_threads(threads)
    return folder, summary


def test_the_result_is_a_checkpoint_with_a_summary(finished, options):
    folder, summary = finished
    assert json.loads((folder / "training.json").read_text()) == json.loads(json.dumps(summary))
    assert [row["step"] for row in summary["history"]] == [4, 8]
    assert summary["history"][1]["loss"] < summary["history"][0]["loss"]
    assert {"caption_en_exact", "unseen_caption_zh_chrf", "sentiment_en", "perplexity"} <= summary[
        "test"
    ].keys()
    assert list((folder / "runs").glob("events*"))
    model, tokenizer = load_checkpoint(folder)
    assert (folder / "preprocessor_config.json").exists()
    assert (folder / "README.md").read_text().startswith("---\nlicense:")
    assert len(tokenizer) == model.config.vocab_size


def test_a_killed_run_resumes_to_the_same_weights(finished, options, cache, tmp_path):
    folder = tmp_path / "killed"
    recipe = tmp_path / "tiny.json"
    recipe.write_text(json.dumps(options.to_dict()))
    script = (
        "import json, sys, torch\nfrom pathlib import Path\ntorch.set_num_threads(1)\n"
        "from gemini.model.training.loop import train\n"
        "from gemini.model.training.options import TrainingOptions\n"
        "options = TrainingOptions.from_dict(json.loads(Path(sys.argv[1]).read_text()))\n"
        "train(options, Path(sys.argv[2]), Path(sys.argv[3]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(recipe), str(folder), str(cache)])
    try:
        deadline = time.monotonic() + 120
        while not list(folder.glob("state/step-????????")):
            assert process.poll() is None, "the run ended before its first checkpoint"
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "model.safetensors").exists()

    train(options, folder, cache, resume=True)
    unbroken, resumed = load_file(finished[0] / "model.safetensors"), load_file(folder / "model.safetensors")
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_a_run_starts_from_the_tower_that_was_trained_before(options, cache, tmp_path, monkeypatch):
    before = dataclasses.replace(
        options, name="before", head="image-classification", tasks={"name": TaskOptions(4, pixels=32)}
    )
    monkeypatch.setattr(loop, "load_options", {"before": before}.__getitem__)
    chained = dataclasses.replace(options, first="before", freeze_tower=True, steps=2)
    train(chained, tmp_path / "out", cache)
    tower = load_file(tmp_path / "out" / "before" / "model.safetensors")
    whole = load_file(tmp_path / "out" / "model.safetensors")
    kept = [name for name in tower if name.startswith("image.") and "positions" not in name]
    assert len(kept) > 20  # parameters, and what batch norm has counted
    assert all(torch.equal(tower[name], whole[f"model.encoder.{name}"]) for name in kept)
    figures = json.loads((tmp_path / "out" / "before" / "training.json").read_text())["test"]
    assert 0 <= figures["name_accuracy"] <= 100
    # A resumed run does not train the first part again.
    (tmp_path / "out" / "training.json").unlink()
    monkeypatch.setattr(loop, "load_options", {}.__getitem__)
    train(dataclasses.replace(chained, steps=3), tmp_path / "out", cache, resume=True)


def test_a_writer_spells_what_the_prototypes_of_a_tower_recall(options, cache, tmp_path, monkeypatch):
    tower = dataclasses.replace(
        options, name="tower", head="image-classification", tasks={"name": TaskOptions(4)}
    )
    recall = dataclasses.replace(tower, name="recall", first="tower", prototypes=True, freeze_tower=True)
    monkeypatch.setattr(loop, "load_options", {"tower": tower, "recall": recall}.__getitem__)
    writer = dataclasses.replace(options, first="recall", freeze_tower=True, steps=2, learning_rate=0.0)
    train(writer, tmp_path / "out", cache)
    towers, recalls, whole = (
        load_file(tmp_path / "out" / part / "model.safetensors") for part in ("recall/tower", "recall", ".")
    )
    kept = [name for name in towers if name.startswith(("image.stem", "image.stages", "image.projection"))]
    assert len(kept) > 20
    assert all(torch.equal(towers[name], recalls[name]) for name in kept)
    known = [name for name in recalls if "prototypes" in name and "values" not in name]
    assert len(known) == 6  # weights and biases of query, norm and keys
    assert all(torch.equal(recalls[name], whole[f"model.encoder.{name}"]) for name in kept + known)
    # What a drawing recalls starts as the tokens of its names.
    model, tokenizer = load_checkpoint(tmp_path / "out")
    drawings = load_corpus(cache, "train", ["caption"]).drawings
    names = sorted(zip(drawings.en, drawings.zh, strict=True))
    assert model.config.image_prototypes == len(names) == 8
    for number, pair in enumerate(names):
        ids = tokenizer(" ".join(pair), add_special_tokens=False)["input_ids"]
        expected = sum(model.get_input_embeddings().weight[token] for token in ids) / len(ids) ** 0.5
        found = model.get_encoder().image.prototypes.values.weight[:, number]
        torch.testing.assert_close(found, expected * model.get_encoder().text.scale)


def test_names_of_other_data_than_the_prototypes_are_refused(options, cache, tmp_path, monkeypatch):
    recall = dataclasses.replace(
        options, head="image-classification", tasks={"name": TaskOptions(4)}, prototypes=True, steps=1
    )
    train(recall, tmp_path / "recall", cache)
    fewer = dataclasses.replace(load_corpus(cache, "train", ["caption"]), names=("red circle",))
    writer = dataclasses.replace(options, start=str(tmp_path / "recall"))
    with pytest.raises(CheckpointError, match="tells 8 names apart, the data have 1"):
        make_model(writer, load_tokenizer(writer, tmp_path, cache), fewer)


def test_a_writer_starts_from_a_reader_that_was_trained_before(options, cache, tmp_path, monkeypatch):
    options = dataclasses.replace(options, model={**options.model, "encoder_layers": 2})
    before = dataclasses.replace(
        options, name="before", head="classification", tasks={"classify": TaskOptions(4)}, steps=2
    )
    monkeypatch.setattr(loop, "load_options", {"before": before}.__getitem__)
    # A rate of zero: what the writer ends with is what it started from.
    chained = dataclasses.replace(options, first="before", steps=1, learning_rate=0.0, fusion="late")
    train(chained, tmp_path / "out", cache)
    reader = load_file(tmp_path / "out" / "before" / "model.safetensors")
    writer = load_file(tmp_path / "out" / "model.safetensors")
    kept = [
        name for name in reader if name.startswith(("encoder.fusion", "shared", "encoder.image.projection"))
    ]
    assert len(kept) > 10 and any("fusion.text_norm" in name for name in kept)  # late fusion for both
    assert all(torch.equal(reader[name], writer[f"model.{name}"]) for name in kept)
    first, second = (path / "tokenizer.json" for path in (tmp_path / "out", tmp_path / "out" / "before"))
    assert first.read_text() == second.read_text()


def test_a_reader_starts_from_a_mimic_with_a_head_of_its_own(options, cache, tmp_path, monkeypatch):
    arrays = {"texts": np.frombuffer(json.dumps([f"text {at}" for at in range(150)]).encode(), np.uint8)}
    arrays["states"] = np.random.default_rng(0).normal(size=(150, 5)).astype(np.float16)
    monkeypatch.setattr(corpus, "states_path", lambda cache: tmp_path / "states.npz")
    monkeypatch.setattr(
        loop, "ensure_states", lambda cache, show: np.savez(tmp_path / "states.npz", **arrays)
    )
    before = dataclasses.replace(
        options, name="before", head="regression", tasks={"mimic": TaskOptions(4)}, steps=2
    )
    monkeypatch.setattr(loop, "load_options", {"before": before}.__getitem__)
    chained = dataclasses.replace(
        options, first="before", head="classification", tasks={"classify": TaskOptions(4)}
    )
    train(dataclasses.replace(chained, steps=1, learning_rate=0.0), tmp_path / "out", cache)
    mimic = load_file(tmp_path / "out" / "before" / "model.safetensors")
    reader = load_file(tmp_path / "out" / "model.safetensors")
    assert mimic.pop("classifier.weight").shape == (5, 32) and reader["classifier.weight"].shape == (2, 32)
    del mimic["classifier.bias"]
    assert all(torch.equal(tensor, reader[name]) for name, tensor in mimic.items() if "running" not in name)
    model, _ = load_checkpoint(tmp_path / "out")
    assert model.config.problem_type is None and model.config.id2label == {0: "negative", 1: "positive"}


def test_a_tower_of_other_widths_is_refused(options, cache, tmp_path):
    tower = dataclasses.replace(options, head="image-classification", steps=1, tasks={"name": TaskOptions(4)})
    train(tower, tmp_path / "tower", cache)
    other = dataclasses.replace(
        options, start=str(tmp_path / "tower"), model={**options.model, "image_channels": [4, 8, 32]}
    )
    with pytest.raises(CheckpointError, match="does not fit"):
        train(other, tmp_path / "out", cache)


def test_layers_of_an_encoder_without_a_rate_stay_as_they_were(finished, options, cache, tmp_path):
    run = dataclasses.replace(options, start=str(finished[0]), encoder_rate=0.0, steps=2)
    train(run, tmp_path / "out", cache)
    before, after = (load_file(folder / "model.safetensors") for folder in (finished[0], tmp_path / "out"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    layers = {name for name in before if name.startswith("model.encoder.fusion.")}
    assert len(layers) > 10 and layers <= same
    assert "model.shared.weight" not in same and any("decoder" in name for name in before.keys() - same)


def test_a_folder_with_a_run_is_not_overwritten(finished, options, cache):
    with pytest.raises(UsageError, match="already holds a run"):
        train(options, finished[0], cache)


def test_the_classifier_starts_from_a_checkpoint_with_lora_and_fgm(finished, options, cache, tmp_path):
    run = dataclasses.replace(
        options,
        head="classification",
        start=str(finished[0]),
        lora_rank=2,
        tasks={"classify": TaskOptions(batch=8, adversarial=0.1)},
        steps=4,
        evaluate_every=2,
    )
    folder = tmp_path / "classifier"
    summary = train(run, folder, cache)
    assert summary["test"]["sentiment_zh_count"] == 16
    assert summary["recipe"]["start"] == finished[0].name
    before, after = load_file(finished[0] / "model.safetensors"), load_file(folder / "model.safetensors")
    assert not any("lora" in name for name in after)
    same = "encoder.text.positions.table.weight"
    matching = [name for name in before if name.endswith(same)]
    for name in matching:
        assert torch.equal(before[name], after[name.removeprefix("model.")])
    model, _ = load_checkpoint(folder)
    assert type(model).__name__ == "GeminiForSequenceClassification"
    assert model.config.id2label == {0: "negative", 1: "positive"}


def test_early_stopping_keeps_the_best_weights(options, cache, tmp_path):
    # A rate this high makes the loss worse at once, so the run ends after `patience` evaluations.
    tasks = {"classify": TaskOptions(batch=4)}
    run = dataclasses.replace(
        options, tasks=tasks, steps=50, evaluate_every=1, patience=3, learning_rate=0.0, warmup=0
    )
    summary = train(run, tmp_path / "out", cache)
    assert summary["steps"] < 50
    assert summary["best_step"] == summary["history"][-4]["step"]
