"""The shape of a Gemini model: sizes, positions, fusion; a transformers configuration like any other.

GeminiConfig()                                   # nano, early fusion
GeminiConfig.sized("base", fusion="hybrid")
"""

from typing import Any, NamedTuple

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from gemini.errors import UsageError

POSITIONS = ("learned", "sinusoidal")
FUSIONS = ("early", "late", "hybrid")
# The convolutional tower makes one vector of 8 x 8 pixels: stem and two of three stages halve the picture.

# What differs from the defaults below, which are nano's. Parameters: about 9, 110 and 400 million.
SIZES: dict[str, dict[str, Any]] = {
    "nano": {},
    "base": {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "max_position_embeddings": 1024,
        "joint_layers": 2,
        "image_size": 128,
        "image_channels": (64, 128, 256, 512),
    },
    "large": {
        "vocab_size": 32768,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "encoder_layers": 12,
        "decoder_layers": 12,
        "max_position_embeddings": 1024,
        "joint_layers": 4,
        "image_size": 192,
        "image_channels": (96, 192, 384, 768),
    },
}


class EncoderLayers(NamedTuple):
    """How many encoder layers see the image alone, the text alone, and both."""

    image: int
    text: int
    joint: int


@strict
class GeminiConfig(PreTrainedConfig):
    """Configuration of the Gemini family.

    ``encoder_layers`` counts all layers of the encoder, whichever modality they serve, so that the three
    fusions have the same size: early fusion makes all of them joint; late fusion shares them between an image
    encoder and a text encoder; hybrid fusion makes the upper ``joint_layers`` joint and shares the others.
    Of separate layers the text gets the larger half, because the image has its convolutional tower already,
    and all of them where an image is one vector (``image_prototypes``): attention relates nothing in it.

    Attributes:
        encoder_layers: layers of the encoder, all modalities together.
        joint_layers: with hybrid fusion, how many of them are joint; without meaning otherwise.
        max_position_embeddings: longest text in tokens, in the encoder and in the decoder each.
        image_size: height and width of the pixels, a multiple of 2 to the number of stages.
        image_channels: widths of the stages of the convolutional tower, each of which halves the grid: four
            make 16 vectors of 64 x 64 pixels.
        image_blur: how much of each pixel is its mean with its neighbours (weights 1, 2, 1), 0 to 1. A half
            softens as much as moving a picture does on average, at the finest detail that pixels can hold.
        image_prototypes: how many things an image is compared with; what it resembles is then all that the
            encoder sees of it, one vector. 0: it sees the grid.
        prototype_sharpness: what resemblances are multiplied with before their softmax.
        dropout: on embeddings and on the output of every attention and feed-forward part.
        attention_dropout: on attention weights.

    Raises:
        UsageError: sizes or choices that do not fit together.
    """

    model_type = "gemini"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {"num_hidden_layers": "decoder_layers"}  # noqa: RUF012, what a key-value cache counts

    vocab_size: int = 8192
    hidden_size: int = 256
    encoder_layers: int = 3
    decoder_layers: int = 3
    num_attention_heads: int = 4
    intermediate_size: int = 768
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    positions: str = "learned"
    max_position_embeddings: int = 512
    fusion: str = "early"
    joint_layers: int = 1
    image_size: int = 64
    image_channels: list[int] | tuple[int, ...] = (40, 80, 160, 256)
    image_blur: float | int = 0.0
    image_prototypes: int = 0
    prototype_sharpness: float | int = 3.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    is_encoder_decoder: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 1

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.image_channels = tuple(self.image_channels)
        _check(self)

    @classmethod
    def sized(cls, size: str, **changes: Any) -> "GeminiConfig":
        """The configuration of a size by name, with changes.

        Raises:
            UsageError: no such size.
        """
        if size not in SIZES:
            raise UsageError(f"There is no size {size!r}.", f"Use one of {', '.join(SIZES)}.")
        return cls(**{**SIZES[size], **changes})

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def image_stride(self) -> int:
        """Pixels along one side of the patch that a vector stands for."""
        return 2 ** len(self.image_channels)

    @property
    def image_grid(self) -> int:
        """Vectors along one side of the image."""
        return self.image_size // self.image_stride

    @property
    def layer_split(self) -> EncoderLayers:
        """The encoder's layers by what they see."""
        if self.fusion == "early":
            return EncoderLayers(image=0, text=0, joint=self.encoder_layers)
        joint = self.joint_layers if self.fusion == "hybrid" else 0
        separate = self.encoder_layers - joint
        image = 0 if self.image_prototypes else separate // 2
        return EncoderLayers(image=image, text=separate - image, joint=joint)


