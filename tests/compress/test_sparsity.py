"""Masks index for index against sorting in Python; SparseGPT against elimination step by step."""

import numpy as np
import pytest
import torch

from gemini.compress.sparsity import keep_largest, keep_n_of_m, magnitude_mask, sparsegpt, wanda_scores


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = (normal(400, columns, seed=1) @ normal(columns, columns, seed=2)).double()
    return normal(rows, columns), x.T @ x / len(x)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.77, 1.0])
def test_magnitude_drops_the_smallest_of_the_whole_weight(sparsity):
    weight = normal(17, 13)
    weight[3] = weight[4].abs()  # equals, whichever their sign
    flat = [abs(value) for value in weight.flatten().tolist()]
    dropped = sorted(range(len(flat)), key=lambda index: flat[index])[: round(sparsity * len(flat))]
    mask = magnitude_mask(weight, sparsity)
    assert (~mask).flatten().nonzero().flatten().tolist() == sorted(dropped)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.6])
def test_wanda_compares_within_a_row(sparsity):
    weight, importance = normal(9, 40), normal(40, seed=3).square()
    mask = keep_largest(wanda_scores(weight, importance), sparsity)
    for row in range(9):
        scores = [abs(float(w)) * float(m) ** 0.5 for w, m in zip(weight[row], importance, strict=True)]
        dropped = sorted(range(40), key=lambda index: scores[index])[: round(sparsity * 40)]
        assert (~mask[row]).nonzero().flatten().tolist() == sorted(dropped)


def test_two_of_four():
    scores = normal(6, 24).abs()
    mask = keep_n_of_m(scores, 2, 4)
    for row in range(6):
        for group in range(0, 24, 4):
            best = sorted(range(4), key=lambda index: -scores[row, group + index])[:2]
            assert mask[row, group : group + 4].nonzero().flatten().tolist() == sorted(best)
    with pytest.raises(ValueError, match="groups of 4"):
        keep_n_of_m(scores[:, :22], 2, 4)


def slow_sparsegpt(weight, hessian, sparsity, pattern, panel=128, damping=0.01) -> np.ndarray:
    """Every inverse is that of the features which are left, by elimination."""
    work, h = weight.double().numpy().copy(), hessian.double().numpy().copy()
    h[np.diag_indices_from(h)] += damping * h.diagonal().mean()
    inverses, inverse = [], np.linalg.inv(h)
    for feature in range(len(h)):
        inverses.append(inverse.copy())
        column = inverse[:, feature].copy()
        inverse -= np.outer(column, column) / column[feature]
    for feature in range(len(h)):
        if feature % panel == 0:
            members = range(feature, min(feature + panel, len(h)))
            cost = np.stack([work[:, j] ** 2 / inverses[j][j, j] for j in members], axis=1)
            if pattern is None:
                dropped = np.zeros(cost.size, bool)
                dropped[np.argsort(cost.flatten(), kind="stable")[: round(sparsity * cost.size)]] = True
                dropped = dropped.reshape(cost.shape)
            else:
                ranks = cost.reshape(len(work), -1, pattern[1]).argsort(-1).argsort(-1)
                dropped = (ranks < pattern[1] - pattern[0]).reshape(cost.shape)
        for row in np.flatnonzero(dropped[:, feature % panel]):
            gone = work[row, feature] / inverses[feature][feature, feature]
            work[row, feature:] -= gone * inverses[feature][feature, feature:]
            work[row, feature] = 0.0
    return work


@pytest.mark.parametrize(
    ("columns", "sparsity", "pattern"), [(96, 0.5, None), (200, 0.7, None), (160, 0.5, (2, 4))]
)
def test_sparsegpt_equals_elimination(columns, sparsity, pattern):
    weight, hessian = case(12, columns)
    found = sparsegpt(weight, hessian, sparsity, pattern=pattern).numpy()
    expected = slow_sparsegpt(weight, hessian, sparsity, pattern)
    np.testing.assert_array_equal(found == 0, expected == 0)
    # float64 sums in another order, then float32.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    zeros = [round(sparsity * 12 * min(128, columns - start)) for start in range(0, columns, 128)]
    assert (found == 0).sum() == sum(zeros)


def test_what_stays_makes_up_for_what_goes():
    weight, hessian = case(64, 192)
    errors = {}
    for name, made in (
        ("magnitude", weight * magnitude_mask(weight, 0.5)),
        ("wanda", weight * keep_largest(wanda_scores(weight, hessian.diagonal()), 0.5)),
        ("sparsegpt", sparsegpt(weight, hessian, 0.5)),
    ):
        wrong = (weight - made).double()
        errors[name] = float(torch.einsum("ri,ij,rj->", wrong, hessian, wrong))
    assert errors["sparsegpt"] < 0.8 * min(errors["wanda"], errors["magnitude"])
