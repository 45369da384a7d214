"""The comparison with other runtimes, against a fake one whose times and scores are known beforehand."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from gemini.benchmarks.peers.ask import random_batch
from gemini.benchmarks.peers.compare import Settings, compare, paired_ratios, pinned_cpus
from gemini.benchmarks.peers.field import SCRIPTS, Peer, bundle_peers, read_peers
from gemini.benchmarks.peers.figures import frontier
from gemini.benchmarks.peers.process import ADAPTERS, PeerError, PeerProcess
from gemini.benchmarks.peers.sweeps import run_sweep
from gemini.benchmarks.resources import peak_rss_mb
from gemini.errors import UsageError

# The model's file says how it behaves: {"step": seconds a token, "trouble": ..., "log": path}.
FAKE = """
import ctypes, json, os, sys, time
from pathlib import Path
sys.path.insert(0, {adapters!r})
import wire

class Fake:
    versions = {{"fake": "1.2"}}
    bytes_per_token = 1 << 20

    def __init__(self, path, threads, device):
        os.write(1, b"a library prints this\\n")
        self.plan, self.threads, self.runs = json.loads(Path(path).read_text()), threads, 0

    def prepare(self, batch, length):
        pass

    def generate(self, prompts, new_tokens):
        self.runs += 1
        if "log" in self.plan:
            with open(self.plan["log"], "a") as log:
                print(json.dumps([self.plan["name"], prompts, self.threads, new_tokens]), file=log)
        trouble = self.plan.get("trouble")
        if trouble == "crash":
            sys.exit("the model has fallen over")
        if trouble == "fault":
            os.kill(os.getpid(), 11)
        if trouble == "hang":
            time.sleep(60)
        if trouble == "raise" or (trouble == "batch" and len(prompts) > 2):
            raise ValueError("no room for\\nthis")
        step = self.plan["step"] * (2 if self.runs == 3 else 1)
        count = new_tokens - (trouble == "short")
        return {{"first_token": 10 * step, "tokens": [step] * count,
                 "ids": [[1] * (count + 1) for _ in prompts]}}

    def nll(self, ids):
        return float("nan") if self.plan.get("trouble") == "nan" else 0.5 * (len(ids) - 1)

wire.serve(Fake)
"""
SETTINGS = Settings(
    vocab_size=50,
    context_length=300,
    prompt_tokens=6,
    new_tokens=4,
    threads=1,
    repeat=3,
    starts=1,
    timeout=30,
)


@pytest.fixture
def fake(tmp_path: Path):
    """fake(name, step=..., trouble=...) -> Peer."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(adapters=str(ADAPTERS)))

    def make(name: str, step: float = 0.01, **plan: object) -> Peer:
        model = tmp_path / f"{name}.json"
        model.write_text(json.dumps({"name": name, "step": step, **plan}))
        return Peer(name, "llama.cpp", (sys.executable, "-S", str(script)), model)  # no site: starts faster

    return make


def opened(peer: Peer) -> PeerProcess:
    return PeerProcess(peer.command, 1, pinned_cpus(1))


