"""`gemini-edge compress --search`: trials, what is left out, what is kept, and a search that goes on."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gemini
from gemini import search as module
from gemini import trials
from gemini.cli import main
from gemini.errors import CheckpointError, GateError, RecipeError, UsageError
from gemini.runtime import load
from gemini.runtime.bundle import read_bundle
from gemini.search import search_recipes
from gemini.trials import Search, Trial, hopeless, run_trial

COMMAND = ["--prune-ratios", "0,0.5", "--recipes", "nf4"]  # without calibration


@pytest.fixture(scope="module")
def llama(gemini_folder, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=400, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    LlamaForCausalLM(config).save_pretrained(path)
    gemini.GeminiTokenizer.from_pretrained(gemini_folder).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def searched(llama, tmp_path_factory) -> Path:
    """The bundle of a search over two ratios."""
    output = tmp_path_factory.mktemp("searched") / "bundle"
    assert main(["compress", llama, "--output", str(output), "--search", "--max-drop", "1e4", *COMMAND]) == 0
    return output


def results_of(output: Path) -> dict:
    return json.loads((output.parent / f"{output.name}.search" / "search.json").read_text())


def test_the_winner_is_a_bundle_that_names_the_search(searched):
    results = results_of(searched)
    names = ["nf4", "nf4, 50 % pruned"]
    assert [row["trial"] for row in results["rows"]] == names
    assert {row["state"] for row in results["rows"]} == {"measured"}
    (winner,) = (row for row in results["rows"] if row["winner"])
    fastest = min(row["latency_ms"] for row in results["rows"] if row["front"])
    assert winner["front"] and winner["trial"] == results["winner"] and winner["latency_ms"] == fastest
    bundle = read_bundle(searched)
    assert bundle.manifest.raw["search"]["winner"] == results["winner"]
    assert bundle.manifest.raw["metrics"]["gate"] == "passed" and bundle.has("pareto.png")
    report = bundle.json("report.json")
    assert report["search"]["rows"] == results["rows"] and report["drop_percent"] == winner["loss_percent"]
    assert "What it was chosen from" in bundle.text("report.html")
    assert load(searched).generate("The").text is not None
    folder = searched.parent / "bundle.search"
    assert (folder / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    page = (folder / "search.md").read_text()
    assert all(f"| {name} |" in page for name in names)
    assert sorted(p.name for p in searched.parent.iterdir()) == ["bundle", "bundle.search"]


def test_losses_refer_to_the_model_before_it_was_pruned(searched):
    folder = searched.parent / "bundle.search"
    (whole,) = {
        json.loads(path.read_text())["table"][0]["perplexity"] for path in folder.glob("trials/*/report.json")
    }
    (pruning,) = folder.glob("pruned/*/*/pruning.json")
    assert json.loads(pruning.read_text())["before"]["perplexity"] == pytest.approx(whole)
    for path in folder.glob("trials/*/report.json"):
        report = json.loads(path.read_text())
        loss = 100 * (report["table"][-1]["perplexity"] / whole - 1)
        assert report["drop_percent"] == pytest.approx(loss)


def test_a_second_search_makes_no_trial_twice_and_other_limits_pick_another(searched, llama, monkeypatch):
    monkeypatch.setattr(
        "gemini.trials.compress_model", lambda *_, **__: pytest.fail("a trial was made again")
    )
    monkeypatch.setattr("gemini.trials.prune_checkpoint", lambda *_, **__: pytest.fail("pruned again"))
    before = (searched / "manifest.json").read_bytes()
    options = {"ratios": (0, 0.5), "recipes": ("nf4",), "progress": False}
    results = search_recipes(llama, searched, max_latency=1e4, force=True, **options)
    assert {row["state"] for row in results["rows"]} == {"reused"}
    front = [row for row in results["rows"] if row["front"]]
    best = min(front, key=lambda row: row["loss_percent"])
    assert results["winner"] == best["trial"] and (searched / "manifest.json").read_bytes() != before
    smallest = min(front, key=lambda row: row["size_mb"])["trial"]
    again = search_recipes(llama, searched, max_latency=1e4, max_drop=1e4, force=True, **options)
    assert again["winner"] == smallest == "nf4, 50 % pruned"


def test_nothing_within_the_limits_replaces_nothing_and_names_the_closest(searched, llama, capsys):
    before = (searched / "manifest.json").read_bytes()
    arguments = ["compress", llama, "--output", str(searched), "--search", "--max-latency", "1e-6", "--force"]
    assert main([*arguments, *COMMAND, "--json"]) == 3
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert error["type"] == "GateError" and "closest: " in error["cause"] and "50 % pruned" in error["cause"]
    assert (searched / "manifest.json").read_bytes() == before
    assert results_of(searched)["winner"] is None


def fake_trials(monkeypatch, tmp_path, drops):
    """Trials that take no time: {(recipe, ratio): percent lost}; returns the list of those that are made."""
    made: list[tuple[str, float]] = []

    def compress(_source, bundle, recipe, *, reference, **_):
        ratio = 0.5 if reference else 0.0
        made.append((recipe, ratio))
        bundle.mkdir(parents=True)
        table = [{"name": "bundle", "size_mb": 1.0}]
        latency = {"kind": "generator", "token_ms": {"p50": 1.0}}
        facts = {"drop_percent": drops[recipe, ratio], "table": table, "latency": latency}
        (bundle / "facts").write_text(
            json.dumps(facts | {"seconds": {"load": 60.0, "compress": 40.0}, "metric": "perplexity"})
        )

    def finished(search, trial):
        path = search.bundle(trial) / "facts"
        return json.loads(path.read_text()) if path.is_file() else None

    def prune(_source, target, **_):
        target.mkdir(parents=True)
        parts = {"before": {"perplexity": 10.0}, "after": {"perplexity": 10.0 + drops["pruned"] / 10}}
        (target / "pruning.json").write_text(json.dumps({"metric": "perplexity", **parts}))

    monkeypatch.setattr("gemini.trials.compress_model", compress)
    monkeypatch.setattr("gemini.trials.prune_checkpoint", prune)
    monkeypatch.setattr("gemini.trials.finished", finished)
    return made


def one_search(tmp_path, max_drop=5.0, deadline=math.inf):
    pairs = tuple(Trial(recipe, ratio) for ratio in (0.0, 0.5) for recipe in ("int8", "int4", "nf4"))
    return Search(
        "model", "model", "text-generation", None, None, max_drop, tmp_path, "digest", deadline, pairs
    )


def test_what_is_harsher_than_a_hopeless_trial_is_not_made(monkeypatch, tmp_path):
    drops = {("int8", 0.0): 1.0, ("int4", 0.0): 10.1, ("nf4", 0.0): 9.9, ("int8", 0.5): 4.0, "pruned": 3.0}
    drops[("nf4", 0.5)] = 9.0
    made = fake_trials(monkeypatch, tmp_path, drops)
    search = one_search(tmp_path)
    outcomes = [run_trial(search, trial) for trial in search.trials]
    assert made == [("int8", 0.0), ("int4", 0.0), ("nf4", 0.0), ("int8", 0.5), ("nf4", 0.5)]
    assert outcomes[4] == {"state": "skipped", "why": "int4 loses 10.1 % already"}
    assert hopeless(replace(search, max_drop=None), search.trials[4]) == ""


def test_a_pruned_checkpoint_that_lost_too_much_is_not_quantized(monkeypatch, tmp_path):
    drops = {("int8", 0.0): 1.0, ("int4", 0.0): 2.0, ("nf4", 0.0): 2.0, "pruned": 40.0}
    made = fake_trials(monkeypatch, tmp_path, drops)
    search = one_search(tmp_path)
    outcomes = [run_trial(search, trial) for trial in search.trials]
    assert len(made) == 3
    assert [one["why"] for one in outcomes[3:]] == ["fp32, 50 % pruned, loses 40.0 % already"] * 3


def test_no_trial_starts_that_would_end_after_the_limit(monkeypatch, tmp_path):
    made = fake_trials(monkeypatch, tmp_path, {("int8", 0.0): 1.0, ("int4", 0.0): 1.0})
    search = one_search(tmp_path, deadline=module.time.time() + 50)  # a trial takes 100 s
    outcomes = [run_trial(search, trial) for trial in search.trials]
    assert made == [("int8", 0.0)]
    assert {one["state"] for one in outcomes[1:]} == {"not started"}


def copied_trials(monkeypatch, searched):
    """Trials are copies of those of ``searched``, which takes no time; returns the list of what is made."""
    made: list[str] = []

    def copy(_source, bundle, recipe, **_):
        made.append(recipe)
        (trial,) = (searched.parent / "bundle.search" / "trials").glob("nf4-0-*")
        shutil.copytree(trial, bundle)

    monkeypatch.setattr("gemini.trials.compress_model", copy)
    return made


def test_a_trial_that_cannot_be_made_does_not_end_the_search(searched, llama, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise CheckpointError("These units cannot be cut.", "Do not.")

    copied_trials(monkeypatch, searched)
    monkeypatch.setattr("gemini.trials.prune_checkpoint", refuse)
    options = {"ratios": (0, 0.5), "recipes": ("fp32",), "progress": False}
    results = search_recipes(llama, tmp_path / "b", max_drop=50, **options)
    assert [row["state"] for row in results["rows"]] == ["measured", "failed"]
    assert results["rows"][1]["why"] == "These units cannot be cut." and results["winner"] == "fp32"


@pytest.mark.parametrize("has_experts", [False, True])
def test_a_model_whose_width_cannot_be_cut_loses_experts(has_experts, searched, llama, tmp_path, monkeypatch):
    asked = []

    def prune(_source, target, *, width=0.0, experts=0.0, **_):
        asked.append({"width": width, "experts": experts})
        if width or not has_experts:
            raise RecipeError("No width can be cut." if width else "No experts.", "Do not.")
        target.mkdir(parents=True)
        part = {"perplexity": 1.0}
        report = {"metric": "perplexity", "before": part, "after": part}
        (target / "pruning.json").write_text(json.dumps(report))

    copied_trials(monkeypatch, searched)
    monkeypatch.setattr("gemini.trials.prune_checkpoint", prune)
    options = {"ratios": (0, 0.5), "recipes": ("fp32",), "progress": False}
    results = search_recipes(llama, tmp_path / "b", max_drop=50, **options)
    assert asked[:2] == [{"width": 0.5, "experts": 0.0}, {"width": 0.0, "experts": 0.5}]
    row = results["rows"][1]
    assert row["state"] == ("measured" if has_experts else "failed")
    assert has_experts or row["why"] == "No width can be cut."


def test_ctrl_c_keeps_finished_trials_and_leaves_nothing_half_written(
    searched, llama, tmp_path, monkeypatch, capsys
):
    made = copied_trials(monkeypatch, searched)
    copy = trials.compress_model

    def interrupted(source, bundle, recipe, **options):
        if recipe == "nf4":
            raise KeyboardInterrupt
        copy(source, bundle, recipe, **options)

    monkeypatch.setattr("gemini.trials.compress_model", interrupted)
    arguments = ["compress", llama, "--output", str(tmp_path / "b"), "--search", "--max-drop", "50"]
    arguments += ["--recipes", "fp32,nf4", "--prune-ratios", "0"]
    assert main(arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["b.search"]
    (kept,) = (tmp_path / "b.search" / "trials").iterdir()
    assert kept.name.startswith("fp32-0-")
    left = tmp_path / "b.search" / "trials" / ".int4.partial"  # what a killed process leaves
    left.mkdir()
    monkeypatch.setattr("gemini.trials.compress_model", copy)
    assert main(arguments) == 0 and made == ["fp32", "nf4"] and not left.exists()


def test_the_time_of_models_that_do_not_generate_is_that_of_a_call():
    shapes = [
        {"batch": 8, "tokens": 128, "ms": {"p50": 9.0}},
        {"batch": 1, "tokens": 128, "ms": {"p50": 2.0}},
    ]
    latency = {"kind": "batch", "points": shapes}
    assert module._milliseconds(latency) == 2.0
    assert module._time_of({"bundles": [{"latency": latency}]}) == "a call with one text of 128 tokens"
    picture = {"kind": "batch", "points": [{"batch": 1, "tokens": None, "ms": {"p50": 2.0}}]}
    assert module._time_of({"bundles": [{"latency": picture}]}) == "a call with one picture"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs a limit"),
        (["--max-drop", "5", "--prune-ratios", "0,1.5"], "pruned by 1.5"),
        (["--max-drop", "5", "--prune-ratios", "ten"], "are no numbers"),
        (["--max-drop", "-1"], "--max-drop -1 is impossible"),
        (["--max-latency", "0"], "--max-latency 0 is impossible"),
        (["--max-drop", "5", "--recipe", "int8"], "--recipe says what to make"),
    ],
)
def test_impossible_searches_are_refused(llama, tmp_path, capsys, options, message):
    assert main(["compress", llama, "--output", str(tmp_path / "b"), "--search", *options]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_options_of_the_search_need_it(tmp_path, capsys):
    assert main(["compress", "gemini-nano", "--output", str(tmp_path / "b"), "--max-latency", "5"]) == 2
    assert "--max-latency belongs to --search" in capsys.readouterr().err


def test_two_searches_in_one_folder_are_refused(tmp_path):
    with module._alone(tmp_path), pytest.raises(UsageError, match="Another search"), module._alone(tmp_path):
        pass


def test_a_missing_ray_is_named(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UsageError, match=r"gemini-edge\[search\]"):
        search_recipes(llama, tmp_path / "b", max_drop=5, ray="local", progress=False)


def test_no_limit_names_the_gate(tmp_path):
    results = {"closest": ["int8"], "rows": [{"trial": "int8", "latency_ms": 3.0, "loss_percent": 1.0}]}
    error = module._missed(results, module.Limits(2.0, 0.5), tmp_path)
    assert isinstance(error, GateError) and "2 ms and a loss of 0.5 %" in error.cause
