"""Write graphs and their weights: small tensors inside the .onnx files, others aligned in one data file.

Tensors with equal bytes are stored once, whatever their shapes and in whichever graph, so a head tied to an
embedding costs nothing, and neither does a table that encoder and decoder share. The order is that of the
graphs, so equal graphs give equal files.

Source: ONNX external data, "location", "offset" and "length" keys of TensorProto.external_data.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
from tqdm import tqdm

# Large tensors begin on a page, so that onnxruntime can map them straight from the file; its own writer has
# the same limit. Hundreds of smaller ones would waste half a page each.
PAGE, LARGE_BYTES = 4096, 1 << 20
CACHE_LINE = 64
# Below this a tensor is cheaper inside the graph file.
INLINE_BYTES = 1024


def write_weights(models: Sequence[ir.Model], data: Path, progress: bool = False) -> dict[str, int]:
    """Write every large initializer into ``data`` and point its model at it; returns bytes by initializer
    name.

    A tensor whose bytes are already in the file counts 0. The file is created even if it stays empty.
    """
    stored: dict[str, ir.ExternalTensor] = {}
    sizes: Counter[str] = Counter()
    values = [v for m in models for v in m.graph.initializers.values() if v.const_value is not None]
    with data.open("wb") as file:
        for value in tqdm(values, desc="weights", unit="tensor", delay=2, disable=not progress, leave=False):
            tensor = value.const_value
            assert tensor is not None and value.name is not None
            if tensor.nbytes < INLINE_BYTES:
                sizes[value.name] += tensor.nbytes
                continue
            raw = tensor.tobytes()
            digest = hashlib.sha256(raw).hexdigest()
            first = stored.get(digest)
            sizes[value.name] += 0 if first else len(raw)
            if first is None:
                alignment = PAGE if len(raw) >= LARGE_BYTES else CACHE_LINE
                file.write(b"\0" * (-file.tell() % alignment))
                offset = file.tell()
                file.write(raw)
            else:
                assert first.offset is not None
                offset = first.offset
            external = ir.ExternalTensor(
                data.name,
                offset,
                len(raw),
                tensor.dtype,
                shape=tensor.shape,
                name=value.name,
                base_dir=data.parent,
            )
            stored.setdefault(digest, external)
            value.const_value = external
    return sizes


def write_graph(model: ir.Model, path: Path) -> None:
    """Write the graph; its large weights must already be in a data file beside it."""
    path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
