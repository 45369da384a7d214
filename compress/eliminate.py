"""Which units of a layer's input matter least, and what the others do about their loss: pure functions.

A unit is a set of input features that go together (a feed-forward unit is one, an attention head many).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemini.compress.gptq import DAMPING, damped
from gemini.compress.quantize import require_finite


def unit_energy(weight: Tensor, hessian: Tensor, units: Tensor, fisher: Tensor | None = None) -> Tensor:
    """What each unit adds to the output alone: sum_i F_i w_iu^T E[x_u x_u^T] w_iu, float64 (G,).

    weight (N, K); hessian E[x x^T] (K, K); units int64 (G, c), columns of each unit; fisher (N,) weighs the
    outputs, None for ones. For a unit of one column this is E[x_j^2] sum_i w_ij^2, the structured form of
    Wanda's score (Sun et al., arXiv:2306.11695, equation 1, squared and summed over outputs).
    """
    rows = weight.double() if fisher is None else weight.double() * fisher.double().sqrt()[:, None]
    parts = rows.T[units]  # (G, c, N)
    moments = hessian.double()[units[:, :, None], units[:, None, :]]  # (G, c, c)
    return (parts * (moments @ parts)).sum((1, 2))


def eliminate(
    weight: Tensor,
    hessian: Tensor,
    units: Tensor,
    count: int,
    *,
    damping: float = DAMPING,
    fisher: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take ``count`` units away one after another, each time that which the others can best make up for.

    Kurtic, Frantar and Alistarh, "ZipLM", arXiv:2302.04089, algorithm 1: with the inverse Hessian of the
    columns left, unit u costs tr(W_u ([H^-1]_uu)^-1 W_u^T) and its loss is shared out by
    W -= W_u ([H^-1]_uu)^-1 [H^-1]_u:, which leaves the least-squares solution over what is left.

    Args:
        weight: float (N, K).
        hessian: (K, K), E[x x^T] of the inputs; ``damping`` times the mean of its diagonal is added to it.
        units: int64 (G, c), columns of each unit.
        fisher: (N,), weights of the outputs when units are compared; None for ones.

    Returns:
        Kept units int64 (G - count,) ascending, and the corrected weight float32 (N, K), 0 in columns of
        units taken away.

    Raises:
        ValueError: values that are not finite, or a count that leaves no unit.
    """
    if not 0 <= count < len(units):
        raise ValueError(f"{count} of {len(units)} units cannot be taken away")
    left = torch.ones(len(units), dtype=torch.bool)
    work, inverse = _start(weight, hessian, damping)
    scale = torch.ones(len(work), dtype=torch.float64) if fisher is None else fisher.double()
    for _ in range(count):
        remaining = left.nonzero().flatten()
        unit = int(remaining[_costs(work, inverse, units[remaining], scale).argmin()])
        _take(work, inverse, units[unit])
        left[unit] = False
    return left.nonzero().flatten(), _finished(work, units[~left])


def correct(
    weight: Tensor, hessian: Tensor, units: Tensor, kept: Tensor, *, damping: float = DAMPING
) -> Tensor:
    """The weight (N, K) with only the ``kept`` units, which make up for the others by least squares.

    As ``eliminate`` leaves it, for a choice that was made elsewhere: with H the damped Hessian,
    W' = W H_:k (H_kk)^-1.
    """
    require_finite(weight)
    require_finite(hessian)
    columns = units[kept].flatten().sort().values
    measure = damped(hessian, damping)
    factor = torch.linalg.cholesky(measure[columns][:, columns])
    solved = torch.cholesky_solve(measure[columns] @ weight.double().T, factor)
    made = torch.zeros_like(weight, dtype=torch.float32)
    made[:, columns] = solved.T.float()
    return made


def _start(weight: Tensor, hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    require_finite(weight)
    require_finite(hessian)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(hessian, damping)))
    return weight.double().clone(), inverse


def _costs(work: Tensor, inverse: Tensor, units: Tensor, scale: Tensor) -> Tensor:
    """What it costs to take each of the units (g, c) away now: float64 (g,)."""
    if units.shape[1] == 1:  # one column each: no system to solve
        columns = units[:, 0]
        return (scale @ work.square())[columns] / inverse.diagonal()[columns]
    corners = inverse[units[:, :, None], units[:, None, :]]  # (g, c, c)
    parts = work.T[units]  # (g, c, N)
    # Factors of Cholesky: all of these are positive definite, and MKL's batched LU fails on some of them.
    halves = torch.linalg.solve_triangular(torch.linalg.cholesky(corners), parts, upper=False)
    return (halves.square() * scale).sum((1, 2))


def _take(work: Tensor, inverse: Tensor, columns: Tensor) -> None:
    """One step: share the loss of the columns out and take them out of the inverse, both in place."""
    rows = inverse[columns]  # (c, K)
    shares = torch.cholesky_solve(rows, torch.linalg.cholesky(rows[:, columns]))  # (c, K)
    work.addmm_(work[:, columns], shares, alpha=-1)
    inverse.addmm_(rows.T, shares, alpha=-1)


def _finished(work: Tensor, taken: Tensor) -> Tensor:
    made = work.float()
    made[:, taken.flatten()] = 0.0  # what is left there is rounding
    return made.contiguous()
