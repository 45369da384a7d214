"""Drawings as a model sees them: on a background, and in training varied so that the hand matters less.

    pixels = draw(torch.from_numpy(drawings.pixels[rows]), generator, train=True, flip=may_flip_rows)

Every random number comes from the generator given, so a seed says what a batch looks like. What only some
drawings get is computed for those alone, as this runs between the steps of a training on few cores. The noise
of texts is in `gemini.model.data.noise`.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor

# What shares of a training batch get.
_GRADIENT, _WHITE = 0.3, 0.3
_GREY, _LINES, _BLUR, _NOISE, _ERASE = 0.05, 0.06, 0.2, 0.2, 0.15

# Names of things that a mirror turns into something else, or whose drawings carry writing.
_SIDED = re.compile(
    r"\d|\b(?:left|right|leftwards|rightwards|clockwise|counterclockwise|anticlockwise|arrows?|up|down|back|end|soon|"
    r"next|previous|last|fast|forward|reverse|clock|o’clock|o'clock|oclock|thirty|watch|timer|hourglass|flags?|"
    r"button|keycap|letters?|latin|lowercase|uppercase|numbers?|input|symbols?|sign|place|hundred|points|mark|"
    r"marks|question|exclamation|information|copyright|registered|trade|medal|currency|dollar|yen|euro|pound|"
    r"banknote|chart|increasing|decreasing|moon|quarter|crescent|waxing|waning|calendar|exchange|atm|"
    r"aries|taurus|gemini|cancer|leo|virgo|libra|scorpio|sagittarius|capricorn|aquarius|pisces|ophiuchus|"
    r"yin|om|note|notes|score|keyboard|newspaper|abcd|japanese|store|stop|vs|ok|sos|id|new|free|cool|zzz|"
    r"facing|pointing|divide|plus|minus|multiply|infinity|postbox|mailbox|anger)\b"
)


def may_flip(en: str) -> bool:
    """Whether the mirror image of the thing called `en` is still called that."""
    return not _SIDED.search(en.lower())


def shrink(pixels: Tensor, side: int) -> Tensor:
    """Drawings (B, H, W, 4) uint8 with ``side`` pixels along a side, each the mean of those it stands for."""
    if pixels.shape[1] == side:
        return pixels
    image = F.interpolate(torch.cat(_premultiplied(pixels), dim=1), size=(side, side), mode="area")
    colour, alpha = image[:, :3], image[:, 3:]
    straight = torch.cat([colour / alpha.clamp_min(1e-6), alpha], dim=1)
    return (straight.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous()


def draw(pixels: Tensor, generator: torch.Generator, train: bool, flip: Tensor, still: float = 0.0) -> Tensor:
    """Pixels of drawings -> the model's input.

    Args:
        pixels: (B, H, W, 4) uint8, RGBA with straight alpha.
        generator: the source of all randomness; untouched unless `train`.
        train: vary place, size, colour and background; otherwise composite on white.
        flip: (B,) bool, whether a drawing may be mirrored; half of those are, in training.
        still: the share of drawings that stay where they are, and as sharp: moving one blurs it.

    Returns:
        (B, 3, H, W) float32, (x / 255 - 0.5) / 0.5.
    """
    if not train:
        return on_white(pixels)
    colour, alpha = _premultiplied(pixels)
    colour = _jitter(colour, alpha, generator)
    image = torch.cat([colour, alpha], dim=1)
    moved = _move(image, flip, generator)
    if still:
        kept = _chosen(generator, len(image), still)
        moved[kept] = image[kept]
    colour, alpha = moved[:, :3], moved[:, 3:]
    composed = colour + (1 - alpha) * _backgrounds(pixels.shape[:3], generator)
    composed = _restyle(composed, moved, generator)
    return _normalized(_degrade(composed, generator))


def on_white(pixels: Tensor) -> Tensor:
    """What `draw` makes of the same pixels without training: nothing about it is random."""
    colour, alpha = _premultiplied(pixels)
    return _normalized(colour + 1 - alpha)


def _premultiplied(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Colour times alpha (B, 3, H, W) and alpha (B, 1, H, W) of uint8 pixels (B, H, W, 4).

    What is interpolated at an edge is then not mixed with the colour of clear pixels.
    """
    image = pixels.permute(0, 3, 1, 2).float() / 255
    return image[:, :3] * image[:, 3:], image[:, 3:]


def _normalized(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) - 0.5) / 0.5


def _uniform(generator: torch.Generator, count: int, low: float, high: float, columns: int = 1) -> Tensor:
    """(count, columns, 1, 1) numbers in [low, high)."""
    return low + (high - low) * torch.rand(count, columns, 1, 1, generator=generator)


def _chosen(generator: torch.Generator, count: int, share: float) -> Tensor:
    """The rows out of `count` that something happens to, each with probability `share`."""
    return (torch.rand(count, generator=generator) < share).nonzero().view(-1)


