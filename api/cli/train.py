"""`gemini-edge train`: a model of the Gemini family, from a recipe and the data cache."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from gemini.cli.output import pairs

HELP = "Train a model of the Gemini family; a run that was killed continues where it was."
EXAMPLE = "gemini-edge train nano --output runs/nano --minutes 60"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `train`."""
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="nano, reader, mimic, recall, focus, tower, sketch, pretrain, caption, classify, or a FILE.toml",
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="the checkpoint to write")
    parser.add_argument("--cache", metavar="DIR", help="where `gemini-edge data` put the data")
    parser.add_argument(
        "--from", dest="start", metavar="DIR", help="a checkpoint to start from, instead of random weights"
    )
    parser.add_argument(
        "--minutes", metavar="M", type=float, help="end after this time, learning rate at zero"
    )
    parser.add_argument("--steps", metavar="N", type=int, help="end after this many steps")
    parser.add_argument("--resume", action="store_true", help="continue the run in DIR, if there is one")
    parser.add_argument(
        "--fusion", choices=("early", "late", "hybrid"), help="how the encoder joins text and image"
    )
    parser.add_argument("--seed", metavar="S", type=int, help="the seed of everything random (default: 0)")
    parser.add_argument("--lora", metavar="RANK", type=int, help="train adapters of this rank only")
    parser.add_argument("--threads", metavar="N", type=int, help="threads (default: what torch chooses)")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train as the recipe says; returns the summary that is also in DIR/training.json."""
    # Read once, when torch starts its threads. Threads that spin while they wait take the cores from
    # whatever else runs: beside one other busy process, a step took three times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from gemini.model.training.options import load_options

    options = load_options(args.recipe)
    given = {
        "start": args.start,
        "minutes": args.minutes,
        "steps": args.steps,
        "fusion": args.fusion,
        "seed": args.seed,
        "lora_rank": args.lora,
    }
    options = dataclasses.replace(
        options, **{key: value for key, value in given.items() if value is not None}
    )

    from gemini.model.offline import import_transformers

    import_transformers()
    import torch

    from gemini.model.data import default_cache
    from gemini.model.training.loop import train

    if args.threads:
        torch.set_num_threads(args.threads)
    cache = Path(args.cache) if args.cache else default_cache()
    summary = train(options, Path(args.output), cache, resume=args.resume, show=True)
    print(pairs(summary["test"]))
    print(f"\ncheckpoint  {args.output}\nsummary     {Path(args.output) / 'training.json'}")
    return summary