def request(**changes: object) -> dict:
    return {"do": "run", "prompts": [[1, 2]], "new_tokens": 2, **changes}


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_an_adapter_answers_and_keeps_the_pipe_for_itself(fake) -> None:
    peer = fake("a")
    with opened(peer) as process:
        loaded = process.ask({"do": "load", "model": str(peer.model), "threads": 1, "device": "cpu"}, 30)
        assert loaded == {"versions": {"fake": "1.2"}, "bytes_per_token": 1 << 20}
        run = process.ask(request(), 30)
        assert run == {"first_token": 0.1, "tokens": [0.01, 0.01], "ids": [[1, 1, 1]]}
        assert process.ask({"do": "score", "ids": [1, 2, 3]}, 30) == {"nll": 1.0, "tokens": 2}
        assert 1 < process.ask({"do": "memory"}, 30)["peak_rss_mb"] < 500


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("crash", "exit code 1: the model has fallen over"),
        ("fault", "signal SIGSEGV"),
        ("hang", "no answer within 1 s"),
        ("raise", "ValueError: no room for this"),
    ],
)
def test_a_failing_peer_says_why(fake, trouble: str, reason: str) -> None:
    peer = fake("a", trouble=trouble)
    with opened(peer) as process:
        process.ask({"do": "load", "model": str(peer.model), "threads": 1, "device": "cpu"}, 30)
        with pytest.raises(PeerError, match=f"^{re.escape(reason)}"):
            process.ask(request(), 1 if trouble == "hang" else 30)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print('[1]')", "no JSON object: '[1]'"),
        ("print('ready')", "no JSON object: 'ready'"),
        ("import not_there", "exit code 1: ModuleNotFoundError: No module named 'not_there'"),
        ("pass", "exit code 0"),
    ],
)
def test_a_script_that_is_no_adapter_is_found_out(tmp_path: Path, code: str, reason: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(code)
    with (
        PeerProcess((sys.executable, "-S", str(script)), 1, [0]) as process,
        pytest.raises(PeerError, match=re.escape(reason)),
    ):
        process.ask({"do": "memory"}, 30)


def test_an_interpreter_that_is_not_there_is_a_reason() -> None:
    with pytest.raises(PeerError, match=r"^/nowhere/python cannot be started \(No such file"):
        PeerProcess(("/nowhere/python", "script.py"), 1, [0])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads process states from /proc")
def test_a_paused_process_stands_still_and_closing_ends_it(fake) -> None:
    peer = fake("a")
    with opened(peer) as process:
        process.ask({"do": "load", "model": str(peer.model), "threads": 1, "device": "cpu"}, 30)
        pid = process._child.pid
        process.pause()
        deadline = time.monotonic() + 10
        while state(pid) != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state(pid) == "T"
        process.resume()
        assert process.ask(request(), 30)["ids"] == [[1, 1, 1]]
        process.pause()
    assert not Path(f"/proc/{pid}").exists()
    process.close()  # a second time does nothing


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is of Linux")
def test_a_peer_dies_with_its_parent_even_while_computing(fake, tmp_path: Path) -> None:
    peer = fake("a", trouble="hang")
    parent = tmp_path / "parent.py"
    parent.write_text(
        "import sys\n"
        "from gemini.benchmarks.peers.process import PeerProcess\n"
        f"process = PeerProcess({list(peer.command)!r}, 1, [{pinned_cpus(1)[0]}])\n"
        f"process.ask({{'do': 'load', 'model': {str(peer.model)!r}, 'threads': 1, 'device': 'cpu'}}, 30)\n"
        "print(process._child.pid, flush=True)\n"
        "process.ask({'do': 'run', 'prompts': [[1]], 'new_tokens': 1}, 60)\n"
    )
    with subprocess.Popen([sys.executable, str(parent)], stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        child = int(started.stdout.readline())
        assert state(child) in "RSD"
        started.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and state(child) != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{child}").exists() or state(child) == "Z"


def test_the_environment_has_threads_and_silence_but_not_our_path(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os\n"
        "names = ('OMP_NUM_THREADS', 'ORT_DISABLE_TELEMETRY', 'HF_HUB_OFFLINE', 'PYTHONPATH')\n"
        "print(json.dumps({name: os.environ.get(name) for name in names}))\n"
    )
    expected = {"OMP_NUM_THREADS": "3", "ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
    for own_path, path in ((False, None), (True, "/ours")):
        with PeerProcess((sys.executable, "-S", str(script)), 3, [0], own_path) as process:
            assert process.ask({"do": "load"}, 30) == {**expected, "PYTHONPATH": path}


@pytest.mark.parametrize(("device", "seen"), [("cpu", ""), ("cuda", "3")])
def test_no_accelerator_is_seen_on_the_cpu(tmp_path: Path, monkeypatch, device, seen) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    script = tmp_path / "script.py"
    script.write_text("import json, os\nprint(json.dumps({'seen': os.environ['CUDA_VISIBLE_DEVICES']}))\n")
    with PeerProcess((sys.executable, "-S", str(script)), 1, [0], device=device) as process:
        assert process.ask({"do": "load"}, 30) == {"seen": seen}


def test_rounds_are_interleaved_and_figures_are_those_computed_by_hand(fake, tmp_path: Path) -> None:
    log = tmp_path / "log"
    peers = [
        fake("first", 0.010, log=str(log)),
        fake("second", 0.005, log=str(log)),
        fake("broken", trouble="crash"),
        Peer("gone", "llama.cpp", (sys.executable, "x.py"), tmp_path / "nothing.gguf"),
    ]
    result = compare(peers, [[1, 2, 3], [4, 5, 6, 7]], SETTINGS)
    first, second, broken, gone = result["peers"]

    calls = [json.loads(line) for line in log.read_text().splitlines()]
    turns = ["first", "second"], ["second", "first"]  # a start, a warm-up and three rounds
    assert [name for name, *_ in calls] == [*turns[0], *turns[0], *turns[1], *turns[0], *turns[1]]
    for (_, mine, threads, _), (_, theirs, _, _) in zip(calls[::2], calls[1::2], strict=True):
        assert mine == theirs
        assert threads == 1
    prompts = [prompt for _, prompt, _, _ in calls[2::2]]
    assert all(one != other for one, other in pairwise(prompts))
    assert [new for *_, new in calls] == [0, 0] + [4] * 8

    # 10 ms a token; the third run of a process takes twice as long, so the median of three is 100 a second.
    assert first["latency"]["decode_tokens_per_second"] == pytest.approx(100)
    assert second["latency"]["decode_tokens_per_second"] == pytest.approx(200)
    assert first["latency"]["prefill_tokens_per_second"] == pytest.approx(60)  # 6 tokens in 0.1 s
    assert first["ratio"]["decode"] == {"p50": 1.0, "low": 1.0, "high": 1.0}
    assert second["ratio"]["prefill"]["p50"] == pytest.approx(2)
    assert second["latency"]["repeat"] == 3
    assert len(second["latency"]["samples_ms"]) == 12
    assert first["perplexity"] == pytest.approx(math.exp(0.5))
    assert first["scored_tokens"] == 5
    assert 1 < first["latency"]["peak_rss_mb"] < 0.8 * peak_rss_mb()  # a bare interpreter's, not this one's
    assert first["start_to_first_token_ms"]["n"] == 1
    share = 100 * 100 * 2**20 / 2**30 / result["read_gib_per_second"]  # 100 tokens a second of 1 MiB each
    assert first["latency"]["bandwidth_percent"] == pytest.approx(share)

    assert broken["error"] == "exit code 1: the model has fallen over"
    assert gone["error"] == f"there is no model {tmp_path / 'nothing.gguf'}"
    assert "latency" not in broken
    json.dumps(result, allow_nan=False)


def test_whoever_is_not_at_turn_stands_still(fake, monkeypatch) -> None:
    running: set[int] = set()
    seen: list[set[int]] = []

    class Watched(PeerProcess):
        def ask(self, request, timeout):
            running.add(id(self)) if request["do"] == "load" else seen.append(set(running))
            return super().ask(request, timeout)

        def pause(self):
            running.discard(id(self))
            super().pause()

        def resume(self):
            running.add(id(self))
            super().resume()

    monkeypatch.setattr("gemini.benchmarks.peers.compare.PeerProcess", Watched)
    settings = Settings(**{**vars(SETTINGS), "starts": 0, "repeat": 1})
    compare([fake("a"), fake("b")], [[1, 2]], settings)
    assert len(seen) == 2 * (2 + 1 + 1)  # warm-up and round, memory, score
    assert all(len(one) == 1 for one in seen)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [("short", "it stopped before 4 tokens"), ("nan", "its logits are not numbers"), ("hang", "no answer")],
)
def test_answers_that_cannot_be_believed_end_the_row_and_not_the_others(fake, trouble, reason) -> None:
    settings = Settings(**{**vars(SETTINGS), "starts": 0, "repeat": 1, "timeout": 2})
    good, bad = compare([fake("good"), fake("bad", trouble=trouble)], [[1, 2, 3]], settings)["peers"]
    assert bad["error"].startswith(reason)
    assert good["error"] is None
    assert good["perplexity"] == pytest.approx(math.exp(0.5))
    assert good["start_to_first_token_ms"] is None


def test_without_the_first_peer_there_are_no_ratios(fake) -> None:
    settings = Settings(**{**vars(SETTINGS), "starts": 0, "repeat": 1})
    _, second = compare([fake("bad", trouble="raise"), fake("good")], [], settings)["peers"]
    assert "ratio" not in second
    assert second["perplexity"] is None


def test_a_sweep_keeps_the_points_before_a_failure(fake) -> None:
    series = run_sweep("batch", [fake("a"), fake("b", trouble="batch")], SETTINGS)
    assert [point["batch"] for point in series[0]["points"]] == [1, 2, 4, 8, 16]
    # Prefill takes 10 steps of 10 ms for 128 tokens a row; each process warms up once, runs twice a value,
    # and its third run counts double.
    assert series[0]["points"][1]["prefill_tokens_per_second"] == pytest.approx(2 * 128 / 0.1)
    assert series[0]["points"][4]["decode_tokens_per_second"] == pytest.approx(16 / 0.01)
    assert series[0]["error"] is None
    assert [point["batch"] for point in series[1]["points"]] == [1, 2]
    assert series[1]["error"] == "ValueError: no room for this"


def test_a_sweep_leaves_out_what_the_context_has_no_room_for(fake) -> None:
    (series,) = run_sweep("prompt", [fake("a")], SETTINGS)
    assert [point["prompt"] for point in series["points"]] == [128, 256]


def test_a_sweep_over_threads_loads_for_each_count(fake, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("gemini.benchmarks.peers.sweeps.pinned_cpus", lambda threads: [0, 1][:threads])
    log = tmp_path / "log"
    (series,) = run_sweep("threads", [fake("a", log=str(log))], SETTINGS)
    assert [point["threads"] for point in series["points"]] == [1, 2]
    threads = [json.loads(line)[2] for line in log.read_text().splitlines()]
    assert threads == [1] * 3 + [2] * 3


def test_ratios_are_paired_by_round() -> None:
    # The machine got twice as slow in the second round; the ratio of medians would be 25 / 15.
    assert paired_ratios([40, 20, 25], [20, 10, 15]) == {"p50": 2.0, "low": 25 / 15, "high": 2.0}


def test_prompts_are_the_same_for_all_and_another_each_round() -> None:
    assert random_batch(50, 2, 8, 3) == random_batch(50, 2, 8, 3)
    rows = random_batch(50, 2, 8, 3) + random_batch(50, 2, 8, 4)
    assert len({tuple(row) for row in rows}) == 4
    assert all(0 <= token < 50 for row in rows for token in row)


def test_the_frontier_is_what_nobody_beats_in_both() -> None:
    points = np.random.default_rng(0).integers(0, 12, (40, 2)).astype(float)
    pairs = [tuple(map(float, point)) for point in points]
    unbeaten = {
        (speed, loss)
        for speed, loss in pairs
        if not any(s >= speed and q <= loss and (s, q) != (speed, loss) for s, q in pairs)
    }
    assert frontier(pairs) == sorted(unbeaten)


def test_the_scores_of_adapters_are_sums_of_log_softmax(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ADAPTERS))
    import wire

    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 30, (7, 11)).astype(np.float32), rng.integers(0, 11, 7).tolist()
    expected = -sum(
        float(row[target]) - math.log(math.fsum(math.exp(float(value)) for value in row))
        for row, target in zip(logits, targets, strict=True)
    )
    assert wire.nll_of(logits, targets) == pytest.approx(expected, rel=1e-12)  # both sum in float64


def test_greedy_feeds_each_token_back(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ADAPTERS))
    import wire

    found = wire.greedy(lambda: [1, 10], lambda tokens: [2 * token for token in tokens], 3)
    assert found["ids"] == [[1, 2, 4, 8], [10, 20, 40, 80]]
    assert len(found["tokens"]) == 3


