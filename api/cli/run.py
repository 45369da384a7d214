"""`gemini-edge run`: use a bundle from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from gemini.cli.inputs import (
    A_BUNDLE,
    add_session_options,
    bundle_folder,
    checked_text,
    read_stdin,
    read_text,
)
from gemini.errors import UsageError

if TYPE_CHECKING:
    from gemini.runtime import (
        Embedder,
        Generation,
        ImageClassifier,
        Seq2SeqGenerator,
        TextClassifier,
        TextGenerator,
    )
    from gemini.runtime.options import OptionArgs

HELP = "Run a bundle: generate text (streamed), embed or classify texts, classify or describe images."
EXAMPLE = 'gemini-edge run bundles/smollm2 --prompt "Once upon a time" --max-new-tokens 64 --seed 1'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    parser.add_argument("bundle", metavar="BUNDLE", type=bundle_folder, help=A_BUNDLE)
    parser.add_argument(
        "stdin",
        metavar="-",
        nargs="?",
        help="read standard input: one prompt for a generator, one text a line for the others",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="the prompt of a text generator")
    parser.add_argument("--text", metavar="TEXT", nargs="+", help="texts to embed or to classify")
    parser.add_argument("--image", metavar="FILE", nargs="+", help="images to classify or describe")
    add_session_options(parser)
    generation = parser.add_argument_group("generation")
    generation.add_argument(
        "--chat", action="store_true", help="wrap the prompt in the bundle's chat template"
    )
    generation.add_argument(
        "--max-new-tokens", metavar="N", type=int, help="stop after N tokens (default: 128)"
    )
    generation.add_argument(
        "--temperature", metavar="T", type=float, help="sampling temperature; 0 is greedy"
    )
    generation.add_argument(
        "--top-k", metavar="K", type=int, help="sample among the K likeliest tokens; 0 is off"
    )
    generation.add_argument("--top-p", metavar="P", type=float, help="sample in the nucleus of probability P")
    generation.add_argument(
        "--min-p", metavar="P", type=float, help="drop tokens below P times the likeliest one's probability"
    )
    generation.add_argument(
        "--repetition-penalty",
        metavar="R",
        type=float,
        help="above 1 discourages tokens that already appeared",
    )
    generation.add_argument(
        "--begin",
        metavar="TEXT",
        help="what the answer of a model with an encoder begins with and does not repeat: the token of the "
        "language to translate into, say",
    )
    generation.add_argument(
        "--num-beams",
        metavar="N",
        type=int,
        help="follow so many beginnings at once and print the likeliest text (default: 4 to say what is "
        "in an image, else 1)",
    )
    generation.add_argument(
        "--json-schema", metavar="FILE", help="write a document of this JSON schema and nothing else"
    )
    generation.add_argument(
        "--regex", metavar="PATTERN", help="write what this regular expression matches and nothing else"
    )
    generation.add_argument("--seed", metavar="N", type=int, help="makes sampling repeatable")
    generation.add_argument(
        "--speculate",
        metavar="lookup|BUNDLE",
        help="draft tokens and check several in one call: copied from the text so far (lookup), or by a "
        "smaller bundle with the same tokenizer; worth it where the answer repeats the prompt",
    )
    generation.add_argument(
        "--stop", metavar="TEXT", action="append", help="end before this text; may be repeated"
    )


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Load the bundle, check that the input fits its task, print what comes out."""
    given = [name for name in ("prompt", "text", "image", "stdin") if getattr(args, name) is not None]
    asked = given == ["prompt", "image"]  # a question about a picture, for a model that reads both
    if not (len(given) == 1 or asked) or args.stdin not in (None, "-"):
        raise UsageError(
            "Exactly one input is needed.", "Give --prompt TEXT, --text TEXT…, --image FILE… or -."
        )
    texts = _texts(args)
    from gemini import runtime

    session = runtime.load(args.bundle, device=args.device, threads=args.threads)
    if args.speculate and not isinstance(session, runtime.TextGenerator):
        raise UsageError(
            f"The bundle's task is {session.bundle.manifest.task}, which is not drafted for.",
            "Leave --speculate out.",
        )
    if asked and session.bundle.manifest.family != "encoder-decoder":
        raise UsageError(
            f"The bundle's task is {session.bundle.manifest.task}, which takes one input.",
            "Give --prompt or --image.",
        )
    if isinstance(session, runtime.TextGenerator):
        _require(given[0], "text-generation", "prompt", "stdin")
        return _generate(session, texts[0], args)
    if isinstance(session, runtime.Seq2SeqGenerator):
        if given[0] == "text" and session.bundle.manifest.generation.label_ids:
            return _classify(session, texts)
        _require(given[0], session.bundle.manifest.task, "prompt", "image", "stdin")
        return _answer(session, texts[0] if texts else None, args)
    if isinstance(session, runtime.ImageClassifier):
        _require(given[0], "image-classification", "image")
        return _classify(session, args.image)
    if given[0] == "stdin":
        texts = [line for line in texts[0].splitlines() if line.strip()]
    if isinstance(session, runtime.Embedder):
        _require(given[0], "feature-extraction", "text", "stdin")
        return _embed(session, texts)
    _require(given[0], "text-classification", "text", "stdin")
    return _classify(session, texts)


