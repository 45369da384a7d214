"""One test for each way in which a bundle can lie, with the literal malformation."""

import hashlib
import json
import os
import shutil

import numpy as np
import onnx
import pytest

from gemini.errors import BundleError, GeminiEdgeError
from gemini.runtime import load, read_bundle, safe_member, seal
from gemini.runtime.bundle import hashed_meanwhile
from gemini.runtime.manifest import parse_manifest


def reseal(path, change):
    """Edit the manifest as an attacker would: with a digest that fits again."""
    document = json.loads((path / "manifest.json").read_text())
    change(document)
    (path / "manifest.json").write_bytes(seal(document))


def refused(path, match):
    with pytest.raises(BundleError, match=match) as caught:
        read_bundle(path)
    assert caught.value.cause and caught.value.remedy


def test_an_intact_bundle_is_read(shared_toy):
    bundle = read_bundle(shared_toy.path)
    assert bundle.manifest.task == "text-generation" and bundle.manifest.model.vocab_size == 300
    assert bundle.graph(bundle.manifest.graphs["decoder"]) == shared_toy.path / "decoder.onnx"
    assert bundle.json("report.json") == {}


def test_seal_is_the_documented_digest():
    data = seal({"b": [1, "é"], "a": None})
    digest = json.loads(data)["digest"].removeprefix("sha256:")
    assert data.startswith(b'{\n  "a": null,\n  "b": [\n    1,\n    "\\u00e9"\n  ],\n  "digest": "sha256:')
    assert hashlib.sha256(data.replace(digest.encode(), b"0" * 64)).hexdigest() == digest
    assert seal(json.loads(data)) == data  # sealing again changes nothing


@pytest.mark.parametrize(
    "manifest", [{"x": float("nan")}, {"x": {1, 2}}, {"x": {"digest": "sha256:" + "0" * 64}}]
)
def test_seal_refuses_what_it_could_not_read_back(manifest):
    with pytest.raises(BundleError):
        seal(manifest)


def test_200_single_byte_corruptions_are_all_refused(new_decoder):
    path = new_decoder().path
    rng = np.random.default_rng(11)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    # Files in turn, so that the small manifest is hit as often as the large graph.
    for trial in range(200):
        file = files[trial % len(files)]
        original = file.read_bytes()
        damaged = bytearray(original)
        damaged[rng.integers(len(damaged))] ^= int(rng.integers(1, 256))
        file.write_bytes(damaged)
        with pytest.raises(BundleError):
            read_bundle(path)
        file.write_bytes(original)
    read_bundle(path)


def test_weights_that_change_are_noticed_though_they_are_loaded_meanwhile(new_decoder):
    path = new_decoder().path
    graph, weights = path / "decoder.onnx", path / "decoder.onnx.data"
    onnx.save(onnx.load(graph), graph, save_as_external_data=True, location=weights.name, size_threshold=256)
    entries = {
        file.name: {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "size": file.stat().st_size}
        for file in (graph, weights)
    }
    reseal(path, lambda document: document["files"].update(entries))
    original, rng = weights.read_bytes(), np.random.default_rng(1)
    for _ in range(20):
        changed = bytearray(original)
        changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
        weights.write_bytes(changed)
        with pytest.raises(BundleError, match=f"{weights.name} does not match"):
            load(path, threads=1)
        with pytest.raises(BundleError, match="does not match"), hashed_meanwhile(path):
            raise ValueError("what goes wrong with such weights")
        load(path, threads=1, verify=False)
    weights.write_bytes(original)
    assert load(path, threads=1).generate_ids([[5, 6]])


def test_random_manifests_never_escape_as_another_error(new_decoder):
    """Resealed, so that the parser behind the digest is what is tested: every value replaced by odd ones."""
    path = new_decoder().path
    original = (path / "manifest.json").read_bytes()
    odd = [None, True, -1, 1 << 80, 1.5, "", "x", "../x", "\ud800", [], [[]], {}, {"": {}}]

    def places(node, trail=()):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            yield (*trail, key)
            if isinstance(node[key], (dict, list)):
                yield from places(node[key], (*trail, key))

    for place in places(json.loads(original)):
        for value in odd:
            document = json.loads(original)
            node = document
            for key in place[:-1]:
                node = node[key]
            node[place[-1]] = value
            try:
                (path / "manifest.json").write_bytes(seal(document))
                read_bundle(path, verify=False)
            except GeminiEdgeError as error:
                assert isinstance(error, BundleError)


