"""FGM: the perturbation has the length asked for and points where the loss rises."""

import pytest
import torch

from gemini.model.training.adversarial import adversarial_loss
from gemini.model.training.losses import generation_loss
from gemini.model.training.tasks import build_tasks


@pytest.fixture
def batch(tokenizer, options, corpus):
    tasks = build_tasks(tokenizer, options, corpus, train=False)
    return next(task for task in tasks if task.name == "classify").batch(0)


def test_the_loss_rises_along_the_gradient(model, batch):
    embedding = model.get_encoder().get_input_embeddings()
    radius = 0.05
    clean, attacked = adversarial_loss(embedding, lambda: generation_loss(model, batch), radius)
    assert attacked > clean

    # Naive reference: embed by hand, take the gradient, add radius * g / |g| to each example.
    vectors = embedding(batch["input_ids"]).detach().requires_grad_()
    handle = embedding.register_forward_hook(lambda *_: vectors)
    loss = generation_loss(model, batch)
    (gradient,) = torch.autograd.grad(loss, vectors)
    handle.remove()
    change = torch.stack([radius * g / (g**2).sum().sqrt() for g in gradient])
    handle = embedding.register_forward_hook(lambda *_: vectors + change)
    expected = generation_loss(model, batch)
    handle.remove()
    torch.testing.assert_close(clean, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(attacked, expected, rtol=1e-6, atol=1e-6)

    # Random directions of the same length raise it less.
    for seed in range(5):
        noise = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed))
        noise = radius * noise / noise.flatten(1).norm(dim=1)[:, None, None]
        handle = embedding.register_forward_hook(lambda *_, noise=noise: vectors + noise)
        assert generation_loss(model, batch) < attacked
        handle.remove()


def test_it_trains_and_leaves_no_hook(model, batch):
    embedding = model.get_encoder().get_input_embeddings()
    clean, attacked = adversarial_loss(embedding, lambda: generation_loss(model, batch), 0.1)
    ((clean + attacked) / 2).backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    assert not embedding._forward_hooks


def test_frozen_embeddings_can_be_attacked(model, batch):
    embedding = model.get_encoder().get_input_embeddings()
    embedding.weight.requires_grad_(False)
    clean, attacked = adversarial_loss(embedding, lambda: generation_loss(model, batch), 0.1)
    assert attacked > clean