def _luma(colour: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W), brightness as ITU-R BT.601 weighs it."""
    return 0.299 * colour[:, :1] + 0.587 * colour[:, 1:2] + 0.114 * colour[:, 2:]


def _jitter(colour: Tensor, alpha: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation, a little of each channel; names hold colours, so hues stay near."""
    count = len(colour)
    luma = _luma(colour)
    colour = luma + (colour - luma) * _uniform(generator, count, 0.5, 1.4)
    contrast = _uniform(generator, count, 0.7, 1.3)
    lift = (1 - contrast) * 0.5 + _uniform(generator, count, -0.12, 0.12)
    colour = (colour * contrast + alpha * lift) * _uniform(generator, count, 0.9, 1.1, columns=3)
    # A premultiplied colour lies between 0 and its alpha.
    return torch.minimum(colour.clamp_min(0), alpha)


def _move(image: Tensor, flip: Tensor, generator: torch.Generator) -> Tensor:
    """One affine map: scale 0.7-1.15, aspect and slant to 12 %, rotation to 15°, shift to 10 %, mirror."""
    count = len(image)
    mirrored = flip & (torch.rand(count, generator=generator) < 0.5)
    scale, aspect, slant, angle, right, down = (
        _uniform(generator, count, low, high).view(-1)
        for low, high in (
            (0.7, 1.15),
            (-0.12, 0.12),
            (-0.12, 0.12),
            (-math.pi / 12, math.pi / 12),
            (-0.2, 0.2),  # of a picture that is 2 wide
            (-0.2, 0.2),
        )
    )
    wide = aspect.exp() / scale * torch.where(mirrored, -1.0, 1.0)
    high = (-aspect).exp() / scale
    cos, sin = angle.cos(), angle.sin()
    rows = [wide * cos, wide * (slant - sin), right, high * sin, high * (cos + slant * sin), down]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _backgrounds(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """(B, 3, H, W): white, one random colour, or a gradient between two in a random direction."""
    count, height, width = shape
    first, second = (_uniform(generator, count, 0, 1, columns=3) for _ in range(2))
    angle = _uniform(generator, count, 0, 2 * math.pi)
    kind = torch.rand(count, 1, 1, 1, generator=generator)
    x = torch.linspace(-0.5, 0.5, width).view(1, 1, 1, -1)
    y = torch.linspace(-0.5, 0.5, height).view(1, 1, -1, 1)
    across = (x * angle.cos() + y * angle.sin() + 0.5).clamp(0, 1)
    # Pale more often than dark, as pages are.
    first, second = first.sqrt(), second.sqrt()
    second = torch.where(kind < _WHITE + _GRADIENT, second, first)
    return torch.where(kind < _WHITE, 1.0, torch.lerp(first, second, across))


def _restyle(composed: Tensor, moved: Tensor, generator: torch.Generator) -> Tensor:
    """Some drawings in shades of grey, some as dark lines on white."""
    grey = _chosen(generator, len(composed), _GREY)
    composed[grey] = _luma(composed[grey]).expand(-1, 3, -1, -1)
    lines = _chosen(generator, len(composed), _LINES)
    composed[lines] = 1 - _edges(moved[lines]).expand(-1, 3, -1, -1)
    return composed


def _edges(image: Tensor) -> Tensor:
    """(B, 4, H, W) -> (B, 1, H, W) in [0, 1]: how steep the steepest of colour and alpha is (Sobel)."""
    across = image.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernels = torch.stack([across, across.T]).unsqueeze(1)
    channels = image.flatten(0, 1).unsqueeze(1)
    slope = F.conv2d(F.pad(channels, (1, 1, 1, 1), mode="replicate"), kernels)
    steep = (slope[:, 0].square() + slope[:, 1].square()).sqrt()
    return steep.unflatten(0, image.shape[:2]).amax(1, keepdim=True).clamp(0, 1)


def _degrade(image: Tensor, generator: torch.Generator) -> Tensor:
    """Some blurred, some noisy, some with a rectangle painted over."""
    blurred = _chosen(generator, len(image), _BLUR)
    sharp = image[blurred]
    soft = F.avg_pool2d(F.pad(sharp, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    image[blurred] = torch.lerp(sharp, soft, _uniform(generator, len(blurred), 0, 1))
    noisy = _chosen(generator, len(image), _NOISE)
    grain = torch.randn(len(noisy), *image.shape[1:], generator=generator)
    image[noisy] += grain * _uniform(generator, len(noisy), 0, 0.08)
    erased = _chosen(generator, len(image), _ERASE)
    middle = _uniform(generator, len(erased), 0, 1, columns=2)
    half = _uniform(generator, len(erased), 0.05, 0.15, columns=2)
    x = torch.linspace(0, 1, image.shape[3]).view(1, 1, 1, -1)
    y = torch.linspace(0, 1, image.shape[2]).view(1, 1, -1, 1)
    inside = ((x - middle[:, :1]).abs() < half[:, :1]) & ((y - middle[:, 1:]).abs() < half[:, 1:])
    paint = _uniform(generator, len(erased), 0, 1, columns=3)
    image[erased] = torch.where(inside, paint, image[erased])
    return image
