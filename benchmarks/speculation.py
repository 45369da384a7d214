"""What speculation is worth: prompts that repeat themselves and free text, plain and speculating in turn.

    python -m gemini.benchmarks.speculation BUNDLE --threads 2 --rounds 3
    python -m gemini.benchmarks.speculation BUNDLE --draft SMALLER_BUNDLE

Of every prompt: seconds after the first token, plain over speculating (the order alternates), medians over
the rounds; whether the tokens are the same; and where they are not, how far apart the two candidates were for
the plain model, in logits. The last line of standard output is JSON.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from gemini.benchmarks.host import host_facts
from gemini.benchmarks.speculation_prompts import COPY_PROMPTS, FREE_PROMPTS
from gemini.errors import UsageError
from gemini.runtime import GenerationOptions, TextGenerator, load
from gemini.runtime.speculate import Speculation

Speculate = Literal["lookup"] | TextGenerator


@dataclass(frozen=True)
class Answer:
    """New tokens, seconds from the first of them to the last, and what the drafts did."""

    tokens: tuple[int, ...]
    seconds: float
    counts: Speculation | None


@dataclass(frozen=True)
class Comparison:
    """One prompt. ``copied``: share of the plain answer's trigrams that the prompt holds; ``speedup``: median
    over the rounds; ``same``: in all rounds; ``gap``: of the plain model's logits between its token and the
    other one where they first differ, None if they never do."""

    kind: str
    prompt: str
    new_tokens: int
    copied: float
    speedup: float
    same: bool
    first_difference: int | None
    gap: float | None
    calls: int
    drafted: int
    accepted: int


def answer(
    session: TextGenerator, prompt: str, options: GenerationOptions, speculate: Speculate | None
) -> Answer:
    """Generate once."""
    ids = _encode(session, prompt)
    times: list[float] = []

    def clock(_row: int, _token: int) -> None:
        times.append(time.perf_counter())

    speculator = session.speculator(speculate, [ids], options)
    rows = session.generate_ids([ids], options, clock, speculator)
    return Answer(tuple(rows[0]), times[-1] - times[0], speculator.counts if speculator else None)


def compare(
    session: TextGenerator,
    prompt: str,
    kind: str,
    options: GenerationOptions,
    speculate: Speculate,
    rounds: int,
) -> Comparison:
    """Plain and speculating in turn, ``rounds`` times."""
    ratios, pair, different = [], None, None
    for index in range(rounds):
        order = (None, speculate) if index % 2 == 0 else (speculate, None)
        first, second = (answer(session, prompt, options, each) for each in order)
        pair = (first, second) if index % 2 == 0 else (second, first)
        # Seconds per token, because texts that differ may end at different lengths.
        paces = [each.seconds / max(len(each.tokens) - 1, 1) for each in pair]
        ratios.append(paces[0] / paces[1])
        different = different or (pair if pair[0].tokens != pair[1].tokens else None)
    assert pair is not None and pair[1].counts is not None
    where = gap = None
    if different is not None:
        where, gap = first_gap(session, prompt, different[0].tokens, different[1].tokens)
    return Comparison(
        kind,
        prompt,
        len(pair[0].tokens),
        copied_share(_encode(session, prompt), pair[0].tokens),
        float(np.median(ratios)),
        different is None,
        where,
        gap,
        **asdict(pair[1].counts),
    )


def first_gap(
    session: TextGenerator, prompt: str, plain: Sequence[int], other: Sequence[int]
) -> tuple[int, float | None]:
    """Where two answers first differ, and how far plain decoding saw the two tokens apart there (logits)."""
    where = next((i for i, (a, b) in enumerate(zip(plain, other, strict=False)) if a != b), None)
    if where is None:
        return min(len(plain), len(other)), None  # one is the beginning of the other
    logits = session.prefill([_encode(session, prompt)], where)
    for token in plain[:where]:
        logits = session.step([token])
    return where, float(logits[0, plain[where]] - logits[0, other[where]])


def copied_share(prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """How many of the trigrams of ``tokens`` occur in ``prompt``; 0 without any."""
    known = set(zip(prompt, prompt[1:], prompt[2:], strict=False))
    found = [each in known for each in zip(tokens, tokens[1:], tokens[2:], strict=False)]
    return sum(found) / max(len(found), 1)


def summarize(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Of each kind of prompt: the median speed-up, the lowest, how many answers are the same."""
    kinds = dict.fromkeys(each.kind for each in comparisons)
    summary = {}
    for kind in kinds:
        rows = [each for each in comparisons if each.kind == kind]
        speedups = [each.speedup for each in rows]
        drafted = sum(each.drafted for each in rows)
        summary[kind] = {
            "prompts": len(rows),
            "copied_mean": float(np.mean([each.copied for each in rows])),
            "speedup_median": float(np.median(speedups)),
            "speedup_mean": float(np.mean(speedups)),
            "speedup_lowest": min(speedups),
            "same": sum(each.same for each in rows),
            "largest_gap": max((abs(each.gap) for each in rows if each.gap is not None), default=None),
            "accepted_share": sum(each.accepted for each in rows) / drafted if drafted else None,
            "tokens_per_call": sum(each.new_tokens for each in rows) / sum(each.calls + 1 for each in rows),
        }
    return summary


