"""Weights packed beforehand: the order that the kernels document, the same numbers, and what is refused."""

import shutil
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import test_channels
from fused_nodes import change_attribute, fused, model_of, session
from onnx import numpy_helper
from test_stages import product, weights

from gemini.compress.apply import run_recipe
from gemini.compress.recipe import load_recipe
from gemini.errors import BundleError, UsageError
from gemini.export.bundle import describe, write_companions, write_manifest
from gemini.export.exporter import export_checkpoint
from gemini.export.prepack import packed_model, prepack
from gemini.runtime import kernels, load, read_bundle
from gemini.runtime.encoder import TextClassifier

pytestmark = pytest.mark.skipif(
    not kernels.available(), reason="the kernels are not built or do not fit here"
)


def tiled(codes, scales, zeros, k, bits, block, tile):
    """What `kernels.h` says of packed weights, number by number."""
    n, blocks = scales.shape
    groups, tiles = -(-k // 32), -(-n // tile)
    whole = codes if bits == 8 else np.stack([codes & 15, codes >> 4], -1)
    whole = whole.reshape(n, -1)
    packed = np.zeros((tiles, groups, bits, tile, 4), np.uint8)
    own_scales = np.zeros((tiles, blocks, tile), scales.dtype)
    own_zeros = np.zeros((tiles, blocks, tile), np.uint8)
    for row in range(n):
        for group in range(groups):
            for place in range(32):
                code = int(whole[row, group * 32 + place])
                word = (place if bits == 8 else place % 16) // 4
                high = bits == 4 and place >= 16
                packed[row // tile, group, word, row % tile, place % 4] |= code << 4 if high else code
        for b in range(blocks):
            own_scales[row // tile, b, row % tile] = scales[row, b]
            if zeros is not None:
                stored = zeros[row, b] if bits == 8 else zeros[row, b // 2] >> 4 * (b % 2) & 15
                own_zeros[row // tile, b, row % tile] = stored
    return packed, own_scales, own_zeros


@pytest.mark.parametrize("layout", list(kernels.LAYOUTS))
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_have_the_documented_order(bits, half, zeros, layout):
    rng = np.random.default_rng(bits)
    tile = kernels.LAYOUTS[layout]
    for k, n, block in ((96, 21, 32), (200, 40, 64), (33, 3, 128)):
        constants, _ = weights(rng, k, n, bits, block, zeros, half, bias=False)
        stored = (constants["codes"], constants["scales"], constants.get("zeros"))
        found = kernels.pack((k, n, bits, block), tile, *stored)
        wanted = tiled(*stored, k, bits, block, tile)
        for own, other in zip(found, wanted if zeros else wanted[:2], strict=False):
            np.testing.assert_array_equal(own.view(other.dtype), other.ravel())
        assert zeros or not found[2].size


def packed(proto, layout=None):
    """A fused graph with its weights packed for this process, or for another layout."""
    return ir.to_proto(packed_model(ir.from_proto(proto), kernels.LAYOUTS[layout or kernels.layout()]))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_products_in_blocks_are_the_same(bits, zeros, instructions):
    rng = np.random.default_rng(bits)
    stored, nodes = {}, []
    # Of 3 and of 4 blocks a row: in pairs, zero points of 4 bits have the same size.
    for name, k, x in (("a", 96, "x"), ("b", 128, "a")):
        constants, _ = weights(rng, k, 128, bits, 32, zeros, name == "a", bias=name == "a")
        own = {f"{name}.{part}": array for part, array in constants.items()}
        nodes += product(k, 128, bits, 32, own, x=x, y=name, prefix=f"{name}.")
        stored |= own
    if zeros and bits == 4:  # one constant, which the two products pack otherwise
        nodes[-1].input[3] = "a.zeros"
        del stored["b.zeros"]
    shapes = ({name: ["b", "s", width]} for name, width in (("x", 96), ("b", 128)))
    model = fused(model_of(nodes, *shapes, stored), {"a": 128})
    assert [node.op_type for node in model.graph.node] == ["Fused"]
    feeds = {"x": rng.standard_normal((2, 9, 96)).astype(np.float32)}
    for one, other in zip(*(session(m).run(None, feeds) for m in (model, packed(model))), strict=True):
        np.testing.assert_array_equal(one, other)


def columns():
    """A fused graph of a product with a scale a column, and what it is fed."""
    rng = np.random.default_rng(3)
    constants, _ = test_channels.weights(rng, 70, 50)
    return fused(test_channels.one_product(constants, 70, 50)), {
        "x": rng.standard_normal((2, 5, 70)).astype(np.float32)
    }


def test_products_with_a_scale_a_column_are_the_same(instructions):
    own, feeds = columns()
    for one, other in zip(*(session(m).run(None, feeds) for m in (own, packed(own))), strict=True):
        np.testing.assert_array_equal(one, other)


def test_weights_for_other_instructions_are_refused(instructions):
    own, _ = columns()
    (other,) = set(kernels.LAYOUTS) - {kernels.layout()}
    tiles = packed(own)
    change_attribute(tiles, "tile", lambda values: [24])
    for proto in (packed(own, other), tiles):
        with pytest.raises(Exception, match="other instructions"):
            session(proto)


@pytest.mark.parametrize("place", ["order", "groups"])
def test_an_order_that_leads_out_of_a_row_is_refused(place, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "avx2")
    proto = packed(columns()[0])
    (codes,) = [one for one in proto.graph.initializer if one.name.endswith(".codes")]
    array = numpy_helper.to_array(codes).copy()
    # Behind codes (3 panels of 24 columns, 18 words), scales and sums: 4 counts a panel, then 18 places.
    counts = 3 * 24 * (18 * 4 + 4 + 4)
    array[counts + (0 if place == "groups" else 3 * 4 * 4) :].view(np.uint32)[0] = 1000
    codes.CopyFrom(numpy_helper.from_array(array, codes.name))
    with pytest.raises(Exception, match="not as the kernels pack them"):
        session(proto)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: [*v[:5], v[5] + 8, *v[6:]], "other sizes"),
        (lambda v: [*v[:4], 1 << 30, *v[5:]], "no weights of the sizes"),
        (lambda v: [99, *v[1:]], "has not"),
        (lambda v: [-1, *v[1:]], "no constants"),
        (lambda v: [0, *v[1:]], "no constants"),
        (lambda v: v[:6], "a part of its numbers"),
    ],
)
def test_a_node_that_lies_about_its_weights_is_refused(change, message):
    proto, _ = columns()
    change_attribute(proto, "weights", change)
    with pytest.raises(BundleError, match=message):
        packed(proto)


# ---- bundles ----


@pytest.fixture
def bundle(make_checkpoint, words, tmp_path):
    """(name of a tiny model, recipe) -> the folder of its bundle."""

    def write(name, recipe):
        checkpoint = replace(make_checkpoint(name), tokenizer=words)
        run_recipe(checkpoint, load_recipe(recipe), None, progress=False)
        folder = tmp_path / name
        folder.mkdir()
        exported = export_checkpoint(checkpoint, folder, progress=False)
        assert exported.fused_graphs
        write_companions(checkpoint, folder)
        write_manifest(folder, describe(checkpoint, exported))
        return folder

    return write


def answers(folder):
    """What a bundle makes of some texts, to the last bit."""
    session = load(folder, threads=1)
    texts = ["w9 w33 w71 w8 w40 w99 w12", "w60 w61", "w5"]
    if isinstance(session, TextClassifier):
        return [session.logits(texts)]
    return [np.array(found.tokens) for found in session.generate(texts, max_new_tokens=8)]


@pytest.mark.parametrize(("name", "recipe"), [("llama", "int4"), ("bert", "int8"), ("bart", "int8")])
def test_a_bundle_says_the_same_and_opens_what_is_packed(name, recipe, bundle, instructions):
    folder = bundle(name, recipe)
    before = answers(folder)
    plain = read_bundle(folder)
    found = prepack(folder, kernels.layout())
    assert set(found.manifest.packed_graphs[kernels.layout()]) == set(plain.manifest.fused_graphs)
    for one, other in zip(before, answers(folder), strict=True):
        np.testing.assert_array_equal(one, other)
    # The weights as they were are read by other processors alone: here they may even be damaged.
    (data,) = plain.opened_by(plain.manifest.graphs[next(iter(plain.manifest.graphs))])
    (folder / data).write_bytes(bytes((folder / data).stat().st_size))
    for one, other in zip(before, answers(folder), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(BundleError, match="does not match"):
        read_bundle(folder)


def test_packed_weights_are_hashed(bundle):
    folder = bundle("llama", "int4")
    found = prepack(folder, kernels.layout())
    (data,) = found.opened_by(found.manifest.packed_graphs[kernels.layout()]["decoder"])
    stored = bytearray((folder / data).read_bytes())
    stored[len(stored) // 2] ^= 1
    (folder / data).write_bytes(stored)
    with pytest.raises(BundleError, match="does not match"):
        load(folder)


def test_layouts_stand_side_by_side_and_are_packed_again(bundle):
    folder = bundle("llama", "int4")
    for layout in (*kernels.LAYOUTS, *kernels.LAYOUTS):
        packed_bundle = prepack(folder, layout)
    assert set(packed_bundle.manifest.packed_graphs) == set(kernels.LAYOUTS)
    assert set(packed_bundle.manifest.files) == {file.name for file in folder.iterdir()} - {"manifest.json"}
    assert [one.name for one in folder.parent.iterdir()] == [folder.name]  # no part of it is left beside


def test_a_failure_leaves_the_bundle_as_it_was(bundle, monkeypatch):
    folder = bundle("llama", "int4")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(BundleError, match="full"):
        prepack(folder, kernels.layout())
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [one.name for one in folder.parent.iterdir()] == [folder.name]


def test_what_cannot_be_packed_is_said(bundle, shared_fp32, monkeypatch):
    with pytest.raises(UsageError, match="layout"):
        prepack(shared_fp32, "neon")
    with pytest.raises(BundleError, match="nothing to pack"):
        prepack(shared_fp32, "avx2")
    monkeypatch.setattr(kernels, "available", lambda: False)
    with pytest.raises(UsageError, match="C compiler"):
        prepack(shared_fp32, "avx2")


@pytest.fixture
def shared_fp32(make_checkpoint, words, tmp_path):
    """A bundle without a graph for the own kernels."""
    checkpoint = replace(make_checkpoint("llama"), tokenizer=words)
    exported = export_checkpoint(checkpoint, tmp_path, progress=False)
    write_companions(checkpoint, tmp_path)
    write_manifest(tmp_path, describe(checkpoint, exported))
    return tmp_path
