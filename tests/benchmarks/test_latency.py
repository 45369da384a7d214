import json
import time

import numpy as np
import pytest

from gemini.benchmarks.host import host_facts, read_cpuinfo, source_commit
from gemini.benchmarks.latency import (
    Ceiling,
    Run,
    distribution,
    measure_encoder,
    measure_generator,
    measure_image,
    random_prompt,
    summarize,
    summarize_batches,
    time_calls,
)
from gemini.benchmarks.resources import folder_bytes, peak_rss_mb, read_bandwidth


class CountingSession:
    """A decoder of known speed that records what it is asked."""

    def __init__(self, prefill_seconds=0.0, step_seconds=0.0):
        self.calls, self.wait = [], (prefill_seconds, step_seconds)

    def prefill(self, ids):
        self.calls.append(("prefill", len(ids), len(ids[0])))
        time.sleep(self.wait[0])
        return np.eye(1, 50, 7, dtype=np.float32)

    def step(self, tokens):
        self.calls.append(("step", *tokens.tolist()))
        time.sleep(self.wait[1])
        return np.eye(1, 50, int(tokens[0]) + 1, dtype=np.float32)


def test_generator_is_warmed_up_and_fed_its_own_greedy_tokens():
    session = CountingSession()
    report = measure_generator(session, 5, 3, repeat=2, warmup=1, vocab_size=50)
    assert session.calls == [("prefill", 1, 5), ("step", 7), ("step", 8), ("step", 9)] * 3
    assert (report.first_token_ms.n, report.token_ms.n, len(report.samples_ms)) == (2, 6, 6)
    assert (report.prompt_tokens, report.new_tokens, report.repeat, report.warmup) == (5, 3, 2, 1)
    assert report.bandwidth_percent is None


def test_first_token_is_apart_from_the_others():
    report = measure_generator(CountingSession(0.03, 0.002), 16, 4, repeat=1, warmup=0, vocab_size=50)
    assert report.first_token_ms.p50 >= 30  # sleep never returns early
    assert report.token_ms.low >= 2
    assert report.prefill_tokens_per_second <= 16 / 0.03
    assert report.decode_tokens_per_second <= 1 / 0.002


def test_rates_are_medians_over_runs_and_bandwidth_is_their_product():
    runs = [Run(0.1, (0.01, 0.01)), Run(0.2, (0.02, 0.02)), Run(9.0, (1.0, 1.0))]
    report = summarize(runs, 100, 1, Ceiling(2**30, 200.0))
    assert report.prefill_tokens_per_second == pytest.approx(500)
    assert report.decode_tokens_per_second == pytest.approx(50)
    assert report.bandwidth_percent == pytest.approx(25)  # 50 tokens/s x 1 GiB against 200 GiB/s


def test_distribution_equals_numpy_percentiles():
    seconds = np.random.default_rng(0).gamma(2.0, 1e-3, 257)
    spread = distribution(list(seconds))
    assert (spread.p50, spread.p90, spread.p99) == pytest.approx(
        tuple(np.percentile(seconds * 1e3, (50, 90, 99)))
    )
    assert (spread.n, spread.low, spread.high) == (257, seconds.min() * 1e3, seconds.max() * 1e3)


def test_random_prompt_is_repeatable_and_in_range():
    prompt = random_prompt(64, 300)
    assert prompt.shape == (1, 64) and prompt.min() >= 0 and prompt.max() < 300
    np.testing.assert_array_equal(prompt, random_prompt(64, 300))
    assert random_prompt(4, 2).max() < 2


def test_warm_up_calls_are_not_measured():
    calls = []
    assert len(time_calls(lambda: calls.append(1), repeat=4, warmup=3)) == 4
    assert len(calls) == 7


def test_encoder_and_image_points_have_the_shapes_asked_for():
    shapes = []
    report = measure_encoder(lambda ids: shapes.append(ids.shape), [(1, 8), (3, 4)], 2, 1, vocab_size=99)
    assert set(shapes) == {(1, 8), (3, 4)} and len(shapes) == 6
    assert [(point.batch, point.tokens, point.ms.n) for point in report.points] == [(1, 8, 2), (3, 4, 2)]
    shapes.clear()
    report = measure_image(lambda pixels: shapes.append((pixels.shape, pixels.dtype)), (3, 6, 6), (2,), 1, 0)
    assert shapes == [((2, 3, 6, 6), np.float32)]
    assert report.points[0].tokens is None


def test_batch_rate_counts_items():
    report = summarize_batches({(4, 16): [0.02, 0.02]}, 0)
    assert report.points[0].items_per_second == pytest.approx(200)


def test_reports_are_plain_json():
    generator = summarize([Run(0.1, (0.01,))], 8, 0)
    batch = summarize_batches({(1, None): [0.01]}, 0)
    for report in (generator, batch):
        data = json.loads(json.dumps(report.to_dict()))
        assert data["peak_rss_mb"] > 10 and data["samples_ms"] == [10.0]


def test_read_bandwidth_is_plausible():
    assert 0.1 < read_bandwidth(8_000_000, threads=2, rounds=3) < 5000  # GiB/s, any machine of today


def test_peak_memory_grows_with_what_is_touched():
    before = peak_rss_mb()
    block = np.ones(30_000_000 + int(before * 1e6) // 8)
    assert peak_rss_mb() >= block.nbytes / 1e6
    assert peak_rss_mb() > before


def test_folder_bytes_counts_every_file(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 10)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_bytes(b"x" * 5)
    assert folder_bytes(tmp_path) == 15
    assert folder_bytes(tmp_path / "a") == 10


def test_host_facts_are_plain_json_with_versions():
    facts = json.loads(json.dumps(host_facts(2, "CPUExecutionProvider")))
    assert facts["packages"]["numpy"] == np.__version__
    assert facts["threads"] == 2 and facts["provider"] == "CPUExecutionProvider"
    assert facts["cpu"] and facts["cores"] >= 1


@pytest.mark.parametrize(
    ("text", "model", "flags"),
    [
        ("model name\t: Xeon\nflags\t\t: fpu avx2 avx512_vnni\n", "Xeon", ["avx2", "avx512_vnni"]),
        ("Features\t: fp asimd asimddp i8mm\nHardware\t: BCM2712\n", "BCM2712", ["asimd", "asimddp", "i8mm"]),
    ],
)
def test_cpu_flags_are_read_on_x86_and_arm(tmp_path, text, model, flags):
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    assert read_cpuinfo(path) == {"model": model, "flags": flags}


def test_installed_package_has_no_commit(tmp_path):
    assert source_commit(tmp_path) is None
    assert read_cpuinfo(tmp_path / "absent")["flags"] == []