def _texts(args: argparse.Namespace) -> list[str]:
    if args.stdin is not None:
        return [read_stdin()]
    if args.prompt is not None:
        return [checked_text(args.prompt, "--prompt")]
    return [checked_text(text, "--text") for text in args.text or ()]


def _require(given: str, task: str, *accepted: str) -> None:
    if given not in accepted:
        options = " or ".join("-" if name == "stdin" else f"--{name}" for name in accepted)
        raise UsageError(f"The bundle's task is {task}, which does not take --{given}.", f"Use {options}.")


def _options(args: argparse.Namespace) -> OptionArgs:
    return {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "seed": args.seed,
        "num_beams": args.num_beams,
        "begin": args.begin,
        "stop": args.stop,
        "json_schema": read_text(args.json_schema) if args.json_schema is not None else None,
        "regex": args.regex,
    }


def _generate(session: TextGenerator, prompt: str, args: argparse.Namespace) -> dict[str, Any]:
    """Stream the text; with --json nobody reads along, so the whole generation comes with its counts."""
    result: dict[str, Any] = {"task": "text-generation", "prompt": prompt}
    speculate = _speculate(args)
    if args.json or args.num_beams:
        answer = session.generate(prompt, chat=args.chat, speculate=speculate, **_options(args))
        assert not isinstance(answer, list)
        return result | _whole(answer, args)
    pieces = session.stream(prompt, chat=args.chat, speculate=speculate, **_options(args))
    return result | {"text": _print(pieces)}


def _speculate(args: argparse.Namespace) -> Literal["lookup"] | TextGenerator | None:
    """What drafts; a bundle is loaded on the device and threads of the one that it drafts for."""
    if args.speculate is None or args.speculate == "lookup":
        return args.speculate  # type: ignore[no-any-return]
    from gemini import runtime

    draft = runtime.load(args.speculate, device=args.device, threads=args.threads)
    if not isinstance(draft, runtime.TextGenerator):
        raise UsageError(
            f"{args.speculate} is for {draft.bundle.manifest.task}.",
            "Draft with a bundle that generates text.",
        )
    return draft


def _answer(session: Seq2SeqGenerator, prompt: str | None, args: argparse.Namespace) -> dict[str, Any]:
    """Stream the answer to one source, unless a search with beams finds it; several images, one a line."""
    if args.chat:
        raise UsageError("This model holds no conversations.", "Leave --chat out.")
    images: list[str] = args.image or []
    prompt = session.prefixed(prompt) if prompt is not None and not images else prompt
    result = {"task": session.bundle.manifest.task, "prompt": prompt, "images": images}
    from gemini.runtime.options import CAPTION_BEAMS

    options = _options(args)
    sampling = ("temperature", "top_k", "top_p", "min_p", "seed")
    if images and prompt is None and not any(options.get(name) is not None for name in sampling):
        options["num_beams"] = args.num_beams or CAPTION_BEAMS
    if len(images) > 1:
        answers = session.generate(prompt, images, **options)
        assert isinstance(answers, list)
        if not args.json:
            print("\n".join(f"{name}  {answer.text}" for name, answer in zip(images, answers, strict=True)))
        return result | {"generations": answers}
    image = images[0] if images else None
    if args.json or options.get("num_beams"):
        answer = session.generate(prompt, image, **options)
        assert not isinstance(answer, list)
        return result | _whole(answer, args)
    return result | {"text": _print(session.stream(prompt, image, **options))}


def _whole(answer: Generation, args: argparse.Namespace) -> dict[str, Any]:
    """Print an answer that was not streamed, unless it goes into JSON anyway."""
    if not args.json:
        print(answer.text)
    return {"generation": answer}


def _print(stream: Iterator[str]) -> str:
    """Write the pieces as they come; returns the whole text."""
    pieces = []
    for piece in stream:
        pieces.append(piece)
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    return "".join(pieces)


def _embed(session: Embedder, texts: Sequence[str]) -> dict[str, Any]:
    """One line of numbers a text, ready for other tools."""
    vectors = session.embed(texts)
    for vector in vectors:
        print(" ".join(f"{value:.6g}" for value in vector))
    return {"task": "feature-extraction", "texts": list(texts), "embeddings": vectors}


def _classify(
    session: TextClassifier | ImageClassifier | Seq2SeqGenerator, inputs: Sequence[str]
) -> dict[str, Any]:
    """The likeliest labels of each input."""
    found = session.classify(inputs)
    for given, labels in zip(inputs, found, strict=True):
        print("  ".join([given, *(f"{label.label} {label.score:.3f}" for label in labels[:3])]))
    return {"task": session.bundle.manifest.task, "inputs": list(inputs), "labels": found}