@pytest.mark.parametrize("path", ["missing", "a\0b", "x" * 5000])
def test_a_missing_folder(tmp_path, path):
    refused(tmp_path / path, "no bundle folder")


def test_a_file_instead_of_a_folder(shared_toy):
    refused(shared_toy.path / "manifest.json", "no bundle folder")


def test_a_folder_without_manifest(tmp_path):
    refused(tmp_path, "manifest.json is missing")


@pytest.mark.parametrize("name", ["decoder.onnx", "tokenizer.json", "report.json"])
def test_a_missing_file(new_decoder, name):
    path = new_decoder().path
    (path / name).unlink()
    refused(path, f"{name} is missing")


def test_a_truncated_and_a_longer_file(new_decoder):
    path = new_decoder().path
    data = (path / "decoder.onnx").read_bytes()
    for changed in (data[:-1], data + b"\0"):
        (path / "decoder.onnx").write_bytes(changed)
        with pytest.raises(BundleError, match="bytes instead of"):
            read_bundle(path, verify=False)


@pytest.mark.parametrize(
    "name",
    [
        "../tokenizer.json",
        "/etc/hostname",
        "a/../../x",
        "./x",
        "a//b",
        "C:\\x",
        "C:x",
        "\\\\host\\x",
        "a\\b",
        "",
        "x\0y",
    ],
)
def test_a_path_that_is_not_plain_and_inside(new_decoder, name):
    path = new_decoder().path
    entry = {"sha256": "0" * 64, "size": 1}
    reseal(path, lambda manifest: manifest["files"].update({name: entry}))
    refused(path, "not a plain path")


def test_a_link_out_of_the_folder(new_decoder, tmp_path):
    path = new_decoder().path
    shutil.move(path / "tokenizer.json", tmp_path / "outside.json")
    (path / "tokenizer.json").symlink_to(tmp_path / "outside.json")
    refused(path, "leaves the bundle")


def test_a_linked_folder_out_of_the_bundle(new_decoder, tmp_path):
    path = new_decoder().path
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_bytes(b"1")
    (path / "sub").symlink_to(tmp_path / "out")
    with pytest.raises(BundleError, match="leaves the bundle"):
        safe_member(path, "sub/x")


def test_a_linked_manifest_out_of_the_folder(new_decoder, tmp_path):
    path = new_decoder().path
    shutil.move(path / "manifest.json", tmp_path / "outside.json")
    (path / "manifest.json").symlink_to(tmp_path / "outside.json")
    refused(path, "leaves the bundle")


def test_a_link_that_points_to_itself(new_decoder):
    path = new_decoder().path
    (path / "report.json").unlink()
    (path / "report.json").symlink_to("report.json")
    refused(path, "cannot be followed|missing or unreadable")


@pytest.mark.parametrize("name", ["manifest.json", "report.json"])
def test_a_pipe_is_refused_without_waiting_for_a_writer(new_decoder, name):
    path = new_decoder().path
    (path / name).unlink()
    os.mkfifo(path / name)
    refused(path, "not a regular file")


def test_a_folder_in_place_of_a_file(new_decoder):
    path = new_decoder().path
    (path / "report.json").unlink()
    (path / "report.json").mkdir()
    refused(path, "not a regular file")


@pytest.mark.parametrize("version", [2, 99, 0])
def test_an_unknown_schema_version(new_decoder, version):
    path = new_decoder().path
    reseal(path, lambda manifest: manifest.update(schema_version=version))
    refused(path, f"schema version {version}")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"7",
        b'{"schema_version": 1, "schema_version": 1}',
        b'{"schema_version": NaN}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"schema_version": ' + b"9" * 5000 + b"}",
        b'{"schema_version": 1, "digest": 5}',
        b'{"schema_version": 1, "digest": "sha256:\xc3\xa9"}',
        b'{"schema_version": 1, "digest": "sha256:\\ud800"}',
    ],
)
def test_a_malformed_manifest(data):
    with pytest.raises(BundleError):
        parse_manifest(data)


def test_a_huge_manifest_is_not_read_whole(new_decoder):
    path = new_decoder().path
    with open(path / "manifest.json", "wb") as file:
        file.truncate(1 << 40)  # sparse: a terabyte of zeros that occupies nothing
    refused(path, "larger than")


