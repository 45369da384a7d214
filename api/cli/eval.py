"""`gemini-edge eval`: the accuracy of bundles on a text, alone or against another bundle."""

from __future__ import annotations

import argparse
import tempfile
from itertools import chain
from typing import TYPE_CHECKING, Any

from gemini.cli.inputs import add_session_options, bundle_folder
from gemini.cli.output import results_table
from gemini.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from gemini.runtime import Embedder, Seq2SeqGenerator, Session, TextClassifier, TextGenerator

HELP = "Measure the accuracy of bundles: perplexity alone; KL, agreement and cosine against another bundle."
EXAMPLE = "gemini-edge eval bundles/smollm2 --text my-domain.txt --reference bundles/smollm2-fp32"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `eval`."""
    parser.add_argument(
        "bundles", metavar="BUNDLE", nargs="+", type=bundle_folder, help="folders of bundles of one model"
    )
    parser.add_argument(
        "--text", metavar="FILE", help="UTF-8 text to measure on, instead of the built-in one"
    )
    parser.add_argument(
        "--reference",
        metavar="BUNDLE",
        type=bundle_folder,
        help="the bundle to compare with, usually the fp32 one",
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
    add_session_options(parser)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Score the bundles; returns one row for each, after one for the reference if there is one."""
    if min(args.windows, args.sentences) < 1 or args.window < 2:
        raise UsageError(
            "Nothing would be measured.", "Use 1 window of 2 tokens or more, and 1 sentence or more."
        )
    from gemini import runtime
    from gemini.benchmarks.text import default_text, read_text

    text = read_text(args.text) if args.text else default_text().evaluation
    reference = _load(args.reference, args) if args.reference else None
    first = _load(args.bundles[0], args)
    sessions = chain([first], (_load(bundle, args) for bundle in args.bundles[1:]))
    same = _comparable(sessions, reference or first)
    if isinstance(first, runtime.TextGenerator | runtime.Seq2SeqGenerator):
        rows = list(_score_generators(same, reference, text, args))
    else:
        rows = list(_score_encoders(same, reference, text, args))
    print(results_table(rows))
    return {"task": first.bundle.manifest.task, "text": args.text or "built-in", "table": rows}


def _load(bundle: Path, args: argparse.Namespace) -> Session:
    from gemini import runtime

    session = runtime.load(bundle, device=args.device, threads=args.threads)
    sees_only = isinstance(session, runtime.Seq2SeqGenerator) and not session.takes_text
    if isinstance(session, runtime.ImageClassifier) or sees_only:
        raise UsageError(
            "An image model cannot be measured on text.", "See its own report with `gemini-edge inspect`."
        )
    return session


def _comparable(sessions: Iterable[Session], other: Session) -> Iterator[Any]:
    """The sessions, each as soon as it is known to be of one model with the other."""
    for session in sessions:
        _check_comparable(session, other)
        yield session


def _check_comparable(session: Session, reference: Session) -> None:
    ours, theirs = session.bundle.manifest, reference.bundle.manifest
    if ours.task != theirs.task:
        raise UsageError(
            f"The bundles' tasks differ ({ours.task}, {theirs.task}).", "Compare bundles of one model."
        )
    tokenizers = [getattr(one, "tokenizer", None) for one in (session, reference)]  # images have none
    if len({tokenizer and tokenizer.inner.to_str() for tokenizer in tokenizers}) > 1:
        raise UsageError("The bundles have different tokenizers.", "Compare bundles of one model.")


def _score_generators(
    sessions: Iterable[TextGenerator | Seq2SeqGenerator], reference: Any, text: str, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Perplexity; with a reference, whose logits are kept on disk meanwhile, also KL and top-1 agreement."""
    from gemini.benchmarks.accuracy import record_teacher, score_generator
    from gemini.benchmarks.text import token_windows

    teacher = None
    with tempfile.TemporaryDirectory(prefix="gemini-edge-") as folder:
        for session in sessions:
            ids = session.tokenizer.encode(text, special_tokens=False)
            windows = token_windows(ids, min(args.window, session.model.context_length), args.windows)
            if reference is not None and teacher is None:
                teacher, expected = record_teacher(_window_logits(reference), windows, folder)
                yield _row(reference, expected.to_dict())
            yield _row(session, score_generator(_window_logits(session), windows, teacher).to_dict())


def _window_logits(
    session: TextGenerator | Seq2SeqGenerator,
) -> Callable[[NDArray[np.int64]], NDArray[np.float32]]:
    """A generator predicts the whole window; one with an encoder reads half of it and predicts the rest."""
    from gemini.runtime import TextGenerator

    return session.logits if isinstance(session, TextGenerator) else session.continuation


def _score_encoders(
    sessions: Iterable[Embedder | TextClassifier], reference: Any, text: str, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Embeddings or logits of the same sentences, each bundle's against the reference's."""
    from gemini import runtime
    from gemini.benchmarks.agreement import score_classifier, score_embedder
    from gemini.benchmarks.text import split_sentences, spread

    if reference is None:
        raise UsageError(
            "A bundle of an encoder is judged against another one.",
            "Give --reference with its fp32 bundle, or see its own report with `gemini-edge inspect`.",
        )
    sentences = spread(split_sentences(text), args.sentences)
    if not sentences:
        raise UsageError(
            "The text holds no whole sentences.", "Give prose: sentences of 40 to 200 characters."
        )
    embeds = isinstance(reference, runtime.Embedder)
    expected = reference.embed(sentences) if embeds else reference.logits(sentences)
    yield _row(reference, {})
    for session in sessions:
        if isinstance(session, runtime.Embedder):
            yield _row(session, score_embedder(session.embed(sentences), expected).to_dict())
        else:
            assert isinstance(session, runtime.TextClassifier)
            problem = session.model.problem or "single_label"
            score = score_classifier(session.logits(sentences), expected, problem=problem)
            yield _row(session, score.to_dict())


def _row(session: Session, score: dict[str, Any]) -> dict[str, Any]:
    files = session.bundle.manifest.files.values()
    return {
        "name": str(session.bundle.path),
        "size_mb": sum(entry.size for entry in files) / 1e6,
        **{key: value for key, value in score.items() if value is not None},
    }
