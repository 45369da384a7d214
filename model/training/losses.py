"""Losses of a batch, and the optimizer's parameter groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemini.model.training.tasks import IGNORED, Batch


def generation_loss(model: Any, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over the labels (B, T) of an encoder-decoder, teacher forced.

    The head, a product with 8 thousand columns, sees only positions that have a label: padding is free. Where
    the first token is not certain, ``first_shares`` (B, vocabulary) are the probabilities it should have.
    """
    labels = batch["labels"]
    known = labels != IGNORED
    hidden = model.base_model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pixel_values=batch.get("pixel_values"),
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels),
        use_cache=False,
    ).last_hidden_state
    logits = model.get_output_embeddings()(hidden[known]).float()
    shares = batch.get("first_shares")
    if shares is None:
        return F.cross_entropy(logits, labels[known], label_smoothing=smoothing)
    first = torch.zeros_like(known).index_fill_(1, torch.tensor(0), True)[known]
    losses = torch.cat(
        [
            F.cross_entropy(logits[first], shares, label_smoothing=smoothing, reduction="none"),
            F.cross_entropy(
                logits[~first], labels[known][~first], label_smoothing=smoothing, reduction="none"
            ),
        ]
    )
    return losses.mean()


def classification_loss(model: Any, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over the labels, int64 (B,) or, when distilled, probabilities (B, classes)."""
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    return F.cross_entropy(logits.float(), batch["labels"], label_smoothing=smoothing)


def regression_loss(model: Any, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """Mean squared error over the labels, float32 (B, outputs)."""
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    return F.mse_loss(logits.float(), batch["labels"])


def loss_of(head: str) -> Callable[..., Tensor]:
    """The loss (model, batch, smoothing) of a recipe's head."""
    return {"generation": generation_loss, "regression": regression_loss}.get(head, classification_loss)


def make_optimizer(model: Any, weight_decay: float, encoder_rate: float = 1.0) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) that decays matrices and kernels, no bias, norm or embedding.

    A group's ``scale`` is what its learning rate is multiplied with: ``encoder_rate`` for the layers of the
    encoder (discriminative fine-tuning; Howard and Ruder, ACL 2018, section 3.2), 1 for everything else.
    """
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }  # rows that a batch does not use would shrink
    read = set() if encoder_rate == 1 else {id(p) for p in model.get_encoder().fusion.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = (parameter.ndim > 1 and id(parameter) not in embeddings, id(parameter) in read)
            groups.setdefault(kind, []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": weight_decay if decayed else 0.0,
                "scale": encoder_rate if slow else 1.0,
            }
            for (decayed, slow), parameters in sorted(groups.items(), reverse=True)
        ],
        betas=(0.9, 0.98),
        eps=1e-8,
        fused=True,
    )
