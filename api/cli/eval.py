"""`gemini-edge eval`: the accuracy of a bundle on a text, alone or against another bundle."""

from __future__ import annotations

import argparse
import tempfile
from typing import TYPE_CHECKING, Any

from gemini.cli.output import results_table
from gemini.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from gemini.runtime import Embedder, Seq2SeqGenerator, Session, TextClassifier, TextGenerator

HELP = "Measure a bundle's accuracy: perplexity alone; KL, agreement and cosine against another bundle."
EXAMPLE = "gemini-edge eval bundles/smollm2 --text my-domain.txt --reference bundles/smollm2-fp32"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `eval`."""
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle's folder")
    parser.add_argument(
        "--text", metavar="FILE", help="UTF-8 text to measure on, instead of the built-in one"
    )
    parser.add_argument(
        "--reference", metavar="BUNDLE", help="the bundle to compare with, usually the fp32 one"
    )
    parser.add_argument("--windows", metavar="N", type=int, default=8, help="stretches of text (default: 8)")
    parser.add_argument(
        "--window", metavar="N", type=int, default=512, help="tokens in each stretch (default: 512)"
    )
    parser.add_argument(
        "--sentences",
        metavar="N",
        type=int,
        default=300,
        help="sentences for embedders and classifiers (default: 300)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument(
        "--threads", metavar="N", type=int, help="threads (default: what cgroup and affinity allow)"
    )


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Score the bundle; returns one row for it and one for the reference, if there is one."""
    if min(args.windows, args.sentences) < 1 or args.window < 2:
        raise UsageError(
            "Nothing would be measured.", "Use 1 window of 2 tokens or more, and 1 sentence or more."
        )
    from gemini import runtime
    from gemini.benchmarks.text import default_text, read_text

    text = read_text(args.text) if args.text else default_text().evaluation
    session = runtime.load(args.bundle, device=args.device, threads=args.threads)
    sees_only = isinstance(session, runtime.Seq2SeqGenerator) and not session.takes_text
    if isinstance(session, runtime.ImageClassifier) or sees_only:
        raise UsageError(
            "An image model cannot be measured on text.", "See its own report with `gemini-edge inspect`."
        )
    reference = None
    if args.reference:
        reference = runtime.load(args.reference, device=args.device, threads=args.threads)
        _check_comparable(session, reference)
    generators = runtime.TextGenerator | runtime.Seq2SeqGenerator
    if isinstance(session, generators):
        assert reference is None or isinstance(reference, generators)
        rows = _score_generator(session, reference, text, args)
    else:
        if reference is None:
            raise UsageError(
                f"A bundle for {session.bundle.manifest.task} is judged against another one.",
                "Give --reference with its fp32 bundle, or see its own report with `gemini-edge inspect`.",
            )
        assert isinstance(reference, runtime.Embedder | runtime.TextClassifier)
        rows = _score_encoder(session, reference, text, args)
    print(results_table(rows))
    return {"task": session.bundle.manifest.task, "text": args.text or "built-in", "table": rows}


def _check_comparable(session: Session, reference: Session) -> None:
    ours, theirs = session.bundle.manifest, reference.bundle.manifest
    if ours.task != theirs.task:
        raise UsageError(
            f"The bundles' tasks differ ({ours.task}, {theirs.task}).", "Compare bundles of one model."
        )
    if (
        ours.family != "vision"
        and ours.files["tokenizer.json"].sha256 != theirs.files["tokenizer.json"].sha256
    ):
        raise UsageError("The bundles have different tokenizers.", "Compare bundles of one model.")


def _score_generator(
    session: TextGenerator | Seq2SeqGenerator,
    reference: TextGenerator | Seq2SeqGenerator | None,
    text: str,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Perplexity; with a reference, whose logits are kept on disk meanwhile, also KL and top-1 agreement."""
    from gemini.benchmarks.accuracy import record_teacher, score_generator
    from gemini.benchmarks.text import token_windows

    ids = session.tokenizer.encode(text, special_tokens=False)
    windows = token_windows(ids, min(args.window, session.model.context_length), args.windows)
    logits = _window_logits(session)
    if reference is None:
        return [_row(session, score_generator(logits, windows).to_dict())]
    with tempfile.TemporaryDirectory(prefix="gemini-edge-") as folder:
        teacher, expected = record_teacher(_window_logits(reference), windows, folder)
        score = score_generator(logits, windows, teacher)
    return [_row(reference, expected.to_dict()), _row(session, score.to_dict())]


def _window_logits(
    session: TextGenerator | Seq2SeqGenerator,
) -> Callable[[NDArray[np.int64]], NDArray[np.float32]]:
    """A generator predicts the whole window; one with an encoder reads half of it and predicts the rest."""
    from gemini.runtime import TextGenerator

    return session.logits if isinstance(session, TextGenerator) else session.continuation


def _score_encoder(
    session: Embedder | TextClassifier,
    reference: Embedder | TextClassifier,
    text: str,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Embeddings or logits of the same sentences, ours against the reference's."""
    from gemini import runtime
    from gemini.benchmarks.agreement import score_classifier, score_embedder
    from gemini.benchmarks.text import split_sentences, spread

    sentences = spread(split_sentences(text), args.sentences)
    if not sentences:
        raise UsageError(
            "The text holds no whole sentences.", "Give prose: sentences of 40 to 200 characters."
        )
    score: dict[str, Any]
    if isinstance(session, runtime.Embedder) and isinstance(reference, runtime.Embedder):
        score = score_embedder(session.embed(sentences), reference.embed(sentences)).to_dict()
    else:
        assert isinstance(session, runtime.TextClassifier)
        assert isinstance(reference, runtime.TextClassifier)
        problem = session.model.problem or "single_label"
        logits, expected = session.logits(sentences), reference.logits(sentences)
        score = score_classifier(logits, expected, problem=problem).to_dict()
    return [_row(reference, {}), _row(session, score)]


def _row(session: Session, score: dict[str, Any]) -> dict[str, Any]:
    files = session.bundle.manifest.files.values()
    return {
        "name": str(session.bundle.path),
        "size_mb": sum(entry.size for entry in files) / 1e6,
        **{key: value for key, value in score.items() if value is not None},
    }