def run(
    session: TextGenerator, speculate: Speculate, new_tokens: int, rounds: int, limit: int | None = None
) -> dict[str, Any]:
    """Everything measured, ready for JSON; ``limit``: only the first prompts of each kind."""
    options = GenerationOptions(max_new_tokens=new_tokens)
    answer(session, COPY_PROMPTS[0], options, speculate)  # warms up, and teaches what calls cost
    comparisons = []
    for kind, prompts in (("copy", COPY_PROMPTS), ("free", FREE_PROMPTS)):
        for prompt in prompts[:limit]:
            found = compare(session, prompt, kind, options, speculate, rounds)
            comparisons.append(found)
            note = "same" if found.same else f"differs at {found.first_difference}, gap {found.gap}"
            print(
                f"{kind}  {found.speedup:5.2f} x  {found.new_tokens:4d} tokens in {found.calls:4d} calls  "
                f"{found.accepted}/{found.drafted} accepted  {found.copied:.0%} copied  {note}",
                flush=True,
            )
    return {
        "schema_version": 1,
        "host": host_facts(session.threads, session.device),
        "bundle": session.bundle.manifest.name,
        "draft": "lookup" if isinstance(speculate, str) else speculate.bundle.manifest.name,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "summary": summarize(comparisons),
        "prompts": [asdict(each) for each in comparisons],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m gemini.benchmarks.speculation", description=__doc__)
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--draft", metavar="BUNDLE", help="a smaller bundle that drafts (default: lookup)")
    parser.add_argument("--threads", metavar="N", type=int)
    parser.add_argument("--new-tokens", metavar="N", type=int, default=128)
    parser.add_argument("--rounds", metavar="N", type=int, default=3)
    parser.add_argument("--prompts", metavar="N", type=int, help="only the first N of each kind")
    args = parser.parse_args(argv)
    session = _generator(args.bundle, args.threads)
    speculate: Speculate = _generator(args.draft, args.threads) if args.draft else "lookup"
    print(json.dumps(run(session, speculate, args.new_tokens, args.rounds, args.prompts)))


def _encode(session: TextGenerator, prompt: str) -> list[int]:
    return session.tokenizer.encode(prompt, True, session.bundle.manifest.generation.bos_token_id)


def _generator(bundle: str, threads: int | None) -> TextGenerator:
    session = load(bundle, threads=threads)
    if not isinstance(session, TextGenerator):
        raise UsageError(f"{bundle} generates no text.", "Give a bundle of a decoder.")
    return session


if __name__ == "__main__":
    main()
