"""FGM: the perturbation has its length, points where the loss rises, and can be learnt to be borne."""

import copy

import pytest
import torch

from gemini.model.training.adversarial import adversarial_loss
from gemini.model.training.corpus import load_corpus
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


def test_who_learnt_under_attack_bears_it_better(model, tokenizer, options, cache):
    """On held-out reviews, after as many steps; without an attack it is right as well."""
    radius = 0.2

    def reviews(split):
        corpus = load_corpus(cache, split, options.tasks)
        tasks = build_tasks(tokenizer, options, corpus, train=False)
        return next(task for task in tasks if task.name == "classify")

    def losses(own, batch, radius):
        embedding = own.get_encoder().get_input_embeddings()
        return adversarial_loss(embedding, lambda: generation_loss(own, batch), radius)

    def learn(radius):
        own, task = copy.deepcopy(model), reviews("train")
        optimizer = torch.optim.AdamW(own.parameters(), lr=2e-3)
        for step in range(300):
            sum(losses(own, task.batch(step), radius)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return own

    def judge(own):
        task = reviews("valid")
        found = [losses(own, task.batch(step), radius) for step in range(task.order.per_epoch)]
        return [torch.stack(column).mean().item() for column in zip(*found, strict=True)]

    _, attacked = judge(learn(0.0))
    clean, borne = judge(learn(radius))
    assert borne < attacked / 5 and clean < 0.1  # 0.01, 0.5 and 0.01
