"""Weights packed once and for all: a second process maps them from the file and packs nothing.

    prepack(Path("out"), "avx512")

The runtime's own kernels read weights in an order of their own (`runtime/native/kernels.h`, `channels.h`) and
bring them into it whenever a session is opened. Here that is done beforehand: each graph for those kernels
gets a copy whose weights lie in a file as they are read. Processes that open it share the file's pages.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from tqdm import tqdm

from gemini.errors import BundleError, UsageError
from gemini.export.bundle import commit, staging, write_manifest
from gemini.export.graph_file import write_graph, write_weights
from gemini.export.stages import DOMAIN, WEIGHT_INTS
from gemini.runtime import kernels
from gemini.runtime.bundle import MANIFEST_NAME, Bundle, read_bundle
from gemini.runtime.fields import damaged

Product = tuple[Any, ...]  # its codes, scales and zero points; features, outputs, bits, block size
Constants = list[ir.Value | None]  # codes, scales and zero points; None: there is none, or the old one stays


def prepack(path: Path, layout: str, progress: bool = False) -> Bundle:
    """Add to a bundle, in place, its graphs with weights packed for the kernels in ``layout``
    (`gemini.runtime.kernels.LAYOUTS`), in place of those that were there; returns the new bundle.

    Raises:
        BundleError: no graph of the bundle is for the own kernels, or the bundle is damaged.
        UsageError: the layout is unknown, or the own kernels cannot run here.
    """
    if layout not in kernels.LAYOUTS:
        raise UsageError(f"There is no layout {layout!r}.", f"Choose from {', '.join(kernels.LAYOUTS)}.")
    if not kernels.available():
        raise UsageError(
            "The runtime's own kernels are not built, or do not fit this processor.",
            "Install gemini-edge where there is a C compiler, on an x86-64 processor with AVX2.",
        )
    bundle = read_bundle(path)
    if not bundle.manifest.fused_graphs:
        raise BundleError(
            "The bundle has no graph for the runtime's own kernels, so there is nothing to pack.",
            "Compress the model with a recipe of 4 or 8 bits.",
        )
    models = {
        key: packed_model(ir.load(bundle.graph(name)), kernels.LAYOUTS[layout], progress)
        for key, name in bundle.manifest.fused_graphs.items()
    }
    files = {key: f"{key}.{layout}.onnx" for key in models}
    data = f"{next(iter(files.values()))}.data"
    renewed = {data, *files.values(), MANIFEST_NAME}
    with staging(bundle.path) as folder:
        for name in bundle.manifest.files:
            if name not in renewed:
                shutil.copy2(bundle.file(name), folder / name)
        write_weights(list(models.values()), folder / data, progress)
        for key, model in models.items():
            write_graph(model, folder / files[key])
        packed = {**bundle.manifest.raw.get("packed_graphs", {}), layout: files}
        write_manifest(folder, {**bundle.manifest.raw, "packed_graphs": packed})
        commit(folder, bundle.path)
    return read_bundle(path)


def packed_model(model: ir.Model, tile: int, progress: bool = False) -> ir.Model:
    """The graph, changed in place, with the constants of its products in tiles of so many rows."""
    graph = model.graph
    nodes = [node for node in graph if node.domain == DOMAIN]
    count = sum(len(node.attributes["weights"].value) // WEIGHT_INTS for node in nodes)
    known: dict[Product, Constants] = {}
    with tqdm(total=count, desc="pack", unit="product", delay=2, disable=not progress, leave=False) as bar:
        for node in nodes:
            weights, inputs = list(node.attributes["weights"].value), list(node.inputs)
            if len(weights) % WEIGHT_INTS:
                raise damaged(f"the node {node.name!r} has a product with a part of its numbers")
            taken: dict[int, ir.Value] = {}  # what stands in the places of inputs now
            for start in range(0, len(weights), WEIGHT_INTS):
                product = (
                    *_held(node, weights[start : start + 3]),
                    *weights[start + 4 : start + WEIGHT_INTS],
                )
                if product not in known:
                    known[product] = _packed(graph, product, tile, len(known))
                for offset, value in enumerate(known[product]):
                    if value is None:
                        continue
                    place = weights[start + offset]
                    if taken.get(place, value) is not value:  # another product packs that constant otherwise
                        place = weights[start + offset] = len(inputs)
                        inputs.append(value)
                    inputs[place] = taken[place] = value
                bar.update()
            node.resize_inputs(len(inputs))
            for place, value in enumerate(inputs):
                node.replace_input_with(place, value)
            node.attributes["weights"] = ir.AttrInt64s("weights", weights)
            node.attributes["tile"] = ir.AttrInt64s("tile", [tile])
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    return model


def _held(node: ir.Node, places: Sequence[int]) -> list[ir.Value | None]:
    """The constants in these places of the node's inputs; BundleError where there are none, or no codes and
    scales."""
    if max(places) >= len(node.inputs):
        raise damaged(f"the node {node.name!r} names an input that it has not")
    held = [None if place < 0 else node.inputs[place] for place in places]
    if None in held[:2] or any(value is not None and value.const_value is None for value in held):
        raise damaged(f"the node {node.name!r} has weights that are no constants")
    return held


def _packed(graph: ir.Graph, product: Product, tile: int, number: int) -> Constants:
    codes, scales, zeros, *sizes = product
    stored = _array(codes), _array(scales), None if zeros is None else _array(zeros)
    k, n, bits, block = sizes
    parts: list[np.ndarray[Any, Any]] = [*kernels.pack((k, n, bits, block), tile, *stored)]
    parts[1] = parts[1].view(stored[1].dtype)
    values: list[ir.Value | None] = []
    for part, name in zip(parts, ("codes", "scales", "zeros"), strict=True):
        value = None
        if part.size:
            value = ir.Value(name=f"packed.{number}.{name}", const_value=ir.tensor(part))
            graph.register_initializer(value)
        values.append(value)
    return values


def _array(value: ir.Value) -> np.ndarray[Any, Any]:
    assert value.const_value is not None
    array = value.const_value.numpy()
    return array.view(np.uint8) if array.dtype.itemsize == 1 else array  # codes, whatever they are called
