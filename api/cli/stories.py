"""`gemini-edge stories`: sample a corpus of short stories from a language model's bundle."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gemini.errors import UsageError

HELP = "Sample short stories from a language model's bundle: the text that gemini-nano learns from."
EXAMPLE = "gemini-edge stories bundles/smollm2 --tokens 1000000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `stories`."""
    parser.add_argument("bundle", metavar="BUNDLE", help="the bundle of a chat model")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="JSON Lines, continued where they end (default: stories.jsonl beside the data)",
    )
    parser.add_argument(
        "--tokens", metavar="N", type=int, default=1_000_000, help="sample N tokens in all (default: 1000000)"
    )
    parser.add_argument("--batch", metavar="N", type=int, default=32, help="stories at a time (default: 32)")
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="seed of the first story (default: 0)"
    )
    parser.add_argument(
        "--threads", metavar="N", type=int, help="threads (default: what cgroup and affinity allow)"
    )


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Append whole batches until the file holds enough tokens; an interrupted run goes on where it ended."""
    from gemini.model.data import default_cache
    from gemini.model.data.storytelling import story_request, tidy_story
    from gemini.runtime import TextGenerator, load

    if args.batch < 1 or args.tokens < 1 or args.seed < 0:
        raise UsageError("--batch and --tokens must be at least 1 and --seed at least 0.", "Choose others.")
    output = Path(args.output) if args.output else default_cache() / "stories.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    seed, tokens, kept = _progress(output, args.seed)
    generator = load(args.bundle, threads=args.threads)
    if not isinstance(generator, TextGenerator):
        raise UsageError("This bundle does not generate text.", "Use the bundle of a chat language model.")
    with (
        output.open("a", encoding="utf-8") as file,
        tqdm(total=args.tokens, initial=tokens, unit="token", desc="stories") as bar,
    ):
        while tokens < args.tokens:
            requests = [story_request(seed + row) for row in range(args.batch)]
            prompts = [
                generator.render_chat([{"role": "user", "content": item.request}]) + item.opening
                for item in requests
            ]
            answers = generator.generate(
                prompts, max_new_tokens=140, temperature=0.8, top_p=0.9, repetition_penalty=1.03, seed=seed
            )
            assert isinstance(answers, list)  # a list of prompts went in
            lines = []
            for row, (item, answer) in enumerate(zip(requests, answers, strict=True)):
                story = tidy_story(item.opening + answer.text)
                entry = {
                    "seed": seed + row,
                    "tokens": len(answer.tokens),
                    "prompt": item.request,
                    "text": story,
                }
                lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
                tokens += len(answer.tokens)
                kept += story is not None
            file.write("".join(lines))
            file.flush()
            seed += args.batch
            bar.update(sum(len(answer.tokens) for answer in answers))
    return {"output": str(output), "tokens": tokens, "stories": kept, "next_seed": seed}


def _progress(output: Path, first_seed: int) -> tuple[int, int, int]:
    """(next seed, tokens sampled, stories kept) of a corpus so far; a line cut off by a kill is removed."""
    if not output.exists():
        return first_seed, 0, 0
    data = output.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        output.write_bytes(whole)
    try:
        entries = [json.loads(line) for line in whole.splitlines()]
        seed = max((entry["seed"] + 1 for entry in entries), default=first_seed)
        return seed, sum(entry["tokens"] for entry in entries), sum(bool(entry["text"]) for entry in entries)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{output} exists and is no corpus of stories.", "Choose another file for --output."
        ) from error
