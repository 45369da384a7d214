"""The loop of a recovery: what learns, what stays, the best state, early stopping, going on after a kill."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from small_models import logits_of, make_llama, make_windows

from gemini.compress import distill as loop
from gemini.compress.distill import Distillation, distill
from gemini.compress.recover import divergence, twin
from gemini.errors import RecipeError

OPTIONS = Distillation(minutes=1e9, rate=0.02, steps=24, warmup=2)


def rows(count, length=12, seed=0):
    return np.random.default_rng(seed).integers(0, 160, (count, length))


def pair():
    """A teacher, and a student that has the teacher's norms wrong and may learn them."""
    teacher = make_llama()
    with torch.no_grad():  # logits of some size, so that there is something to tell
        teacher.get_input_embeddings().weight *= 20
    student = copy.deepcopy(teacher)
    for name, parameter in student.named_parameters():
        if "norm" in name:
            torch.manual_seed(len(name))
            parameter.data *= 1 + 0.5 * torch.randn_like(parameter)
            parameter.requires_grad_(True)
    return student, teacher


def plain(student, teacher, held_out):
    with torch.no_grad():
        ids = torch.from_numpy(held_out)
        return float(divergence(student(ids).logits, teacher(ids).logits))


def test_the_student_gets_nearer_and_nothing_else_changes():
    student, teacher = pair()
    learning = {name for name, p in student.named_parameters() if p.requires_grad}
    before, known = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())
    held_out = rows(9, seed=1)
    start = plain(student, teacher, held_out)
    report = distill(student, teacher, rows(16), held_out, OPTIONS, show=False)
    assert report.before == pytest.approx(start, rel=1e-5)
    assert report.after == pytest.approx(plain(student, teacher, held_out), rel=1e-5)
    assert report.after < 0.7 * report.before
    assert report.steps == 24 and report.trained == 5 * 64
    assert [row["step"] for row in report.history] == [0, *range(3, 25, 3)]
    after = student.state_dict()
    assert {name for name, value in after.items() if not torch.equal(value, before[name])} == learning
    assert all(torch.equal(value, known[name]) for name, value in teacher.state_dict().items())


def test_steps_in_bfloat16_lead_where_others_do_and_evaluations_stay_exact(monkeypatch):
    monkeypatch.setattr(loop, "bf16_where_native", lambda: torch.autocast("cpu", torch.bfloat16))
    found, held_out = {}, rows(9, seed=1)
    for bf16 in (False, True):
        student, teacher = pair()
        options = dataclasses.replace(OPTIONS, bf16=bf16)
        report = distill(student, teacher, rows(16), held_out, options, show=False)
        assert report.after == pytest.approx(plain(student, teacher, held_out), rel=1e-5)
        assert all(p.dtype == torch.float32 for p in student.parameters())
        found[bf16] = report
    assert found[True].before == found[False].before
    gained = [report.before - report.after for report in found.values()]
    assert gained[1] == pytest.approx(gained[0], rel=0.05) and gained[1] != gained[0]


def test_hidden_states_count_when_asked():
    found = []
    for states in (0.0, 10.0):
        student, teacher = pair()
        distill(
            student,
            teacher,
            rows(16),
            rows(4, seed=1),
            dataclasses.replace(OPTIONS, states=states),
            show=False,
        )
        ids = torch.from_numpy(rows(4, seed=1))
        with torch.no_grad():
            mine, other = (m(ids, output_hidden_states=True).hidden_states[1] for m in (student, teacher))
        found.append(float((mine - other).norm() / other.norm()))
    assert found[1] < 0.9 * found[0]


def test_the_text_counts_when_asked():
    """A row of chance over and over, which the teacher does not expect."""
    text, known = np.tile(rows(1), (8, 1)), {}
    for labels in (0.0, 3.0):
        student, teacher = pair()
        options = dataclasses.replace(OPTIONS, labels=labels)
        report = distill(student, teacher, text, text[:4], options, show=False)
        with torch.no_grad():
            said = student(torch.from_numpy(text[:1]), use_cache=False).logits[0, :-1].log_softmax(-1)
        known[labels] = -float(said[range(11), text[0, 1:]].mean())
        if labels:
            noted = [row["cross_entropy"] for row in report.history if row["step"] == report.best_step]
            assert noted == [pytest.approx(known[labels], rel=1e-4)]
            losses = [row["held_out"] + labels * row["cross_entropy"] for row in report.history]
            assert min(losses) == losses[[row["step"] for row in report.history].index(report.best_step)]
    assert known[3.0] < known[0.0] - 0.1


def test_the_best_state_stays_and_a_run_that_gets_worse_stops():
    student, teacher = pair()
    for name, parameter in student.named_parameters():
        parameter.data = dict(teacher.named_parameters())[name].data.clone()  # nothing is better than this
    before = copy.deepcopy(student.state_dict())
    options = dataclasses.replace(OPTIONS, rate=0.5, patience=3)
    report = distill(student, teacher, rows(16), rows(4, seed=1), options, show=False)
    assert report.best_step == 0 and report.after == report.before
    assert report.steps == 9  # three evaluations, three steps each
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_run_that_was_killed_ends_as_an_unbroken_one(tmp_path, monkeypatch):
    whole, teacher = pair()
    expected = distill(whole, teacher, rows(16), rows(4, seed=1), OPTIONS, show=False)

    step, calls = loop._step, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return step(*args)

    folder = tmp_path / "state"
    monkeypatch.setattr(loop, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        distill(pair()[0], teacher, rows(16), rows(4, seed=1), OPTIONS, folder=folder, show=False)
    student, _ = pair()
    report = distill(student, teacher, rows(16), rows(4, seed=1), OPTIONS, folder=folder, show=False)
    assert len(calls) == 15 + 24 - 9  # on from the third evaluation
    assert dataclasses.replace(report, minutes=0, history=[]) == dataclasses.replace(
        expected, minutes=0, history=[]
    )
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=0, atol=0)


def test_time_ends_a_run():
    student, teacher = pair()
    report = distill(student, teacher, rows(16), rows(4, seed=1), Distillation(minutes=0.01), show=False)
    assert 0 < report.steps < 10_000
    student, teacher = pair()
    assert distill(student, teacher, rows(16), rows(4), Distillation(minutes=0), show=False).steps == 0


def test_a_loss_that_is_not_finite_is_named():
    student, teacher = pair()
    student.model.norm.weight.data[0] = torch.nan
    with pytest.raises(RecipeError, match="step 0 is nan"):
        distill(student, teacher, rows(16), rows(4), OPTIONS, show=False)


def test_a_twin_shares_tensors_and_no_module():
    model = make_llama()
    other = twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not set(model.modules()) & set(other.modules())
    other.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 96, bias=False)
    windows = make_windows()
    assert not torch.equal(logits_of(other, windows), logits_of(model, windows))
    other.lm_head, kept = None, model.lm_head
    assert model.lm_head is kept
