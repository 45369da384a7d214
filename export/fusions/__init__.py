"""Graph passes after tracing, in the order in which they run."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript.optimizer import fold_constants

from gemini.export.fusions.experts import fuse_router, keep_sequences
from gemini.export.fusions.factors import share_factors
from gemini.export.fusions.half_scales import halve_scales
from gemini.export.fusions.layout import drop_no_ops, drop_transpose_pairs, fix_reshapes, join_reshapes
from gemini.export.fusions.merge_projections import merge_qkv, pack_qkv
from gemini.export.fusions.rotary_tables import compute_rotary_tables
from gemini.export.fusions.skip_norm import fuse_skip_norm

# Constants larger than this stay as they are: they are weights.
SMALL = 8192

# Layout first: attention and norms only see each other once the reshapes between them are gone. Reshapes
# become constant before the last clean-up, so that the shape arithmetic behind them dies with it. Scales
# come last: what merges products reads them as constants.
FUSIONS = (
    drop_transpose_pairs,
    drop_no_ops,
    join_reshapes,
    drop_no_ops,
    fix_reshapes,
    share_factors,
    pack_qkv,
    merge_qkv,
    fuse_router,
    keep_sequences,
    fuse_skip_norm,
    compute_rotary_tables,
    halve_scales,
)


def fuse(model: ir.Model) -> dict[str, int]:
    """Apply every pass in place; returns how often each fired."""
    counts: dict[str, int] = {}
    common.RemoveUnusedNodesPass()(model)
    fold_constants(model, input_size_limit=SMALL, output_size_limit=SMALL)
    for fusion in FUSIONS:
        counts[fusion.__name__] = counts.get(fusion.__name__, 0) + fusion(model.graph)
        common.RemoveUnusedNodesPass()(model)
    for tidy in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.TopologicalSortPass(),
    ):
        tidy(model)
    return counts
