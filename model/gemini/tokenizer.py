"""The tokenizer: byte-level BPE with tokens for tasks, languages, modalities and labels; and the prompts.

    tokenizer = train_tokenizer(texts, vocab_size=8192)
    tokenizer(caption_prompt("zh")).input_ids        # the encoder's input
    tokenizer.target("a red apple")                  # the decoder's labels

The encoder reads a prompt as it is; the decoder writes a text and `</s>`.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gemini.errors import UsageError

PAD, START, END, MASK = "<pad>", "<s>", "</s>", "<mask>"
CAPTION, CONTINUE, DENOISE, CLASSIFY = "<caption>", "<continue>", "<denoise>", "<classify>"
LANGUAGES = {"en": "<en>", "zh": "<zh>"}
IMAGE, AUDIO, VIDEO = "<image>", "<audio>", "<video>"
LABELS = {"negative": "<negative>", "positive": "<positive>"}
LONGEST_CLASSIFIED = 128  # tokens of a text: training shows no more at once (model/training/recipes)
# The order fixes the ids: the configuration's pad, bos and eos are 0, 1 and 2.
SPECIAL_TOKENS = (
    *(PAD, START, END, MASK),
    *(CAPTION, CONTINUE, DENOISE, CLASSIFY),
    *LANGUAGES.values(),
    *(IMAGE, AUDIO, VIDEO),
    *LABELS.values(),
)


class GeminiTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer that loses nothing: decoding gives the text back, byte for byte."""

    model_input_names = ("input_ids", "attention_mask")

    def target(self, text: str) -> list[int]:
        """The decoder's labels for a text: its tokens, then the end."""
        return [*self(text).input_ids, self.eos_token_id]


def train_tokenizer(texts: Iterable[str], vocab_size: int = 8192) -> GeminiTokenizer:
    """Learn merges from texts (Sennrich et al. 2016, on bytes: Radford et al. 2019, section 2.2).

    Raises:
        UsageError: the vocabulary is too small for the single bytes and the special tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UsageError(f"A vocabulary of {vocab_size} is too small.", f"Use {smallest} or more.")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return GeminiTokenizer(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        mask_token=MASK,
        extra_special_tokens=list(SPECIAL_TOKENS[4:]),
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def caption_prompt(language: str = "en") -> str:
    """Name what is in the image.

    Raises:
        UsageError: a language that the model has no token for.
    """
    if language not in LANGUAGES:
        raise UsageError(f"There are no captions in {language!r}.", f"Use one of {', '.join(LANGUAGES)}.")
    return f"{IMAGE}{CAPTION}{LANGUAGES[language]}"


def continue_prompt(text: str) -> str:
    """Write on where the text ends."""
    return f"{CONTINUE}{text}"


def denoise_prompt(text: str) -> str:
    """Restore a text in which spans were replaced by `<mask>` or words were disturbed."""
    return f"{DENOISE}{text}"


def classify_prompt(text: str) -> str:
    """Say by a label token whether the text is `<negative>` or `<positive>`."""
    return f"{CLASSIFY}{text}"


# How each task is asked for, where transformers keeps such prefixes (PreTrainedConfig.task_specific_params).
# What a classification is answered with is the token of a label.
TASKS = {
    "text2text-generation": {"prefix": CONTINUE},
    "image-to-text": {"prefix": caption_prompt("en")},
    "image-to-text-zh": {"prefix": caption_prompt("zh")},
    "text-classification": {"prefix": CLASSIFY, "labels": LABELS, "longest": LONGEST_CLASSIFIED},
}
