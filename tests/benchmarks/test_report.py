import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from gemini.benchmarks.latency import Ceiling, Run, summarize, summarize_batches
from gemini.benchmarks.metrics import format_value, loss_percent
from gemini.benchmarks.plots import DARK, draw_plots
from gemini.benchmarks.report import render_html, to_plain, write_report

EVIL = "<script>alert('x')</script>\"&"


def sample_report(name="tiny"):
    rng = np.random.default_rng(0)
    runs = [Run(0.08, tuple(4e-3 + rng.gamma(2, 2e-4, 60))) for _ in range(3)]
    return {
        "schema_version": 1,
        "name": name,
        "task": "text-generation",
        "recipe": {"name": "int4"},
        "table": [
            {"name": "fp32", "size_mb": 538.0, "perplexity": 15.0, "kl": 0.0, "top1_agreement": 1.0},
            {
                "name": "round-to-nearest",
                "size_mb": 92.0,
                "perplexity": 21.0,
                "kl": 0.3,
                "top1_agreement": 0.7,
            },
            {"name": "bundle", "size_mb": 100.0, "perplexity": 16.5, "kl": 0.1, "top1_agreement": 0.8},
        ],
        "metric": "perplexity",
        "drop_percent": 10.0,
        "max_drop": 18.0,
        "gate": "passed",
        "passes": [
            {
                "type": "QuantizeInt4",
                "options": {"symmetric": False, "granularity": {"type": "per block", "size": 32}, "skip": []},
                "layers": [{"name": "layers.0.q_proj", "bits": 4, "relative_error": 0.07}],
                "skipped": [{"name": "conv_stem", "reason": f"convolutions stay fp32 {EVIL}"}],
                "bits_per_weight": 4.6,
                "seconds": 6.0,
            }
        ],
        "verification": {
            "logits": [{"batch": 1, "past": 0, "new": 7, "max_difference": 3e-4}],
            "checker": True,
        },
        "latency": summarize(runs, 128, 1, Ceiling(90_000_000, 35.0)).to_dict(),
        "bytes": {"attention": 18_000_000, "feed_forward": 45_000_000},
        "data": {
            "evaluation": {"name": "pydoc_data.topics", "sha256": "ab" * 32, "tokens": 8176},
            "calibration": {"name": "own.txt", "sha256": "cd" * 32, "sentences": 300},
        },
        "host": {"cpu": "Xeon", "packages": {"numpy": "2.0"}},
        "seconds": {"load": 2.3, "compress": 9.1},
        "peak_rss_mb": 2900.0,
        "provenance": {"source": {"kind": "gguf", "licence": "Apache-2.0"}},
    }


class Page(html.parser.HTMLParser):
    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data + " "


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return folder, write_report(sample_report(EVIL), folder)


def test_all_files_are_written(written):
    folder, paths = written
    names = {"report.json", "report.html", "size_accuracy.png", "latency.png", "bytes.png"}
    assert {path.name for path in paths} == names == {path.name for path in folder.iterdir()}


def test_plots_are_real_pictures(written):
    folder, _ = written
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert image.width >= 1000 and image.height >= 200
            assert len(image.convert("RGB").getcolors(1 << 24)) > 3


def test_json_holds_the_report(written):
    folder, _ = written
    data = json.loads((folder / "report.json").read_text())
    assert data["schema_version"] == 1
    assert data["table"] == sample_report()["table"]
    assert len(data["latency"]["samples_ms"]) == 180


def test_page_shows_every_section(written):
    page = Page((written[0] / "report.html").read_text())
    text = " ".join(page.text.split())
    for part in (
        "round-to-nearest", "this bundle", "16.50", "+10.0 %", "−81.4 %", "80.0 %", "accuracy gate passed",
        "conv_stem", "convolutions stay fp32", "layers.0.q_proj", "Verification", "0.0003", "Provenance",
        "Apache-2.0", "Xeon", "2,900 MB", "9.1 s", "8,176 tokens", "300 sentences", "per block 32",
        "ab" * 32, "each token after it", "GiB/s",
    ):  # fmt: skip
        assert part in text, part


def test_page_escapes_every_value(written):
    source = (written[0] / "report.html").read_text()
    page = Page(source)
    assert "script" not in page.tags
    assert source.count("&lt;script&gt;") >= 3  # title, heading, reason
    assert EVIL in page.text


