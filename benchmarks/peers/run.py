"""The command behind `gemini-edge bench --peers`: from bundles and a file of peers to a folder of results."""

import json
import os
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gemini.benchmarks.contestants import check_length
from gemini.benchmarks.peers.compare import Settings, compare
from gemini.benchmarks.peers.field import bundle_peers, read_peers
from gemini.benchmarks.peers.figures import draw_comparison
from gemini.benchmarks.peers.sweeps import SWEEPS, run_sweep
from gemini.benchmarks.peers.table import markdown_table, sweep_tables
from gemini.benchmarks.report import to_plain
from gemini.benchmarks.text import TextSource, default_text, read_text, token_windows
from gemini.errors import UsageError
from gemini.runtime.bundle import Bundle, read_bundle
from gemini.runtime.schema import DecoderModel
from gemini.runtime.threads import usable_threads
from gemini.runtime.tokenizer import TextTokenizer

WINDOW = 512  # tokens
STARTS = 3  # at most; a start is slow, and the same every time


def run_peers(
    bundles: Sequence[Path],
    peers: Path,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    threads: int | None = None,
    repeat: int = 5,
    windows: int = 8,
    text: Path | None = None,
    sweeps: Sequence[str] = (),
    timeout: float = 300.0,
    device: str = "cpu",
    output: Path | None = None,
) -> dict[str, Any]:
    """Compare bundles with the peers of a TOML file; the first bundle is what ratios refer to.

    Perplexity is taken over ``windows`` stretches (0: none) of 512 tokens of ``text``, tokenized once, by the
    first bundle. With ``output``, a folder, the result is written there: peers.json, peers.md and plots.
    UsageError for what cannot be compared, before anything is started, or when nothing could be measured.
    """
    _check_counts(prompt_tokens, new_tokens, threads, repeat, windows, timeout)
    if unknown := set(sweeps) - set(SWEEPS):
        raise UsageError(f"There is no sweep over {min(unknown)}.", f"Use {', '.join(SWEEPS)}.")
    if output is not None:
        _check_output(output)
    opened = [read_bundle(path) for path in bundles]
    model = _common_model(opened)
    for bundle in opened:
        check_length(bundle, prompt_tokens, new_tokens)
    field = [*bundle_peers(bundles), *read_peers(peers)]
    source = (
        TextSource(text.name, read_text(text)) if text else TextSource("pydoc", default_text().evaluation)
    )
    ids = TextTokenizer.read(opened[0]).encode(source.text, special_tokens=False)
    window = min(WINDOW, model.context_length)
    pieces = [piece[0].tolist() for piece in token_windows(ids, window, windows)] if windows else []
    settings = Settings(
        vocab_size=model.vocab_size,
        context_length=model.context_length,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        threads=threads or usable_threads(),
        repeat=repeat,
        starts=min(STARTS, repeat),
        timeout=timeout,
        device=device,
    )
    result = compare(field, pieces, settings)
    measured = [row["name"] for row in result["peers"] if row["error"] is None]
    if not measured:
        raise UsageError(
            f"Nothing could be measured ({result['peers'][0]['error']}).",
            "`gemini-edge bench --peers help` says how to set the peers up.",
        )
    result["text"] = source.to_dict()
    going = [peer for peer in field if peer.name in measured]
    result["sweeps"] = {kind: run_sweep(kind, going, settings) for kind in dict.fromkeys(sweeps)}
    if output is not None:
        write_results(result, output)
    return result


def write_results(result: dict[str, Any], folder: Path) -> None:
    """peers.json, peers.md and the plots; each file appears whole or not at all."""
    plain = to_plain(result)
    page = "\n\n".join(part for part in (markdown_table(plain), sweep_tables(plain)) if part)
    files = {
        "peers.json": (json.dumps(plain, indent=2, allow_nan=False) + "\n").encode(),
        "peers.md": f"{page}\n".encode(),
        **draw_comparison(plain),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as scratch:
        for name, data in files.items():
            (Path(scratch) / name).write_bytes(data)
        for name in files:
            os.replace(Path(scratch) / name, folder / name)


def _check_counts(
    prompt_tokens: int, new_tokens: int, threads: int | None, repeat: int, windows: int, timeout: float
) -> None:
    for name, value, least in (
        ("prompt tokens", prompt_tokens, 1),
        ("new tokens", new_tokens, 1),
        ("threads", 1 if threads is None else threads, 1),
        ("rounds", repeat, 1),
        ("windows", windows, 0),
        ("seconds a request may take", timeout, 1),
    ):
        if not value >= least:
            raise UsageError(f"The number of {name} is {value}.", f"Use {least} or more.")


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is not a folder.", "Choose another --output.")
    if find_spec("matplotlib") is None:
        raise UsageError("Plots need matplotlib.", "Install it with: pip install 'gemini-edge[report]'.")


def _common_model(opened: Sequence[Bundle]) -> DecoderModel:
    """The first bundle's model. UsageError unless all are text generators with one vocabulary."""
    if not opened:
        raise UsageError("There is no bundle to compare.", "Name one bundle folder or more.")
    models = []
    for bundle in opened:
        model = bundle.manifest.model
        if not isinstance(model, DecoderModel):
            raise UsageError(
                f"{bundle.manifest.name} is no decoder but for {bundle.manifest.task}.",
                "Leave --peers out, or name bundles of decoders.",
            )
        models.append(model)
    if len({model.vocab_size for model in models}) > 1:
        raise UsageError("The bundles have different vocabularies.", "Compare bundles of one model.")
    return models[0]
