"""A smaller vocabulary: tokens that a corpus never uses leave the tokenizer, the embedding and the head.

    made = prune_vocabulary(model, json.loads(Path("tokenizer.json").read_text()), texts)
    made.model.save_pretrained(folder)
    write_tokenizer("source", made.vocabulary, folder)

The corpus tokenizes to the same pieces as before, and any other text still goes there and back: the single
bytes stay. Byte-level BPE only (GPT-2, SmolLM2, Llama 3, Qwen), where both can be promised.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn

from gemini.compress.calibrate import Window, as_feed
from gemini.compress.reshape import (
    Change,
    Shape,
    agrees,
    answer,
    cut_state,
    fields_of,
    fit_config,
    rebuild,
    require_known,
    shapes_of,
)
from gemini.errors import CheckpointError, RecipeError

Json: TypeAlias = dict[str, Any]

_ID_FIELDS = ("_token_id", "_token_ids", "_token_index")
# Of a generation configuration: ids that are only forbidden, and fields that are not understood here.
_FORBIDDEN = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
_UNKNOWN = ("forced_decoder_ids", "force_words_ids", "sequence_bias")
_TABLES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "added_tokens.json")


@dataclass(frozen=True)
class Vocabulary:
    """Contents of a smaller tokenizer.json, and the old id of every new id, ascending."""

    tokenizer: Json
    kept: tuple[int, ...]


@dataclass(frozen=True)
class SmallerVocabulary:
    """A model with fewer rows in embedding and head, the tokenizer for it, and the sizes before and after."""

    model: nn.Module
    vocabulary: Vocabulary
    tokens_before: int
    tokens_after: int


def smaller_tokenizer(
    tokenizer: Mapping[str, Any], texts: Iterable[str], *, also: Collection[int] = (), multiple: int = 32
) -> Vocabulary:
    """Keep the tokens that the texts use, those that merging builds them from, all bytes and added tokens.

    Byte-pair encoding merges the pair of lowest rank over and over (Sennrich et al. 2016, arXiv:1508.07909,
    section 3.2). Every merge that happens inside a word of the corpus stays, in its order, and none is added:
    so at every step the same pair is the lowest, and the corpus comes out as before. The earliest of the
    other tokens fill up to a multiple.

    Args:
        tokenizer: the contents of a tokenizer.json.
        texts: the corpus.
        also: ids to keep besides.
        multiple: tokens that stay are a multiple of it, as far as there are as many.

    Raises:
        RecipeError: a tokenizer of another kind; the cause names what is different.
    """
    _require_bytes(tokenizer)
    corpus = list(texts)
    old = _load(tokenizer)
    used = used_tokens(old, corpus)
    vocabulary = old.get_vocab(with_added_tokens=True)
    names = {index: name for name, index in vocabulary.items()}
    absent = sorted(set(also) - names.keys())
    if absent:
        raise RecipeError(f"Token {absent[0]} is not in the tokenizer.", "Keep tokens that it has.")
    added = {entry["content"] for entry in tokenizer.get("added_tokens", [])}
    unknown = tokenizer["model"].get("unk_token")
    alphabet = [name for name in ByteLevel.alphabet() if name in vocabulary]
    derive = _deriver(tokenizer["model"])
    kept = added | set(alphabet) | {names[index] for index in (*used, *also)}
    kept |= {unknown} if unknown in vocabulary else set()
    for name in list(kept - added):
        kept |= derive(name) or set()
    for name in sorted(vocabulary, key=lambda each: vocabulary[each]):
        parts = derive(name) if len(kept) % multiple and name not in kept else None
        # What needs tokens that are not kept would bring more than one.
        if parts is not None and parts <= kept | {name}:
            kept.add(name)
    kept &= vocabulary.keys()
    order = sorted(vocabulary[name] for name in kept)
    made = _rewritten(tokenizer, kept, {names[index]: new for new, index in enumerate(order)})
    _require_same(old, _load(made), corpus, order)
    return Vocabulary(made, tuple(order))


def used_tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[int]:
    """How often each token id occurs in the texts, special tokens around each text included."""
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(tokenizer.encode(text).ids)
    return counts


def required_ids(model: nn.Module) -> set[int]:
    """Ids that the configurations of a model name (begin, end, padding and the like)."""
    rows = model.get_input_embeddings().weight.shape[0]
    found = [value for _, value in _id_fields(model.config)]
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        found += [value for key, value in generation.to_dict().items() if key.endswith(_ID_FIELDS)]
    flat = [index for value in found for index in (value if isinstance(value, list | tuple) else [value])]
    return {index for index in flat if isinstance(index, int) and 0 <= index < rows}


def prune_vocabulary(
    model: nn.Module,
    tokenizer: Mapping[str, Any],
    texts: Iterable[str],
    *,
    window: Window | None = None,
    multiple: int = 32,
) -> SmallerVocabulary:
    """A model and a tokenizer with the tokens that the texts need; both given ones are left as they were.

    ``window`` with token ids, of the model as it is, checks the result; without one, some tokens of the first
    text do. Errors as ``smaller_tokenizer`` and ``cut_vocabulary``.
    """
    corpus = list(texts)
    size = len(_load(tokenizer).get_vocab(with_added_tokens=True))
    needed = {index for index in required_ids(model) if index < size}
    vocabulary = smaller_tokenizer(tokenizer, corpus, also=needed, multiple=multiple)
    rows = model.get_input_embeddings().weight.shape[0]
    if window is None:
        ids = torch.tensor([vocabulary.kept[:: max(1, len(vocabulary.kept) // 16)]])
        pair = bool(getattr(model.config, "is_encoder_decoder", False))
        window = {"input_ids": ids, "decoder_input_ids": ids} if pair else {"input_ids": ids}
    made = cut_vocabulary(model, vocabulary.kept, window)
    return SmallerVocabulary(made, vocabulary, rows, len(vocabulary.kept))


def cut_vocabulary(model: nn.Module, kept: Sequence[int], window: Window) -> nn.Module:
    """The model with the rows ``kept`` (old ids, in the order of the new ones) of embedding and head.

    Its logits equal the old ones at those ids (to 1e-4 of the largest), which is checked on ``window``, given
    in old ids. Ids in the configuration and the generation configuration are rewritten.

    Raises:
        RecipeError: ids out of range, an id of the configuration that is not kept, or a configuration class
            without a field for the size.
        CheckpointError: the model is not what its configuration says, or has no token embedding.
    """
    require_known(model)
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise CheckpointError(
            f"{type(model).__name__} has no token embedding.", "Prune a model that reads text."
        )
    rows, count = embedding.weight.shape[0], len(kept)
    if not kept or len(set(kept)) < count or min(kept) < 0 or max(kept) >= rows:
        raise RecipeError(f"The ids to keep are not {count} different ones below {rows}.", "Keep such.")
    renumber = _renumberer({old: new for new, old in enumerate(kept)}, rows)
    ids: Change = {path: renumber(".".join(path), value) for path, value in _id_fields(model.config)}
    generation = _renumbered_generation(getattr(model, "generation_config", None), kept, renumber)
    before = shapes_of(model)
    tables = {name for name in before if name.endswith(".weight") and _is_table(model, name, embedding)}

    def axis_of(old: Shape | None, new: Shape | None) -> int | None:
        if old is None or new is None or len(old) != len(new):
            return None
        axes = [axis for axis, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1]]
        return axes[0] if len(axes) == 1 and (old[axes[0]], new[axes[0]]) == (rows, count) else None

    candidates: list[Change] = [
        {path: count} | ids
        for path, value in fields_of(model.config)
        if value == rows and not isinstance(value, bool)
    ]
    feed = as_feed(window)
    index = torch.tensor(kept)
    old_feed, new_feed = _feeds(feed, index, rows)
    expected = answer(model, old_feed)
    expected = expected.index_select(-1, index) if expected.shape[-1] == rows else expected
    for fit in fit_config(
        model,
        candidates,
        lambda _, old, new: axis_of(old, new) is not None,
        {name: (count, *before[name][1:]) for name in tables},
        [],
    ):
        axes = {name: axis_of(before[name], shape) for name, shape in fit.shapes.items()}
        keep = {name: {axis: index} for name, axis in axes.items() if axis is not None}
        made = rebuild(model, fit.config, cut_state(model.state_dict(), keep))
        if generation is not None:
            made.generation_config = generation
        if agrees(made, new_feed, expected):
            return made
    raise RecipeError(
        f"{type(model.config).__name__} has no field that cuts {rows} tokens to {count} and leaves the "
        "rest as it is.",
        "Keep the vocabulary of this model.",
    )


def write_tokenizer(source: str | Path, vocabulary: Vocabulary, target: str | Path) -> None:
    """Write tokenizer.json and the files around it that ``source`` has, with new ids, into ``target``."""
    source, target = Path(source), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    new = {str(old): index for index, old in enumerate(vocabulary.kept)}
    model = vocabulary.tokenizer["model"]
    (target / "tokenizer.json").write_text(json.dumps(vocabulary.tokenizer, ensure_ascii=False), "utf-8")
    for name in _TABLES:
        if not (source / name).is_file():
            continue
        text = (source / name).read_text("utf-8")
        if name == "tokenizer_config.json":
            table = json.loads(text)
            if "added_tokens_decoder" in table:
                entries = table["added_tokens_decoder"].items()
                table["added_tokens_decoder"] = {str(new[key]): entry for key, entry in entries if key in new}
            text = json.dumps(table, ensure_ascii=False, indent=2)
        elif name == "added_tokens.json":
            text = json.dumps({key: new[str(index)] for key, index in json.loads(text).items()})
        (target / name).write_text(text, "utf-8")
    if (source / "vocab.json").is_file():
        (target / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), "utf-8")
        lines = [" ".join(_pair(merge)) for merge in model["merges"]]
        (target / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), "utf-8")


def _require_bytes(tokenizer: Mapping[str, Any]) -> None:
    """RecipeError unless this is byte-level BPE that always gives the same pieces."""
    model = tokenizer.get("model") or {}
    kind = model.get("type") or "a tokenizer without a model type"
    if kind != "BPE":
        cause = f"The tokenizer is {kind}, not byte-level BPE"
    elif "ByteLevel" not in _types(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        cause = "The tokenizer's BPE does not work on bytes, so that text out of the corpus might be lost"
    elif "ByteLevel" not in _types(tokenizer.get("decoder"), "decoders"):
        cause = "The tokenizer does not turn bytes back into text"
    elif model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        cause = "The tokenizer marks where in a word a piece stands"
    elif model.get("dropout"):
        cause = "The tokenizer leaves merges out at random"
    elif model.get("byte_fallback"):
        cause = "The tokenizer falls back to bytes besides working on them"
    else:
        return
    raise RecipeError(f"{cause}.", "Keep its vocabulary; prune layers or feed-forward width instead.")


def _types(part: Mapping[str, Any] | None, key: str) -> set[str]:
    """Kinds of a part of the tokenizer and of those in a sequence."""
    if not part:
        return set()
    return {part.get("type", "")}.union(*(_types(each, key) for each in part.get(key, [])))


def _load(tokenizer: Mapping[str, Any]) -> Tokenizer:
    made = Tokenizer.from_str(json.dumps(tokenizer))
    made.no_truncation()
    made.no_padding()
    return made


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _deriver(model: Mapping[str, Any]) -> Callable[[str], set[str] | None]:
    """From a token to all tokens that merging goes through on its way there, None if it gets elsewhere."""
    ranks = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}

    def derive(name: str) -> set[str] | None:
        parts, met = list(name), set(name)
        while len(parts) > 1:
            pairs = [ranks.get(pair, len(ranks)) for pair in pairwise(parts)]
            lowest = min(pairs)
            if lowest == len(ranks):
                return None
            at = pairs.index(lowest)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            met.add(parts[at])
        return met

    return derive


def _rewritten(tokenizer: Mapping[str, Any], kept: Collection[str], ids: Mapping[str, int]) -> Json:
    """The tokenizer with only the tokens kept, under their new ids."""
    made = copy.deepcopy(dict(tokenizer))
    model = made["model"]
    model["vocab"] = {
        name: ids[name] for name in sorted(model["vocab"], key=model["vocab"].get) if name in kept
    }
    model["merges"] = [
        merge for merge in model["merges"] if {*_pair(merge), "".join(_pair(merge))} <= model["vocab"].keys()
    ]
    for entry in made.get("added_tokens", []):
        entry["id"] = ids[entry["content"]]
    if made.get("padding"):
        made["padding"]["pad_id"] = ids.get(made["padding"]["pad_token"], 0)
    if made.get("post_processor"):
        _rewrite_post_processor(made["post_processor"], ids)
    return made


def _rewrite_post_processor(part: Json, ids: Mapping[str, int]) -> None:
    kind = part.get("type")
    if kind == "Sequence":
        for each in part["processors"]:
            _rewrite_post_processor(each, ids)
    elif kind == "TemplateProcessing":
        for entry in part["special_tokens"].values():
            entry["ids"] = [ids[name] for name in entry["tokens"]]
    elif kind in {"BertProcessing", "RobertaProcessing"}:
        for key in ("sep", "cls"):
            part[key] = [part[key][0], ids[part[key][0]]]
    elif kind != "ByteLevel":
        raise RecipeError(f"The tokenizer's {kind} is not known here.", "Keep its vocabulary.")


def _require_same(old: Tokenizer, new: Tokenizer, texts: Iterable[str], kept: Sequence[int]) -> None:
    """RecipeError unless the texts have the same pieces, and every token the id it should."""
    for index, before in enumerate(kept):
        if new.id_to_token(index) != old.id_to_token(before):
            raise RecipeError(
                f"Token {old.id_to_token(before)!r} cannot get the id {index}.", "Keep this vocabulary."
            )
    for text in texts:
        if old.encode(text).ids != [kept[index] for index in new.encode(text).ids]:
            raise RecipeError(
                f"The smaller tokenizer splits {text[:40]!r} differently.",
                "Keep this tokenizer's vocabulary.",
            )


def _id_fields(config: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    return ((path, v) for path, v in fields_of(config) if path[-1].endswith(_ID_FIELDS) and v is not None)


def _renumberer(new: Mapping[int, int], rows: int) -> Callable[[str, Any], Any]:
    """What turns an old id, or a list of them, into new ones; ids that never had a row stay."""

    def renumber(field: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(renumber(field, each) for each in value)
        if not isinstance(value, int) or not 0 <= value < rows:
            return value
        if value not in new:
            raise RecipeError(f"{field} is token {value}, which is not kept.", "Keep that token.")
        return new[value]

    return renumber


def _renumbered_generation(config: Any, kept: Sequence[int], renumber: Callable[[str, Any], Any]) -> Any:
    if config is None:
        return None
    made = copy.deepcopy(config)
    for key, value in config.to_dict().items():
        if not value and value != 0:
            continue
        if key in _UNKNOWN:
            raise RecipeError(f"{key} of the generation configuration is not known here.", "Remove it first.")
        if key in _FORBIDDEN:  # a token that is gone needs no ban
            words = [each if isinstance(each, list) else [each] for each in value]
            whole = [renumber(key, word) for word in words if set(word) <= set(kept)]
            setattr(made, key, (whole if key == "bad_words_ids" else [w[0] for w in whole]) or None)
        elif key.endswith(_ID_FIELDS):
            setattr(made, key, renumber(key, value))
    return made


def _is_table(model: nn.Module, name: str, embedding: nn.Embedding) -> bool:
    """Whether a tensor is the weight of the token embedding or of the head."""
    owner = model.get_submodule(name.removesuffix(".weight"))
    return owner is embedding or owner is model.get_output_embeddings()


def _feeds(
    feed: Mapping[str, Tensor], kept: Tensor, rows: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same example in old ids and in new ones; a token that is not kept becomes the first one."""
    place = torch.zeros(rows, dtype=torch.long)
    place[kept] = torch.arange(len(kept))
    new = {key: place[value] if key.endswith("input_ids") else value for key, value in feed.items()}
    old = {key: kept[value] if key.endswith("input_ids") else value for key, value in new.items()}
    return old, new