def test_a_digest_that_appears_twice(new_decoder):
    path = new_decoder().path
    document = json.loads((path / "manifest.json").read_text())
    slot = f'"digest": "{document["digest"]}"'
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"name": "toy"', f'"name": "toy", "x": {{{slot}}}'))
    refused(path, "no usable digest")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m["files"].pop("decoder.onnx"), "not listed in 'files'"),
        (lambda m: m["graphs"].clear(), "names no graph 'decoder'"),
        (lambda m: m["files"].pop("tokenizer.json"), "tokenizer.json is not listed"),
        (lambda m: m["files"].update({"manifest.json": m["files"]["report.json"]}), "lists itself"),
        (lambda m: m["files"]["report.json"].update(sha256="0" * 63), "64 hexadecimal"),
        (lambda m: m["files"]["report.json"].update(size=True), "not an integer"),
        (lambda m: m["files"]["report.json"].update(sha256="0" * 64), "does not match its sha256"),
        (lambda m: m.update(task="poetry"), "expected text-generation or"),
        (lambda m: m.update(family="vision"), "expected decoder"),
        (lambda m: m["model"].update(cache="paged"), "expected shared or concat"),
        (lambda m: m["model"].update(layers=[]), "'layers' is empty"),
        (lambda m: m["model"].update(vocab_size=0), "not an integer from 1"),
        (lambda m: m["generation"].update(eos_token_ids=5), "not a list"),
        (lambda m: m["requirements"].update(onnxruntime="new"), "not a version"),
        (lambda m: m["requirements"].update(onnxruntime="99.0"), "needs onnxruntime 99.0"),
        (lambda m: m.pop("requirements"), "not an object"),
    ],
)
def test_a_manifest_that_does_not_fit(new_decoder, change, match):
    path = new_decoder().path
    reseal(path, change)
    refused(path, match)


@pytest.mark.parametrize(
    ("graphs", "match"),
    [
        ({"decoder": "other.onnx"}, "not listed in 'files'"),
        ({"encoder": "decoder.half.onnx"}, "other graphs in half precision"),
        ({"decoder": "decoder.half.onnx", "vision": "decoder.onnx"}, "other graphs in half precision"),
        ({"decoder": 5}, "'decoder'"),
        (["decoder.half.onnx"], "not an object"),
    ],
)
def test_graphs_for_a_gpu_that_do_not_fit(new_decoder, graphs, match):
    path = new_decoder(half=True).path
    reseal(path, lambda manifest: manifest.update(half_graphs=graphs))
    refused(path, match)


def test_a_graph_for_a_gpu_may_not_read_files_beside_the_list(new_decoder):
    path = new_decoder(half=True).path
    graph = path / "decoder.half.onnx"
    onnx.save(onnx.load(graph), graph, save_as_external_data=True, location="secret", size_threshold=64)
    data = graph.read_bytes()
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    reseal(path, lambda manifest: manifest["files"].update({graph.name: entry}))
    refused(path, "'secret', which the manifest does not list")


def test_impossible_generation_defaults_are_refused_when_loading(new_decoder):
    path = new_decoder().path
    reseal(path, lambda manifest: manifest["generation"].update(defaults={"top_p": 7}))
    with pytest.raises(BundleError, match="generation default"):
        load(path)


def test_a_graph_that_is_no_model_is_refused(new_decoder):
    path = new_decoder().path
    for data in (b"", b"\xff" * 40, b"hello"):
        (path / "decoder.onnx").write_bytes(data)
        entry = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        reseal(path, lambda manifest, entry=entry: manifest["files"].update({"decoder.onnx": entry}))
        with pytest.raises(BundleError):
            load(path)


def test_a_tokenizer_that_is_none_is_refused(new_decoder):
    path = new_decoder().path
    for data in (b"{}", b"\xff\xff", b""):
        (path / "tokenizer.json").write_bytes(data)
        entry = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        reseal(path, lambda manifest, entry=entry: manifest["files"].update({"tokenizer.json": entry}))
        with pytest.raises(BundleError, match=r"tokenizer\.json"):
            load(path)


def test_an_unlisted_file_does_not_exist_for_the_runtime(new_decoder):
    path = new_decoder().path
    (path / "extra.json").write_text("{}")
    bundle = read_bundle(path)
    assert not bundle.has("extra.json")
    with pytest.raises(BundleError, match="not listed"):
        bundle.file("extra.json")
