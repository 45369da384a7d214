"""LoRA: only the adapters learn, and merging them changes no output."""

import torch

from gemini.model.training.lora import add_lora, merge_lora
from gemini.model.training.losses import generation_loss, make_optimizer
from gemini.model.training.tasks import build_tasks


def test_only_adapters_learn_and_merging_keeps_the_outputs(model, tokenizer, options, corpus):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrapper = add_lora(model, rank=2, alpha=4)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)

    task = next(
        task for task in build_tasks(tokenizer, options, corpus, train=False) if task.name == "classify"
    )
    batch = task.batch(0)
    optimizer = make_optimizer(model, 0.0)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    losses = []
    for _ in range(10):
        loss = generation_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    expected = model(**batch).logits
    merged = merge_lora(wrapper)
    assert merged is model
    assert merged.state_dict().keys() == before.keys()
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("_proj" in name for name in changed)


def test_a_fresh_head_may_learn_as_a_whole(model):
    add_lora(model, rank=2, alpha=4, train_also=("lm_head",))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "model.shared.weight" in trained  # the head's weight, under its first name
    assert all("lora_" in name for name in trained - {"model.shared.weight"})
