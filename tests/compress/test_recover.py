"""Learning while quantized: losses against slow references, gradients against autograd, the format kept."""

import copy

import pytest
import torch
from small_models import logits_of, make_llama, make_windows, run
from torch import nn
from torch.nn import functional

from gemini.compress.layers import Integers, make_linear
from gemini.compress.modules import QuantizedEmbedding, QuantizedLinear
from gemini.compress.recover import (
    LearnableLinear,
    divergence,
    learning_groups,
    make_learnable,
    settle,
    state_distance,
    twin,
)
from gemini.compress.specs import QuantizeInt4


def slow_divergence(student, teacher):
    """sum_v p_v (log p_v - log q_v), one token at a time, float64."""
    total = 0.0
    rows = list(zip(student.flatten(0, -2).double(), teacher.flatten(0, -2).double(), strict=True))
    for found, known in rows:
        p, q = functional.softmax(known, 0), functional.softmax(found, 0)
        total = total + (p * (p.log() - q.log())).sum()
    return total / len(rows)


def test_divergence_of_bfloat16_logits_is_computed_in_floats():
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(5, 70, dtype=torch.bfloat16) for _ in range(2))
    exact = student.double().requires_grad_()
    expected = slow_divergence(exact, teacher.double())
    expected.backward()
    loss = divergence(student.requires_grad_(), teacher)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    assert student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 5, 11), (3, 50, 7)])  # the second: more tokens than are taken at once
def test_divergence_and_its_gradient_are_those_of_the_definition(shape):
    torch.manual_seed(0)
    student, teacher = torch.randn(shape, requires_grad=True), 3 * torch.randn(shape)
    loss = divergence(student, teacher)
    (ours,) = torch.autograd.grad(3 * loss, student)
    expected = slow_divergence(student, teacher)
    (theirs,) = torch.autograd.grad(3 * expected, student)
    # float32 against float64
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert divergence(teacher, teacher).abs() < 1e-6


def test_state_distance_counts_every_token_alike_and_pairs_layers_evenly():
    torch.manual_seed(0)
    teacher = [torch.randn(2, 3, 4) for _ in range(6)]
    student = [torch.randn(2, 3, 4) for _ in range(4)]
    teacher[5][:, 0] *= 1000
    pairs = [(0, 1), (1, 2), (2, 4), (3, 5)]  # ceil((i + 1) 6 / 4) - 1
    expected = 0.0
    for mine, other in pairs:
        for row in range(2):
            for token in range(3):
                s, t = student[mine][row, token], teacher[other][row, token]
                expected += float(((s - t) ** 2).sum() / (t**2).sum()) / (4 * 2 * 3)
    assert float(state_distance(student, teacher)) == pytest.approx(expected, rel=1e-5)
    assert float(state_distance(teacher, teacher)) == 0
    named = [0, 2, 3, 5]
    same = [teacher[index] for index in named]
    assert float(state_distance(same, teacher, named)) == 0 < float(state_distance(same, teacher))


