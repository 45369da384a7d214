"""Figures of a trained checkpoint: captions, sentiment, perplexity, and what its stories look like.

Which of them a recipe asks for is in `gemini.model.training.judge`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemini.model.data import Drawings, Review, augment
from gemini.model.gemini import LABELS, LONGEST_CLASSIFIED, caption_prompt, continue_prompt
from gemini.model.training.tasks import IGNORED, Batch, NameTask, Task, encode, pad, reviews_as_prompts


@torch.inference_mode()
def captions(
    model: Any,
    tokenizer: Any,
    pixels: Tensor,
    language: str,
    *,
    batch: int = 100,
    longest: int = 24,
    beams: int = 4,
) -> list[str]:
    """The names of normalized images (N, 3, H, W) that a search with so many beams finds; 1 is greedy."""
    prompt = torch.tensor(encode(tokenizer, [caption_prompt(language)]))
    names: list[str] = []
    for part in pixels.split(batch):
        tokens = model.generate(
            input_ids=prompt.expand(len(part), -1),
            attention_mask=torch.ones(len(part), prompt.shape[1], dtype=torch.int64),
            pixel_values=part,
            max_new_tokens=longest,
            do_sample=False,
            num_beams=beams,
        )
        names += [name.strip() for name in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    return names


def caption_scores(found: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Percent of exact matches, and chrF (Popović, 2015; sacrebleu's, at its defaults) over all names."""
    from sacrebleu import corpus_chrf

    exact = sum(a == b.strip() for a, b in zip(found, expected, strict=True))
    return {
        "exact": 100 * exact / len(expected),
        "chrf": float(corpus_chrf(list(found), [list(expected)]).score),
        "count": len(expected),
    }


def judge_captions(
    model: Any, tokenizer: Any, drawings: Drawings, *, limit: int | None = None
) -> dict[str, float]:
    """Exact match and chrF in both languages, on white ground; at most ``limit`` drawings, spread evenly."""
    chosen = spread(len(drawings.en), limit)
    if not chosen:
        return {}
    pixels = augment.on_white(torch.from_numpy(drawings.pixels[chosen]))
    scores: dict[str, float] = {}
    for language, names in (("en", drawings.en), ("zh", drawings.zh)):
        found = captions(model, tokenizer, pixels, language)
        row = caption_scores(found, [names[index] for index in chosen])
        scores |= {f"caption_{language}_{key}": value for key, value in row.items()}
    return scores


@torch.inference_mode()
def label_probabilities(
    model: Any, tokenizer: Any, texts: Sequence[str], *, batch: int = 64, longest: int = LONGEST_CLASSIFIED
) -> Tensor:
    """(N, 2): the probability of each label, from either head; texts of like length share a batch.

    A text is read as bundles read it (`Seq2SeqGenerator.classify`), ``longest`` tokens of it.
    """
    sources = reviews_as_prompts(tokenizer, texts, longest)
    answers = [tokenizer.convert_tokens_to_ids(label) for label in LABELS.values()]
    order = sorted(range(len(sources)), key=lambda index: len(sources[index]))
    result = torch.empty(len(sources), len(LABELS))
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        ids, mask = pad([sources[index] for index in part], tokenizer.pad_token_id)
        if not model.config.is_encoder_decoder or type(model).__name__.endswith("SequenceClassification"):
            logits = model(input_ids=ids, attention_mask=mask).logits
        else:
            first = torch.full((len(part), 1), model.config.decoder_start_token_id)
            output = model(input_ids=ids, attention_mask=mask, decoder_input_ids=first, use_cache=False)
            logits = output.logits[:, 0, answers]
        result[part] = logits.float().softmax(-1)
    return result


def judge_sentiment(
    models: Sequence[Any], tokenizer: Any, reviews: Sequence[Review], *, limit: int | None = None
) -> dict[str, float]:
    """Accuracy in percent by language; of several models, the mean of their probabilities decides."""
    scores: dict[str, float] = {}
    for language in ("en", "zh"):
        own = [review for review in reviews if review.language == language]
        own = [own[index] for index in spread(len(own), limit)]
        if not own:
            continue
        texts = [review.text for review in own]
        votes = torch.stack([label_probabilities(model, tokenizer, texts) for model in models]).mean(0)
        right = votes.argmax(1) == torch.tensor([int(review.label) for review in own])
        scores |= {
            f"sentiment_{language}": 100 * right.float().mean().item(),
            f"sentiment_{language}_count": len(own),
        }
    return scores


@torch.inference_mode()
def name_accuracy(model: Any, task: NameTask, *, batch: int = 100) -> float:
    """Percent of a split's drawings whose class comes first."""
    pixels = task.pictures.draw(task.known, np.random.default_rng(0), train=False)
    found = torch.cat([model(pixel_values=part).logits.argmax(1) for part in pixels.split(batch)])
    return 100 * (found == task.labels).float().mean().item()


@torch.inference_mode()
def mean_loss(model: Any, task: Task, loss: Callable[..., Tensor], *, batches: int) -> float:
    """The unsmoothed loss of a task over its first batches, each counted by its labels."""
    total, count = 0.0, 0
    for step in range(min(batches, task.order.per_epoch)):
        batch: Batch = task.batch(step)
        known = int((batch["labels"] != IGNORED).sum())
        total += loss(model, batch).item() * known
        count += known
    return total / count


def perplexity(loss: float) -> float:
    """exp of a mean loss; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.inference_mode()
def continuations(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, seed: int = 0, longest: int = 160
) -> list[str]:
    """Sampled stories (temperature 0.7, top-k 40, top-p 0.95), each with its prompt in front."""
    torch.manual_seed(seed)
    ids, mask = pad(
        encode(tokenizer, [continue_prompt(prompt) for prompt in prompts]), tokenizer.pad_token_id
    )
    tokens = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=longest,
        do_sample=True,
        temperature=0.7,
        top_k=40,
        top_p=0.95,
    )
    return [
        prompt + text
        for prompt, text in zip(
            prompts, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True
        )
    ]


def has_loop(text: str, *, size: int = 4, times: int = 3) -> bool:
    """Whether some run of ``size`` words comes at least ``times`` times: a generator caught in a circle."""
    words = text.lower().split()
    grams = Counter(tuple(words[start : start + size]) for start in range(len(words) - size + 1))
    return max(grams.values(), default=0) >= times


def spread(count: int, limit: int | None) -> list[int]:
    """At most ``limit`` of ``count`` indices, evenly spread."""
    if limit is None or count <= limit:
        return list(range(count))
    return [index * count // limit for index in range(limit)]