def test_peers_are_read_relative_to_their_file(tmp_path: Path) -> None:
    file = tmp_path / "peers.toml"
    file.write_text(
        '[[peer]]\nname = "a"\nadapter = "llama.cpp"\npython = "env/bin/python"\nmodel = "a.gguf"\n'
        '[[peer]]\nname = "b"\nadapter = "transformers"\npython = "sh"\nmodel = "/models/b"\n'
    )
    one, two = read_peers(file)
    assert one.command == (str(tmp_path / "env/bin/python"), str(ADAPTERS / "peer_llama_cpp.py"))
    assert one.model == tmp_path / "a.gguf"
    assert os.path.isabs(two.command[0])
    assert two.model == Path("/models/b")
    assert not one.ours


ENTRY = 'name = "a"\nadapter = "llama.cpp"\npython = "p"\nmodel = "m"\n'


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "names no peer"),
        ("peer = 3", "names no peer"),
        ("peer = [3]", "is not a table"),
        ("[[peer]\n", "is not TOML"),
        ("threads = 2\n[[peer]]\n" + ENTRY, "unknown key threads"),
        ("[[peer]]\n" + ENTRY + "thread = 1\n", "unknown key thread"),
        ("[[peer]]\n" + ENTRY.replace('"m"', "3"), "has no model"),
        ("[[peer]]\n" + ENTRY.replace('"p"', '" "'), "has no python"),
        ("[[peer]]\n" + ENTRY.replace("llama.cpp", "vllm"), "no known adapter"),
        (("[[peer]]\n" + ENTRY) * 2, "the same name"),
    ],
)
def test_a_malformed_file_of_peers_is_refused(tmp_path: Path, text: str, cause: str) -> None:
    file = tmp_path / "peers.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=cause):
        read_peers(file)


def test_a_missing_file_of_peers_points_to_the_help(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--peers help"):
        read_peers(tmp_path / "none.toml")


def test_bundles_of_one_name_keep_their_paths() -> None:
    assert [peer.name for peer in bundle_peers([Path("x/a"), Path("y/b")])] == [
        "gemini-edge a",
        "gemini-edge b",
    ]
    names = [peer.name for peer in bundle_peers([Path("x/a"), Path("y/a")])]
    assert names == ["gemini-edge x/a", "gemini-edge y/a"]


def test_the_guide_covers_every_adapter_and_its_example_is_valid(tmp_path: Path) -> None:
    guide = (ADAPTERS.parent / "README.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)
    file = tmp_path / "peers.toml"
    file.write_text(example)
    adapters = {peer.adapter for peer in read_peers(file)} | {"gemini-edge"}
    assert adapters == set(SCRIPTS)
    assert all((ADAPTERS / script).is_file() for script in SCRIPTS.values())
    assert all((ADAPTERS / script).is_file() for script in re.findall(r"\$ADAPTERS/(\w+\.py)", guide))
