"""The model that ships: what its card promises, from the bundle and from the checkpoint beside it."""

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import gemini
from gemini.cli import main
from gemini.model.checkpoint import load_checkpoint
from gemini.model.training.evaluate import captions, has_loop
from gemini.runtime.bundle import read_bundle

HOME = Path(str(files("gemini.pretrained"))) / "gemini-nano"


@pytest.fixture(scope="module")
def model() -> gemini.Model:
    return gemini.load_model()


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """A heart, a face and an umbrella, in a few strokes."""
    drawn = []
    for kind in ("heart", "face", "umbrella"):
        image = Image.new("RGB", (512, 512), "white")
        pen = ImageDraw.Draw(image)
        if kind == "heart":
            pen.ellipse((75, 90, 270, 285), fill="#e02030")
            pen.ellipse((242, 90, 437, 285), fill="#e02030")
            pen.polygon([(90, 240), (422, 240), (256, 450)], fill="#e02030")
        elif kind == "face":
            pen.ellipse((60, 60, 452, 452), fill="#ffd84a")
            pen.ellipse((160, 180, 210, 250), fill="#5b3a00")
            pen.ellipse((302, 180, 352, 250), fill="#5b3a00")
            pen.arc((150, 215, 362, 380), 20, 160, fill="#5b3a00", width=20)
        else:
            pen.pieslice((56, 81, 456, 481), 180, 360, fill="#7a3fb0")
            pen.line((256, 280, 256, 430), fill="#555555", width=18)
            pen.arc((256, 395, 320, 460), 0, 180, fill="#555555", width=18)
        drawn.append(image)
    return drawn


def test_the_bundle_is_made_of_the_checkpoint_beside_it():
    manifest = json.loads((HOME / "bundle" / "manifest.json").read_text())
    assert manifest["provenance"]["source"]["sha256"] == load_checkpoint("gemini-nano").source["sha256"]
    assert read_bundle(HOME / "bundle").manifest.task == "text2text-generation"


def test_it_is_as_small_as_promised():
    sizes = {
        part: sum(file.stat().st_size for file in (HOME / part).iterdir()) / 1e6
        for part in ("checkpoint", "bundle")
    }
    assert sizes["checkpoint"] <= 20 and sizes["bundle"] <= 12


def test_it_is_loaded_and_used_without_torch(tmp_path, pictures):
    pictures[0].save(tmp_path / "heart.png")
    program = (
        "import sys, gemini\nmodel = gemini.load_model('gemini-nano')\n"
        "print(model.generate_caption(gemini.load_image(sys.argv[1])))\n"
        "print(model.classify('What a wonderful film').label)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "heart.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    caption, label = done.stdout.splitlines()
    assert "heart" in caption and label == "positive"


def test_verbs_know_it_by_name_unless_a_folder_has_that_name(tmp_path, pictures, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures[2].save("umbrella.png")
    assert main(["run", "gemini-nano", "--image", "umbrella.png"]) == 0
    assert "umbrella" in capsys.readouterr().out
    assert main(["verify", "gemini-nano"]) == 0
    assert str(HOME / "bundle") in capsys.readouterr().out
    Path("gemini-nano").mkdir()
    assert main(["verify", "gemini-nano"]) == 2
    assert "manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize("language", ["en", "zh"])
def test_captions_are_those_of_the_checkpoint_in_torch(model, pictures, language):
    checkpoint = load_checkpoint("gemini-nano")
    pixels = checkpoint.processor(pictures, return_tensors="pt")["pixel_values"]
    expected = captions(checkpoint.model, checkpoint.tokenizer, pixels, language)
    assert [model.generate_caption(image, language).strip() for image in pictures] == expected
    assert len(set(expected)) == len(pictures)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("What a wonderful film", "positive"),
        ("Great phone, it works very well.", "positive"),
        ("A terrible waste of money.", "negative"),
        ("The food was awful and the service was slow.", "negative"),
        ("质量很好，非常喜欢", "positive"),
        ("太差了，再也不会买了", "negative"),
    ],
)
def test_plain_opinions_are_understood(model, text, label):
    found = model.classify(text)
    assert found.label == label and 0.5 < found.score <= 1


def test_stories_go_on_without_loops(model):
    options = {"max_length": 80, "temperature": 0.7, "top_k": 40, "top_p": 0.95}
    stories = [model.generate_text("Once upon a time", seed=seed, **options) for seed in range(5)]
    assert stories[0] == model.generate_text("Once upon a time", seed=0, **options)
    assert len(set(stories)) == 5 and sum(map(has_loop, stories)) <= 1
    assert np.mean([len(story.split()) for story in stories]) > 25