def test_page_is_self_contained(written):
    page = Page((written[0] / "report.html").read_text())
    links = [value for name, value in page.attributes if name in ("src", "srcset", "href")]
    assert len(links) == 6 and all(link.startswith("data:image/png;base64,") for link in links)
    assert not re.search(r"https?://|@import|url\(", (written[0] / "report.html").read_text())


def test_page_has_a_dark_scheme_with_its_own_plots(written):
    source = (written[0] / "report.html").read_text()
    assert source.count("prefers-color-scheme: dark") >= 4  # the styles and three pictures
    report = {"bytes": sample_report()["bytes"]}
    dark = draw_plots(report, DARK)
    assert dark == draw_plots(report, DARK)  # drawing is repeatable
    corner = Image.open(io.BytesIO(dark["bytes.png"])).convert("RGB").getpixel((1, 1))
    assert max(corner) < 60


def test_row_without_a_size_keeps_its_place_in_the_accuracy_plot():
    report = {key: sample_report()[key] for key in ("table", "metric")}
    whole = draw_plots(report)["size_accuracy.png"]
    report["table"][1]["size_mb"] = None
    unsized = draw_plots(report)["size_accuracy.png"]
    report["table"][1]["perplexity"] = None
    assert len({whole, unsized, draw_plots(report)["size_accuracy.png"]}) == 3


def test_serving_memory_is_shown_only_when_measured_apart():
    report = sample_report()
    assert "while serving" not in render_html(report)
    report["latency"]["apart"] = True
    assert "while serving" in render_html(report)


def test_failed_gate_is_marked():
    page = render_html(sample_report() | {"gate": "failed"})
    assert 'class="badge failed"' in page and "accuracy gate failed" in page


def test_empty_report_still_renders(tmp_path):
    paths = write_report({"name": "x", "table": [], "latency": None, "passes": [], "bytes": {}}, tmp_path)
    assert [path.name for path in paths] == ["report.json", "report.html"]


def test_embedder_report_shows_shapes():
    report = {
        "name": "embedder",
        "table": [
            {"name": "fp32", "size_mb": 90.0, "cosine_mean": 1.0},
            {"name": "bundle", "size_mb": 23.0, "cosine_mean": 0.99, "neighbour_agreement": None},
        ],
        "metric": "cosine_mean",
        "latency": summarize_batches({(1, 16): [0.001] * 5, (8, 128): [0.01, 0.02, 0.03]}, 3).to_dict(),
    }
    text = " ".join(Page(render_html(report)).text.split())
    assert "8 128 20.00" in text and "0.9900" in text and "–" in text


def test_everything_measured_becomes_plain_json():
    value = {
        "a": np.float32(1.5),
        "b": float("inf"),
        "c": (np.int64(3),),
        "d": np.array([1.0, np.nan]),
        5: True,
    }
    assert to_plain(value) == {"a": 1.5, "b": None, "c": [3], "d": [1.0, None], "5": True}


def test_infinite_perplexity_is_shown_as_missing():
    report = sample_report()
    report["table"][2]["perplexity"] = float("inf")
    plain = to_plain(report)
    assert plain["table"][2]["perplexity"] is None
    assert "–" in Page(render_html(plain)).text
    assert len(draw_plots({key: plain[key] for key in ("table", "metric")})) == 1


@pytest.mark.parametrize(
    ("key", "value", "reference", "loss"),
    [
        ("perplexity", 12.0, 10.0, 20.0),
        ("accuracy", 0.9, 1.0, 10.0),
        ("accuracy", 1.0, 0.8, -25.0),
        ("kl", 0.1, 0.0, None),
        ("perplexity", None, 10.0, None),
    ],
)
def test_loss_is_positive_when_worse(key, value, reference, loss):
    assert loss_percent(key, value, reference) == (None if loss is None else pytest.approx(loss))


def test_cells_are_formatted_by_metric():
    assert format_value("perplexity", 17.123) == "17.12"
    assert format_value("top1_agreement", 0.8249) == "82.5 %"
    assert format_value("kl", None) == "–"
    assert format_value("unknown", 12345.678) == "12,345.7"
