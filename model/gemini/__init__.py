"""The Gemini family: an encoder-decoder Transformer over text and images.

    from gemini.model.gemini import GeminiConfig, GeminiForConditionalGeneration
    model = GeminiForConditionalGeneration(GeminiConfig.sized("nano"))

Importing this package makes transformers' Auto classes know the family.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from gemini.model.gemini.configuration import GeminiConfig
from gemini.model.gemini.image_processor import GeminiImageProcessor
from gemini.model.gemini.modeling import (
    GeminiForConditionalGeneration,
    GeminiForImageClassification,
    GeminiForSequenceClassification,
    GeminiModel,
    shift_right,
)
from gemini.model.gemini.pretrained import GeminiPreTrainedModel
from gemini.model.gemini.tokenizer import (
    LABELS,
    LONGEST_CLASSIFIED,
    TASKS,
    GeminiTokenizer,
    caption_prompt,
    classify_prompt,
    continue_prompt,
    denoise_prompt,
    train_tokenizer,
)

__all__ = [
    "LABELS",
    "LONGEST_CLASSIFIED",
    "TASKS",
    "GeminiConfig",
    "GeminiForConditionalGeneration",
    "GeminiForImageClassification",
    "GeminiForSequenceClassification",
    "GeminiImageProcessor",
    "GeminiModel",
    "GeminiPreTrainedModel",
    "GeminiTokenizer",
    "caption_prompt",
    "classify_prompt",
    "continue_prompt",
    "denoise_prompt",
    "shift_right",
    "train_tokenizer",
]

AutoConfig.register("gemini", GeminiConfig, exist_ok=True)
AutoModel.register(GeminiConfig, GeminiModel, exist_ok=True)
AutoModelForSeq2SeqLM.register(GeminiConfig, GeminiForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(GeminiConfig, GeminiForConditionalGeneration, exist_ok=True)
AutoModelForSequenceClassification.register(GeminiConfig, GeminiForSequenceClassification, exist_ok=True)
AutoModelForImageClassification.register(GeminiConfig, GeminiForImageClassification, exist_ok=True)
AutoTokenizer.register(GeminiConfig, tokenizer_class=GeminiTokenizer, exist_ok=True)
AutoImageProcessor.register(
    GeminiConfig, image_processor_classes={"pil": GeminiImageProcessor}, exist_ok=True
)