def packed(bits, symmetric, columns=80, rows=6):
    torch.manual_seed(bits)
    weight = torch.randn(rows, columns)
    layer = make_linear(weight, torch.randn(rows), Integers(bits, 32, symmetric, "nearest"))
    assert isinstance(layer, QuantizedLinear)
    return layer


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (8, True), (8, False)])
@pytest.mark.parametrize("codes", [False, True])
def test_what_has_not_learned_packs_into_the_same_bytes(bits, symmetric, codes):
    layer = packed(bits, symmetric)
    learning = LearnableLinear(layer, codes)
    torch.testing.assert_close(learning.weight, layer.dequantized(), rtol=0, atol=0)
    again = learning.settled()
    assert {name: value.dtype for name, value in again.named_buffers()} == {
        name: value.dtype for name, value in layer.named_buffers()
    }
    for name, value in layer.named_buffers():
        assert torch.equal(getattr(again, name), value)
    assert again.extra_repr() == layer.extra_repr()


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (8, True)])
def test_gradients_are_those_of_plain_autograd_with_a_straight_through_round(bits, symmetric, codes):
    layer = packed(bits, symmetric)
    learning = LearnableLinear(layer, codes)
    low = -learning.zeros.float()
    high = low + (1 << bits) - 1
    with torch.no_grad():
        learning.gain *= 1 + 0.1 * torch.rand_like(learning.gain)
        if codes:  # some of them beyond the range that the zero point leaves
            learning.latent += 3 * torch.randn_like(learning.latent)
    x, y = torch.randn(7, 80), torch.randn(7, 6)
    (learning(x) * y).sum().backward()

    latent = (learning.latent if codes else learning.fixed).detach().float().requires_grad_()
    gain = learning.gain.detach().clone().requires_grad_()
    inside = latent.maximum(low - 0.5).minimum(high + 0.5)  # its gradient stops at the ends
    code = inside + (latent.round().maximum(low).minimum(high) - inside).detach()
    spelled = (code * (layer.scales * gain).unsqueeze(-1)).flatten(1)[:, :80]
    (functional.linear(x, spelled, layer.bias) * y).sum().backward()
    torch.testing.assert_close(learning.gain.grad, gain.grad, rtol=1e-4, atol=1e-4)
    if codes:
        torch.testing.assert_close(learning.latent.grad, latent.grad, rtol=1e-5, atol=1e-6)
        assert (learning.latent.grad == 0).any() and (learning.latent.grad != 0).any()
    settled = learning.settled()
    with torch.no_grad():
        # Scales are rounded to the 11 bits of a float16.
        torch.testing.assert_close(settled.dequantized(), learning.weight, rtol=2**-11, atol=0)


@pytest.mark.parametrize("codes", [False, True])
def test_steps_lower_the_divergence_and_leave_the_teacher_and_the_format(codes):
    original = make_llama()
    kept = copy.deepcopy(original.state_dict())
    student = twin(original)
    windows = make_windows()
    run(student, QuantizeInt4(block_size=32, embedding_block_size=32), calibration=windows)
    before = {name: (value.shape, value.dtype) for name, value in student.state_dict().items()}
    table = student.get_input_embeddings().qweight.clone()
    known = logits_of(original, windows)
    start = divergence(logits_of(student, windows), known)

    make_learnable(student, codes)
    optimizer = torch.optim.AdamW(learning_groups(student, 3e-3, 0.05), lr=0.0, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["lr"] = group["base"]
    for _ in range(30):
        loss = divergence(torch.cat([student(torch.as_tensor(w)).logits for w in windows]), known)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    learned = logits_of(student, windows)
    settle(student)
    assert divergence(learned, known) < 0.7 * start
    # Scales are rounded to the 11 bits of a float16 then.
    assert divergence(logits_of(student, windows), learned) < 1e-3 * start
    assert {name: (value.shape, value.dtype) for name, value in student.state_dict().items()} == before
    assert isinstance(student.get_input_embeddings(), QuantizedEmbedding)
    assert torch.equal(student.get_input_embeddings().qweight, table)
    assert all(torch.equal(value, kept[name]) for name, value in original.state_dict().items())


def test_scales_norms_and_biases_learn_and_nothing_at_the_ends():
    student = make_llama()
    run(student, QuantizeInt4(block_size=32, embedding_block_size=32))
    make_learnable(student)
    learning = {name for name, p in student.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in learning} == {"gain", "weight"}
    assert all("norm" in name or name.endswith(".gain") for name in learning)
    assert not any(isinstance(m, LearnableLinear) for m in (student.lm_head, student.get_input_embeddings()))


def test_parts_of_a_split_table_stay_as_they_are():
    student = make_llama()
    run(student, QuantizeInt4(block_size=32, embedding_bits=4, embedding_wide_share=0.25))
    make_learnable(student)
    assert not any(isinstance(m, LearnableLinear) for m in student.lm_head.modules())


def test_rates_are_shares_of_a_tensors_size():
    model = nn.Module()
    model.large, model.latent, model.zero = (nn.Parameter(torch.full((4,), v)) for v in (30.0, 5.0, 0.0))
    model.fixed = nn.Parameter(torch.ones(2), requires_grad=False)
    bases = [group["base"] for group in learning_groups(model, 0.01, 0.02)]
    assert bases == pytest.approx([0.3, 0.05, 1e-5])
