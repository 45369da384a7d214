"""Adapters: they alone learn, and what they learn ends up in the weights; in NF4 too."""

import sys

import pytest
import torch
from small_models import logits_of, make_llama, make_windows

from gemini.compress.adapters import adapted
from gemini.compress.modules import Bnb4Linear
from gemini.compress.quantize import quantize_bnb4
from gemini.compress.recover import divergence
from gemini.errors import UsageError


def learn(model, teacher, windows, steps=12):
    known = logits_of(teacher, windows)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=5e-3)
    for _ in range(steps):
        divergence(torch.cat([model(torch.as_tensor(w)).logits for w in windows]), known).backward()
        optimizer.step()
        optimizer.zero_grad()
    return logits_of(model, windows)


@pytest.mark.parametrize("nf4", [False, True])
def test_adapters_alone_learn_and_become_part_of_the_weights(nf4):
    model, teacher, windows = make_llama(), make_llama(seed=1), make_windows()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    start = divergence(logits_of(model, windows), logits_of(teacher, windows))
    with adapted(model, rank=4, nf4=nf4):
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
        assert learning and all(".lora_" in name for name in learning)
        learned = learn(model, teacher, windows)
    assert dict(model.named_modules()) == modules
    after = model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "_proj" in name}
    for name in changed:  # by a matrix of the adapters' rank
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 4
    merged = logits_of(model, windows)
    if not nf4:
        torch.testing.assert_close(merged, learned, rtol=1e-4, atol=1e-5)
    assert divergence(merged, logits_of(teacher, windows)) < start
    assert not any(p.requires_grad for p in model.parameters())


def test_weights_lie_in_nf4_meanwhile():
    model = make_llama()
    layer = model.model.layers[0].mlp.up_proj
    packed = Bnb4Linear(64, 96, *quantize_bnb4(layer.weight.data, 64), 64)
    x = torch.randn(3, 64)
    with adapted(model, rank=2, nf4=True):
        inside = model.model.layers[0].mlp.up_proj(x).detach()  # an adapter starts as nothing
    # The scales of blocks are quantized to 8 bits as well (QLoRA, section 3).
    torch.testing.assert_close(inside, packed(x), rtol=0, atol=0.02 * float(packed(x).abs().max()))
    assert (inside - layer(x)).norm() > 0.02 * layer(x).norm()


@pytest.mark.parametrize(("missing", "nf4"), [("peft", False), ("bitsandbytes.nn.modules", True)])
def test_what_is_not_installed_is_named(monkeypatch, missing, nf4):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UsageError, match=missing.partition(".")[0]), adapted(make_llama(), nf4=nf4):
        pass


def test_a_block_that_fails_leaves_the_model_as_it_was():
    model = make_llama()
    before, modules = {name: value.clone() for name, value in model.state_dict().items()}, [*model.modules()]
    with pytest.raises(KeyError), adapted(model, rank=4):
        for parameter in model.parameters():
            parameter.data += float(parameter.requires_grad)
        raise KeyError
    assert [*model.modules()] == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