def _check(config: GeminiConfig) -> None:
    sizes = ("vocab_size", "hidden_size", "encoder_layers", "decoder_layers", "num_attention_heads")
    for name in (*sizes, "intermediate_size", "max_position_embeddings", "image_size"):
        if getattr(config, name) < 1:
            raise UsageError(f"{name} is {getattr(config, name)}.", "Give a positive number.")
    for name in ("dropout", "attention_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise UsageError(f"{name} is {getattr(config, name)}.", "Give a fraction from 0 to below 1.")
    if not 0 <= config.image_blur <= 1:
        raise UsageError(f"image_blur is {config.image_blur}.", "Give a fraction from 0 to 1.")
    if config.image_prototypes < 0:
        raise UsageError(f"image_prototypes is {config.image_prototypes}.", "Give a number of things, or 0.")
    if config.prototype_sharpness <= 0:
        raise UsageError(f"prototype_sharpness is {config.prototype_sharpness}.", "Give a positive number.")
    if config.hidden_size % config.num_attention_heads:
        raise UsageError(
            f"hidden_size {config.hidden_size} cannot be shared by {config.num_attention_heads} heads.",
            "Make hidden_size a multiple of num_attention_heads.",
        )
    if config.positions not in POSITIONS:
        raise UsageError(f"positions is {config.positions!r}.", f"Use one of {', '.join(POSITIONS)}.")
    if config.positions == "sinusoidal" and config.hidden_size % 2:
        raise UsageError(
            f"Sines and cosines do not fill hidden_size {config.hidden_size}.", "Make hidden_size even."
        )
    if not config.image_channels or min(config.image_channels) < 1:
        raise UsageError(
            f"image_channels is {tuple(config.image_channels)}.", "Give positive widths, one a stage."
        )
    if config.image_size % config.image_stride:
        raise UsageError(
            f"image_size is {config.image_size}.",
            f"Make it a multiple of {config.image_stride}: each of the tower's stages halves it.",
        )
    if config.image_prototypes and config.image_grid % 2:
        raise UsageError(
            f"A grid of {config.image_grid} x {config.image_grid} vectors has no quarters to compare.",
            f"Make image_size a multiple of {2 * config.image_stride}, or image_prototypes 0.",
        )
    _check_fusion(config)


def _check_fusion(config: GeminiConfig) -> None:
    if config.fusion not in FUSIONS:
        raise UsageError(f"fusion is {config.fusion!r}.", f"Use one of {', '.join(FUSIONS)}.")
    apart = 1 if config.image_prototypes else 2  # modalities that need a layer of their own
    if config.fusion == "late" and config.encoder_layers < apart:
        raise UsageError(
            "Late fusion needs an encoder layer for each modality, and encoder_layers is 1.",
            "Set encoder_layers to 2 or more.",
        )
    if config.fusion == "hybrid" and not 1 <= config.joint_layers <= config.encoder_layers - apart:
        raise UsageError(
            f"Hybrid fusion cannot make {config.joint_layers} of {config.encoder_layers} layers joint.",
            "Leave at least one layer joint and one for each modality.",
        )
