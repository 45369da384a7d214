"""A Vision Transformer is trained on digits, compressed by every recipe, and measured on the other half."""

import json

import numpy as np
import pytest
import torch

from gemini import vit_report
from gemini.runtime import load
from gemini.vit_report import Digits, load_digits, main, shifted, waves


def test_positions_start_as_sines_of_row_and_column():
    found = waves(3, 16).double().numpy()
    for row in range(3):
        for column in range(3):
            for k in range(4):
                turn = 10_000.0 ** -(k / 3)
                expected = [
                    np.sin(row * turn),
                    np.cos(row * turn),
                    np.sin(column * turn),
                    np.cos(column * turn),
                ]
                assert found[3 * row + column, k::4] == pytest.approx(expected, abs=1e-5)


def test_a_shift_moves_all_pixels_alike_and_repeats_the_edge():
    torch.manual_seed(0)
    batch = torch.randn(2, 1, 20, 20)
    moved = shifted(batch)
    places = range(-vit_report.SHIFT, vit_report.SHIFT + 1)
    clamped = {
        (down, right): batch[..., [min(max(i + down, 0), 19) for i in range(20)], :][
            ..., [min(max(j + right, 0), 19) for j in range(20)]
        ]
        for down in places
        for right in places
    }
    assert sum(torch.equal(moved, one) for one in clamped.values()) == 1


def test_the_halves_share_no_image():
    train, test = load_digits()
    assert abs(len(train.labels) - len(test.labels)) <= 1 and len(train.labels) > 800
    assert train.images.dtype == np.uint8 and train.images.max() == 255


def test_every_recipe_is_measured_on_the_test_half(tmp_path, monkeypatch, capsys):
    train, test = load_digits()
    few = [Digits(half.images[:n], half.labels[:n]) for half, n in ((train, 48), (test, 40))]
    monkeypatch.setattr(vit_report, "load_digits", lambda: few)
    small = {
        "EDGE": 16,
        "WIDTH": 64,
        "LAYERS": 1,
        "EPOCHS": 2,
        "PATCHES": 2,
        "SHIFT": 1,
        "CALIBRATION": 8,
        "ROUNDS": 1,
    }
    for name, value in small.items():
        monkeypatch.setattr(vit_report, name, value)
    assert main([str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["test_images"] == 40 and [row["name"] for row in found["rows"]] == [
        "fp32",
        "int8",
        "int8-static",
    ]
    session = load(tmp_path / "int8-static", threads=1)
    answers = session.classify(few[1].pictures())
    pairs = zip(answers, few[1].labels, strict=True)
    right = sum(labels[0].label == f"LABEL_{digit}" for labels, digit in pairs)
    assert found["rows"][2]["accuracy"] == pytest.approx(100 * right / 40)
    assert all(row["ms"] > 0 and row["size_mb"] > 0 for row in found["rows"])
    before = (tmp_path / "vit" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(vit_report, "RECIPES", ("fp32",))
    assert main([str(tmp_path)]) == 0  # the checkpoint is used again
    assert (tmp_path / "vit" / "model.safetensors").stat().st_mtime_ns == before
