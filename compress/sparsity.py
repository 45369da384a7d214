"""Unstructured pruning: which weights become zero, and what the others do about it.

Masks are bool, True where a weight stays; how many stay is exact. onnxruntime has no kernel that skips zeros,
so none of this makes a bundle faster: it packs better for transfer, and serves comparison.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemini.compress.gptq import DAMPING, inverse_factor
from gemini.compress.quantize import require_finite

_PANEL = 128  # features whose mask is chosen together, arXiv:2301.00774, section 3.3


def keep_largest(scores: Tensor, sparsity: float) -> Tensor:
    """Mask over the last dimension: in each row ``round(sparsity * K)`` of the lowest scores go.

    Of equal scores the earlier one goes first.
    """
    dropped = round(sparsity * scores.shape[-1])
    order = scores.argsort(dim=-1, stable=True)
    mask = torch.ones_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, order[..., :dropped], False)


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Mask with the ``n`` highest of every ``m`` neighbouring scores of a row (2:4 and the like).

    ValueError unless rows are whole groups.
    """
    if scores.shape[-1] % m:
        raise ValueError(f"rows of {scores.shape[-1]} cannot be cut into groups of {m}")
    return keep_largest(scores.unflatten(-1, (-1, m)), 1 - n / m).flatten(-2)


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Drop the smallest |w| of the whole weight (rows, K)."""
    return keep_largest(weight.abs().flatten(), sparsity).view_as(weight)


def wanda_scores(weight: Tensor, importance: Tensor) -> Tensor:
    """``|w_ij| * sqrt(E[x_j^2])``, compared within a row (Sun et al., "Wanda", arXiv:2306.11695, section 3).

    weight (rows, K), importance (K,) = E[x^2].
    """
    return weight.abs() * importance.to(weight.dtype).sqrt()


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float = 0.5,
    *,
    pattern: tuple[int, int] | None = None,
    damping: float = DAMPING,
) -> Tensor:
    """Drop weights by what their loss costs after the features to come have made up for it.

    Frantar and Alistarh, "SparseGPT", arXiv:2301.00774, algorithm 1. Features are taken in turn; the mask of
    128 of them is chosen when they are reached, by w^2 / [H^-1]_ii over all rows together, or with
    ``pattern`` (n, m) by keeping n of every m in each row.

    Args:
        weight: float (rows, K).
        hessian: (K, K), E[x x^T] of the layer's inputs.

    Returns:
        float32 (rows, K), the dropped weights exactly 0.

    Raises:
        ValueError: values that are not finite, a Hessian that is not positive definite, or rows that are no
            whole groups of m.
    """
    require_finite(weight)
    require_finite(hessian)
    columns = weight.shape[1]
    panel_size = _PANEL if pattern is None else _PANEL // pattern[1] * pattern[1]
    if pattern is not None and columns % pattern[1]:
        raise ValueError(f"rows of {columns} cannot be cut into groups of {pattern[1]}")
    factor = inverse_factor(hessian, damping)
    work = weight.T.double().contiguous()  # (K, rows): features in turn are rows in turn
    for start in range(0, columns, panel_size):
        panel = slice(start, min(start + panel_size, columns))
        scores = (work[panel] / factor.diagonal()[panel, None]).square()
        if pattern is None:
            kept = keep_largest(scores.T.flatten(), sparsity).view(scores.T.shape).T
        else:
            kept = keep_n_of_m(scores.T, *pattern).T
        errors = torch.empty_like(work[panel])
        for row in range(panel.start, panel.stop):
            error = torch.where(kept[row - start], 0.0, work[row]) / factor[row, row]
            work[row : panel.stop] -= factor[row, row : panel.stop, None] * error
            work[row].masked_fill_(~kept[row - start], 0.0)
            errors[row - start] = error
        work[panel.stop :] -= factor[panel, panel.stop :].T @ errors
    return work.T.float().contiguous()
