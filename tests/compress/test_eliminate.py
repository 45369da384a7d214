"""Elimination of units against trying every unit and solving least squares anew each time."""

import numpy as np
import pytest
import torch

from gemini.compress.eliminate import correct, eliminate, unit_energy


def case(rows: int, columns: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    x = (torch.randn(500, columns, generator=generator) @ mix).double()
    return torch.randn(rows, columns, generator=generator), x, x.T @ x / len(x)


def least_squares(weight, hessian, columns, damping=0.01):
    """argmin over W' with only these columns of tr((W - W') H (W - W')^T), by the square root of H."""
    h = hessian.numpy() + damping * hessian.diagonal().mean().item() * np.eye(len(hessian))
    root = np.linalg.cholesky(h).T
    solved = np.linalg.lstsq(root[:, columns], root @ weight.double().numpy().T, rcond=None)[0]
    made = np.zeros(weight.shape)
    made[:, columns] = solved.T
    wrong = made - weight.double().numpy()
    return made, np.einsum("ni,ij,nj->n", wrong, h, wrong)


def slow_eliminate(weight, hessian, units, count, fisher):
    left = list(range(len(units)))
    for _ in range(count):
        losses = []
        for unit in left:
            columns = sorted(c for other in left if other != unit for c in units[other].tolist())
            losses.append((least_squares(weight, hessian, columns)[1] * fisher).sum())
        left.pop(int(np.argmin(losses)))
    return left, least_squares(weight, hessian, sorted(c for unit in left for c in units[unit].tolist()))[0]


@pytest.mark.parametrize(("width", "count"), [(1, 9), (4, 3)])
@pytest.mark.parametrize("weighed", [False, True])
def test_the_unit_that_costs_least_goes_each_time(width, count, weighed):
    weight, _, hessian = case(7, 24)
    units = torch.randperm(24, generator=torch.Generator().manual_seed(5)).reshape(-1, width).sort(1).values
    fisher = torch.linspace(0.1, 9.0, 7) if weighed else torch.ones(7)
    kept, made = eliminate(weight, hessian, units, count, fisher=fisher if weighed else None)
    expected, solution = slow_eliminate(weight, hessian, units, count, fisher.numpy())
    assert kept.tolist() == expected
    # float64 steps one after another against one solution; the result is float32.
    np.testing.assert_allclose(made.numpy(), solution, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(correct(weight, hessian, units, kept), made, rtol=1e-5, atol=1e-5)
    gone = [c for unit in range(len(units)) if unit not in expected for c in units[unit].tolist()]
    assert not made[:, gone].any()


def test_none_taken_away_changes_nothing():
    weight, _, hessian = case(3, 8)
    kept, made = eliminate(weight, hessian, torch.arange(8)[:, None], 0)
    assert kept.tolist() == list(range(8))
    assert torch.equal(made, weight)
    with pytest.raises(ValueError, match="8 of 8"):
        eliminate(weight, hessian, torch.arange(8)[:, None], 8)
    with pytest.raises(ValueError, match="finite"):
        eliminate(weight, hessian * float("nan"), torch.arange(8)[:, None], 1)


def test_inputs_that_are_always_zero_cost_nothing():
    weight, x, _ = case(5, 12)
    x[:, [2, 7]] = 0
    kept, _ = eliminate(weight, x.T @ x / len(x), torch.arange(12)[:, None], 2)
    assert sorted(set(range(12)) - set(kept.tolist())) == [2, 7]
    assert torch.isfinite(eliminate(weight, torch.zeros(12, 12), torch.arange(12)[:, None], 3)[1]).all()


def test_energy_is_that_of_the_units_own_output():
    weight, x, hessian = case(6, 20)
    units = torch.arange(20).reshape(5, 4)
    fisher = torch.linspace(0.5, 2.0, 6)
    for unit, energy in enumerate(unit_energy(weight, hessian, units, fisher).tolist()):
        out = x[:, units[unit]] @ weight[:, units[unit]].double().T
        assert energy == pytest.approx(float((out.square() * fisher).sum(1).mean()), rel=1e-6)
    singles = unit_energy(weight, hessian, torch.arange(20)[:, None])
    by_hand = x.square().mean(0) * weight.double().square().sum(0)
    torch.testing.assert_close(singles, by_hand, rtol=1e-6, atol=0)


@pytest.mark.parametrize("threads", [1, 2])
def test_heads_of_a_real_size_are_taken_away(threads):
    """With two threads MKL's batched LU refuses these systems, on an AMD processor at least."""
    torch.manual_seed(0)
    inputs = torch.randn(1000, 576) * torch.logspace(-3, 2, 576)[torch.randperm(576)]
    hessian = (inputs.T @ inputs).double() / len(inputs)
    weight, units = torch.randn(96, 576), torch.arange(576).view(3, 192)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kept, made = eliminate(weight, hessian, units, 1)
    finally:
        torch.set_num_threads(before)
    expected, solved = slow_eliminate(weight, hessian, units, 1, np.ones(len(weight)))
    assert kept.tolist() == expected
    np.testing.assert_allclose(made.double().numpy(), solved, rtol=1e-3, atol=1e-4)
