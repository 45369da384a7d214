"""Tokenizer and context length of text models."""

from pathlib import Path
from typing import Any

from gemini.errors import CheckpointError
from gemini.model.hooks import hooked
from gemini.model.offline import first_line, import_transformers
from gemini.model.vision import sample_pixels
from gemini.model.weights import probe_ids

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
# Names under which configurations keep the largest number of positions.
_LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
)
# transformers writes 1e30 (GGUF: 1e18) for "no limit known".
_NO_LIMIT = 10**9


def load_tokenizer(
    folder: Path, vocabulary: int, lowercase: bool = False, gguf_file: str | None = None
) -> Any:
    """Load the fast tokenizer of a checkpoint.

    Args:
        folder: holds the tokenizer files, or the GGUF file that carries them.
        vocabulary: rows of the model's token embedding; the tokenizer's own vocabulary must fit into it.
        lowercase: lower the text first (``do_lower_case`` of sentence_bert_config.json).
        gguf_file: name of the GGUF file inside ``folder``.

    Raises:
        CheckpointError: no tokenizer files, one that only exists in Python ("slow"), or one of another model.
    """
    transformers = import_transformers()
    if gguf_file is None and not any((folder / name).is_file() for name in _VOCABULARIES):
        raise CheckpointError(
            f"The checkpoint has no tokenizer (none of {', '.join(_VOCABULARIES)}).",
            "Save the tokenizer into the folder with `tokenizer.save_pretrained(folder)`.",
        )
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # any type: damaged files fail anywhere inside the tokenizer's conversion
        raise CheckpointError(
            f"The tokenizer cannot be read: {first_line(error)}.", "Save it again as tokenizer.json."
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not getattr(tokenizer, "is_fast", False) or backend is None:
        raise CheckpointError(
            f"{type(tokenizer).__name__} is a tokenizer in Python, which the runtime cannot run.",
            "Convert it to a fast tokenizer (tokenizer.json) with transformers first.",
        )
    _check_vocabulary(backend.get_vocab_size(with_added_tokens=False), vocabulary)
    if lowercase:
        from tokenizers import normalizers

        steps = [normalizers.Lowercase(), *([backend.normalizer] if backend.normalizer is not None else [])]
        backend.normalizer = normalizers.Sequence(steps)
    return tokenizer


def _check_vocabulary(tokens: int, rows: int) -> None:
    # Added tokens may lie beyond the rows (image tokens of a text-only model); the vocabulary proper may not.
    if tokens == 0 or tokens > rows:
        raise CheckpointError(
            f"The tokenizer knows {tokens} tokens and the model has {rows} embeddings.",
            "Use the tokenizer that was saved with this model.",
        )


def token_rows(model: Any) -> int:
    """Rows of the token embedding: the model's own, or its decoder's where the encoder reads pixels."""
    embedding = model.get_input_embeddings()
    if not hasattr(embedding, "num_embeddings"):
        embedding = model.get_decoder().get_input_embeddings()
    return int(embedding.num_embeddings)


def context_length(model: Any, tokenizer: Any, declared: int | None = None) -> int | None:
    """The longest input in tokens, special tokens included; None when nothing limits it.

    The smallest of: what the configuration says, what a table of learned positions has room for, the
    tokenizer's limit, and ``declared`` (a sentence encoder's own limit).
    """
    config = model.config.get_text_config(decoder=model.config.is_encoder_decoder)
    positions = [getattr(config, key, None) for key in _LENGTH_KEYS]
    limits = [value for value in positions if isinstance(value, int) and value > 0][:1]
    room = learned_positions(model)
    limits += [room] if room is not None else []
    own = tokenizer.model_max_length
    limits += [int(own)] if isinstance(own, (int, float)) and 0 < own < _NO_LIMIT else []
    limits += [declared] if declared else []
    return min(limits, default=None)


def learned_positions(model: Any) -> int | None:
    """How many tokens a table of learned positions has room for; None when the model has no such table.

    Found by behaviour, so that tables with an offset (RoBERTa starts at padding_idx + 1, OPT at 2) need no
    names: when one token id is repeated, the table of positions is the embedding asked for n, n+1, n+2, …
    """
    import torch

    seen: list[tuple[int, list[int]]] = []

    def note(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        asked = arguments[0] if arguments else None
        if isinstance(asked, torch.Tensor) and not asked.is_floating_point():
            seen.append((int(module.num_embeddings), asked.flatten().tolist()))

    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    ids = probe_ids(model)
    answer = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with hooked(table.register_forward_pre_hook(note) for table in tables), torch.inference_mode():
        if model.main_input_name == "pixel_values":
            model(pixel_values=sample_pixels(model, 1), **answer)
        else:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), **answer)
    rooms = [
        rows - asked[0]
        for rows, asked in seen
        if len(asked) == ids.shape[1] and asked == list(range(asked[0], asked[0] + len(asked)))
    ]
    return min(rooms, default=None)


def end_tokens(model: Any) -> list[int]:
    """Every token that ends a generation of a model whose end tokens are settled."""
    known = model.generation_config.eos_token_id
    return known if isinstance(known, list) else [] if known is None else [known]


def settle_end_tokens(model: Any, tokenizer: Any, further: tuple[int, ...] = ()) -> None:
    """Put every token that ends a generation into ``model.generation_config.eos_token_id`` (int or list).

    The generation configuration often knows only the base model's end of text, while the tokenizer (and a
    GGUF's ``eot_token_id``) names the end of a chat turn; missing one makes the model talk to itself.
    """
    known = model.generation_config.eos_token_id
    if known is None:
        known = getattr(model.config.get_text_config(), "eos_token_id", None)
    ids = list(known) if isinstance(known, (list, tuple)) else [known]
    ids = [token for token in (*ids, tokenizer.eos_token_id, *further) if isinstance(token, int)]
    rows = token_rows(model)
    unique = [token for token in dict.fromkeys(ids) if 0 <= token < rows]
    model.generation_config.eos_token_id = unique[0] if len(unique) == 1 else unique or None
