"""--recover: a compressed or pruned generator learns from what it was, and goes on after a kill."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import gemini
from gemini import pipeline, recovery
from gemini.benchmarks.text import TextSource, default_text
from gemini.cli import main
from gemini.compress import distill as loop
from gemini.compress.apply import run_recipe
from gemini.compress.recipe import load_recipe
from gemini.compress.recover import divergence, twin
from gemini.errors import UsageError
from gemini.model.checkpoint import load_checkpoint
from gemini.pipeline import compress_model
from gemini.pruning import prune_checkpoint
from gemini.recovery import make_lessons
from gemini.runtime import load


@pytest.fixture(scope="module")
def llama(gemini_folder, tmp_path_factory):
    """A tiny Llama with logits of some size, so that there is something to recover."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=400, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(8)
    model.save_pretrained(path)
    gemini.GeminiTokenizer.from_pretrained(gemini_folder).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(default_text().calibration[:16_000])
    return str(path)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Runs end after 12 short steps, however long a busy machine takes for them."""
    monkeypatch.setattr(recovery, "LENGTH", 64)
    monkeypatch.setattr(recovery, "HELD_OUT", 8)
    made = loop.Distillation
    options = {"steps": 12, "warmup": 2, "rate": 0.005, "code_rate": 0.002, "patience": 99}
    monkeypatch.setattr(recovery, "Distillation", lambda minutes, **given: made(1e9, **given | options))


def test_a_killed_run_goes_on_and_leaves_a_bundle_nearer_to_fp32(llama, text, tmp_path, monkeypatch, capsys):
    steps, real = [], loop._step

    def step(*args):
        steps.append(1)
        if len(steps) == 9:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(loop, "_step", step)
    arguments = ["compress", str(llama), "--recipe", "int4", "--calibration", text, "--recover", "1"]
    arguments += ["--output", str(tmp_path / "b"), "--json"]
    assert main(arguments) == 130
    assert [p.name for p in tmp_path.iterdir()] == [".b.recovery"]
    assert main(arguments) == 0
    assert len(steps) < 9 + 12
    assert [p.name for p in tmp_path.iterdir()] == ["b"]

    captured = capsys.readouterr()
    report = json.loads(captured.out.splitlines()[-1])
    assert re.search(r"^learned [\d.]+ -> [\d.]+ nats a token from the teacher, 12 steps", captured.err, re.M)
    learned = json.loads((tmp_path / "b" / "manifest.json").read_text())["recovery"]
    assert learned == report["recovery"] and learned["after"] < 0.98 * learned["before"]
    assert learned["text"]["tokens"] + learned["text"]["held_out_tokens"] > 4000
    assert "Recovery" in (tmp_path / "b" / "report.html").read_text()
    # What was learned is in the files: the runtime measures the divergence on the same rows.
    lessons = make_lessons(load_checkpoint(str(llama)), TextSource("text.txt", Path(text).read_text()), 1)
    ids = torch.from_numpy(lessons.held_out)
    with torch.no_grad():
        known = load_checkpoint(str(llama)).model(ids).logits
    found = torch.from_numpy(load(tmp_path / "b").logits(lessons.held_out))
    assert float(divergence(found, known)) == pytest.approx(learned["after"], rel=0.05)  # int8 activations


def test_a_planned_size_is_settled_before_minutes_are_spent(llama, text, tmp_path, monkeypatch):
    checkpoint, source = load_checkpoint(str(llama)), TextSource("t", Path(text).read_text())
    made = recovery.prepare_recovery(checkpoint, tmp_path / "b", 1, None, source, progress=False)
    weights = {name: value.clone() for name, value in checkpoint.model.state_dict().items()}
    events, folder = [], tmp_path / "folder"
    folder.mkdir()

    def export(checkpoint, *_args):
        scale = checkpoint.model.model.layers[0].mlp.up_proj.scales
        events.append(f"export {float(scale.sum())}")
        (folder / "file").write_bytes(b"12345")
        return {}

    monkeypatch.setattr(pipeline, "_export", export)

    def build(better):
        events.clear()
        stages, resized = pipeline.Stages(False), lambda size: events.append(size) or better
        return pipeline._build(checkpoint, load_recipe("int4"), [], folder, stages, made, resized, False)

    recipe = load_recipe("int8")
    assert build(recipe) == ({}, 5, recipe)  # too large: nothing was learned for it
    assert len(events) == 2 and events[1] == 5
    manifest, size, again = build(None)
    assert manifest["recovery"]["steps"] == 12 and size > 5 and again is None
    first, _, second = events
    assert first != second  # exported again, with what was learned
    assert all(torch.equal(value, weights[name]) for name, value in checkpoint.model.state_dict().items())


def test_a_run_with_other_options_does_not_go_on(llama, text, tmp_path):
    checkpoint, source = load_checkpoint(str(llama)), TextSource("t", Path(text).read_text())
    made = recovery.prepare_recovery(checkpoint, tmp_path / "b", 1, None, source, progress=False)
    student, states = twin(checkpoint.model), tmp_path / ".b.recovery"
    found = []
    for cuts in ({"width": 1}, {"width": 1}, {"width": 2}):
        report = recovery.recover_pruned(student, checkpoint.model, made, cuts, "lora", progress=False)
        found.append(([p.name for p in states.iterdir()], report["history"][0]["seconds"]))
    assert found[0][0] == found[1][0] != found[2][0] and len(found[2][0]) == 1
    recovery.forget(tmp_path / "b")
    assert not states.exists()


@pytest.mark.parametrize("adapters", [None, pytest.param("lora", marks=pytest.mark.slow), "qlora"])
def test_a_pruned_model_recovers_before_tokens_go(llama, text, tmp_path, capsys, adapters):
    arguments = ["prune", str(llama), "--width", "0.5", "--calibration", text, "--recover", "1"]
    arguments += ["--adapters", adapters] if adapters else []
    assert main([*arguments, "--output", str(tmp_path / "small"), "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out.splitlines()[-1])
    assert report["recovery"]["after"] < report["recovery"]["before"]
    assert re.search(r"^recovery    [\d.]+ -> ", captured.err, re.M)
    cut, kept = (report[part]["kl"] for part in ("unrecovered", "after"))
    assert kept < cut or adapters == "qlora"  # whose weights were rounded to NF4 besides
    assert re.search(r"^perplexity  [\d.]+ -> [\d.]+ -> [\d.]+$", captured.err, re.M)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert model.config.intermediate_size == 64
    before = load_checkpoint(str(llama)).model
    assert torch.equal(model.get_input_embeddings().weight, before.get_input_embeddings().weight)
    assert not any("lora" in name for name in model.state_dict())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


def test_another_model_may_be_the_teacher(llama, text, tmp_path):
    source = TextSource("t", Path(text).read_text())
    checkpoint = load_checkpoint(str(llama))
    own, other = (
        recovery.prepare_recovery(checkpoint, tmp_path / "b", 1, teacher, source, progress=False)
        for teacher in (None, str(llama))
    )
    assert own.teacher is None and other.teacher is not checkpoint.model
    student = twin(checkpoint.model)
    run_recipe(replace(checkpoint, model=student), load_recipe("nf4"), progress=False)
    with torch.no_grad():  # the teacher says something else than the student ever did
        other.teacher.model.norm.weight.mul_(-1)
    report = recovery.recover_quantized(student, checkpoint.model, other, load_recipe("nf4"), progress=False)
    assert report["before"] > 1 and report["after"] < report["before"]


def test_lessons_are_the_users_text_or_the_models_own(llama, text, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checkpoint = load_checkpoint(str(llama))
    source = TextSource("text.txt", Path(text).read_text())
    own = make_lessons(checkpoint, source, 10, progress=False)
    assert own.rows.shape[1] == own.held_out.shape[1] == 64 and len(own.held_out) == 8
    assert 9 < own.minutes <= 10 and own.described["name"] == "text.txt"
    sampled = [make_lessons(checkpoint, None, minutes, progress=False) for minutes in (8, 16)]
    # As many rows of the built-in text beside them.
    assert [len(each.rows) + 8 for each in sampled] == [2 * 64, 2 * 128]
    assert sampled[0].rows[0].tolist() == sampled[1].rows[0].tolist()
    assert sampled[1].held_out.tolist() not in sampled[1].rows.tolist()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda m, t, o: compress_model(m, o, "fp32", recover=1), "have nothing to recover"),
        (lambda m, t, o: compress_model(m, o, "int4", recover=-1), "-1 is impossible"),
        (lambda m, t, o: compress_model(m, o, "int4", recover=float("nan")), "impossible"),
        (lambda m, t, o: compress_model(m, o, "int4", recover=1, calibration=t), "too few"),
        (lambda m, t, o: compress_model(m, o, "int4", teacher=m), "--recover"),
        (lambda m, t, o: prune_checkpoint(m, o, width=0.5, adapters="lora"), "--recover"),
        (lambda m, t, o: prune_checkpoint(m, o, vocabulary=[t], recover=1), "loses nothing to recover"),
    ],
)
def test_what_cannot_be_recovered_is_refused(llama, tmp_path, run, message):
    short = tmp_path / "short.txt"
    short.write_text("A short text. " * 50)
    with pytest.raises(UsageError, match=message):
        run(str(llama), str(short), tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]


def test_a_model_that_does_not_generate_is_refused(tmp_path):
    class Embedder:
        family, tokenizer, task = "encoder", object(), "feature-extraction"

    with pytest.raises(UsageError, match="feature-extraction"):
        make_lessons(Embedder(), None, 1)


def test_a_teacher_with_other_tokens_is_refused(llama, gemini_folder, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=408, **sizes)).save_pretrained(tmp_path / "other")
    gemini.GeminiTokenizer.from_pretrained(gemini_folder).save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="408 tokens, the model 400"):
        compress_model(str(llama), tmp_path / "b", "int4", recover=1, teacher=str(tmp_path / "other"))
