"""From a picture of any size to the pixels that the model takes."""

from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling


class GeminiImageProcessor(PilBackend):
    """RGB on white, the whole picture resized to a square, values from -1 to 1.

    A picture that is no square is squeezed, not cropped: what a caption should name may stand at the edge.
    These are steps that the torch-free runtime has, so both give the same pixels.
    """

    do_convert_rgb = True
    do_resize = True
    size = {"height": 64, "width": 64}  # noqa: RUF012
    resample = PILImageResampling.BICUBIC
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
