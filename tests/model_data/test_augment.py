"""Compositing against pillow, edges against a slow loop, and what no variation may break."""

import numpy as np
import pytest
import torch
from PIL import Image

from gemini.model.data.augment import _backgrounds, _edges, _jitter, _move, draw, may_flip, shrink


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flips(count: int, allowed: bool = False) -> torch.Tensor:
    return torch.full((count,), allowed)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (64, 64, 64, 4), dtype=torch.uint8, generator=generator(1))


def test_evaluation_composites_on_white_as_pillow_does(pixels: torch.Tensor) -> None:
    random = generator()
    state = random.get_state()
    drawn = draw(pixels[:3], random, train=False, flip=flips(3, True))
    for image, raw in zip(drawn, pixels, strict=False):
        white = Image.new("RGBA", (64, 64), "white")
        expected = np.asarray(Image.alpha_composite(white, Image.fromarray(raw.numpy())).convert("RGB"))
        found = (image.permute(1, 2, 0).numpy() * 0.5 + 0.5) * 255
        # Pillow rounds to whole steps.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1.01)
    assert torch.equal(random.get_state(), state)


def test_a_seed_says_what_a_batch_looks_like(pixels: torch.Tensor) -> None:
    before = pixels.clone()
    first, again, other = (draw(pixels, generator(seed), True, flips(64, True)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.equal(pixels, before)
    assert first.shape == (64, 3, 64, 64) and first.dtype == torch.float32
    assert first.min() >= -1 and first.max() <= 1


def test_a_batch_in_which_nothing_or_everything_is_chosen_works(pixels: torch.Tensor) -> None:
    for seed in range(40):
        assert draw(pixels[:1], generator(seed), True, flips(1)).isfinite().all()


def test_only_what_may_be_mirrored_is_mirrored() -> None:
    image = torch.zeros(400, 4, 32, 32)
    image[:, :, 8:24, 4:12] = 1  # left of the middle, even after a shift and a turn
    for allowed, low, high in ((False, 0, 0), (True, 160, 240)):  # a fair coin, 4 standard deviations
        moved = _move(image, flips(400, allowed), generator())[:, 3]
        mirrored = (moved[:, :, 16:].sum((1, 2)) > moved[:, :, :16].sum((1, 2))).sum().item()
        assert low <= mirrored <= high


def test_moving_keeps_colours_in_step_with_alpha() -> None:
    image = torch.zeros(32, 4, 64, 64)
    image[:, 0, 16:48, 16:48] = 1  # opaque red on clear black, premultiplied
    image[:, 3, 16:48, 16:48] = 1
    moved = _move(image, flips(32), generator())
    torch.testing.assert_close(moved[:, 0], moved[:, 3], rtol=0, atol=0)
    assert moved[:, 1:3].abs().max() == 0
    area = moved[:, 3].mean((1, 2)) / 0.25
    # Scales 0.7 to 1.15 squared; aspect and slant keep the area, a shift of 10 % loses none of this one.
    assert area.min() > 0.47 and area.max() < 1.36 and area.std() > 0.1


def test_jitter_stays_within_alpha() -> None:
    alpha = torch.rand(16, 1, 8, 8, generator=generator(2))
    colour = _jitter(torch.rand(16, 3, 8, 8, generator=generator(3)) * alpha, alpha, generator())
    assert (colour >= 0).all() and (colour <= alpha).all()


def test_backgrounds_are_white_plain_or_graded() -> None:
    found = _backgrounds(torch.Size((600, 16, 16)), generator())
    assert found.shape == (600, 3, 16, 16) and found.min() >= 0 and found.max() <= 1
    white = (found == 1).flatten(1).all(1)
    graded = found.flatten(2).std(2).amax(1) > 1e-3
    # Shares 0.3 and 0.3 of 600: 180 each, 4 standard deviations.
    assert 135 < white.sum() < 225 and 135 < graded.sum() < 225 and not (white & graded).any()


def test_edges_are_the_steepest_sobel_slope() -> None:
    image = torch.rand(2, 4, 7, 9, generator=generator())
    across = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    padded = np.pad(image.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    expected = np.zeros((2, 1, 7, 9))
    for b, y, x in np.ndindex(2, 7, 9):
        steep = []
        for channel in padded[b]:
            window = channel[y : y + 3, x : x + 3]
            steep.append(np.hypot((window * across).sum(), (window * across.T).sum()))
        expected[b, 0, y, x] = min(max(steep), 1)
    np.testing.assert_allclose(_edges(image).numpy(), expected, rtol=0, atol=1e-5)  # float32 rounding


@pytest.mark.parametrize(
    "name",
    [
        "left arrow",
        "backhand index pointing right",
        "flag: norway",
        "three o’clock",
        "ten-thirty",
        "keycap: 5",
        "input latin letters",
        "ok button",
        "magnifying glass tilted left",
        "waxing crescent moon",
        "left-facing fist",
        "1st place medal",
    ],
)
def test_a_name_with_a_side_or_writing_may_not_be_mirrored(name: str) -> None:
    assert not may_flip(name) and not may_flip(name.upper())


@pytest.mark.parametrize(
    "name", ["grinning face", "red heart", "dog", "bright lantern", "upper lip", "flagon"]
)
def test_others_may(name: str) -> None:
    assert may_flip(name)


def test_shrinking_takes_the_mean_of_what_is_covered() -> None:
    pixels = torch.zeros(1, 4, 4, 4, dtype=torch.uint8)
    pixels[0, :2, :2] = torch.tensor([200, 100, 40, 255])
    pixels[0, 0, 2] = torch.tensor(
        [80, 80, 80, 255]
    )  # alone in a clear square: its colour, a quarter of alpha
    small = shrink(pixels, 2)[0]
    assert small[0, 0].tolist() == [200, 100, 40, 255]
    assert small[0, 1].tolist() == [80, 80, 80, 64]
    assert small[1].eq(0).all()


def test_a_drawing_of_the_wanted_size_is_left_as_it_is(pixels: torch.Tensor) -> None:
    assert shrink(pixels, 64) is pixels


def test_a_share_is_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    stripes = torch.zeros(200, 32, 32, 4, dtype=torch.uint8)
    stripes[:, :, ::2], stripes[..., 3] = 255, 255
    monkeypatch.setattr("gemini.model.data.augment._move", lambda image, *_: torch.zeros_like(image))
    counts = []
    for still in (0.0, 0.5, 1.0):
        shown = draw(stripes, generator(0), True, flips(200), still)
        contrast = (shown[..., 0::2] - shown[..., 1::2]).abs().mean((1, 2, 3))
        counts.append(int((contrast > 0.4).sum()))
    # Some of those that stay are blurred or drawn as lines.
    assert counts[0] == 0 and 70 < counts[1] < 120 and counts[2] > 160
