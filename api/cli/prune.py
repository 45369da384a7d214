"""`gemini-edge prune`: a smaller checkpoint of the same class, for `compress` to go on with."""

from __future__ import annotations

import argparse
from typing import Any

from gemini.cli.output import recovery_line

HELP = "Cut layers, experts, heads, feed-forward width or unused tokens of a checkpoint, and measure it."
EXAMPLE = "gemini-edge prune smollm2-135m --width 0.25 --output smollm2-narrow"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prune`."""
    parser.add_argument("model", metavar="MODEL", help="a checkpoint, as `compress` takes it")
    parser.add_argument("--output", metavar="DIR", required=True, help="the checkpoint to write")
    parser.add_argument(
        "--layers", metavar="SHARE", type=float, default=0.0, help="leave out that share of the layers"
    )
    parser.add_argument(
        "--experts",
        metavar="SHARE",
        type=float,
        default=0.0,
        help="leave out that share of the experts of every layer that has some",
    )
    parser.add_argument(
        "--heads",
        metavar="SHARE",
        type=float,
        default=0.0,
        help="leave out that share of the attention heads, in whole groups that share keys and values",
    )
    parser.add_argument(
        "--width", metavar="SHARE", type=float, default=0.0, help="leave out that share of feed-forward units"
    )
    parser.add_argument(
        "--vocabulary",
        metavar="FILE",
        nargs="+",
        default=(),
        help="keep the tokens that these texts use, and those that any other text needs",
    )
    parser.add_argument(
        "--by",
        choices=("influence", "divergence"),
        default="influence",
        help="what decides which layers go: how much a layer turns its states, or, slower, how much is "
        "missed without it (default: influence)",
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="do not let what stays make up for what goes",
    )
    parser.add_argument(
        "--recover",
        metavar="MINUTES",
        type=float,
        help="let the smaller generator learn from what it was for so long, on the text of --calibration or "
        "on what that one writes; a run that was cut off goes on when started again",
    )
    parser.add_argument(
        "--adapters",
        choices=("lora", "qlora"),
        help="learn low-rank adapters, which take less memory than all weights; qlora has the weights in NF4 "
        "meanwhile",
    )
    parser.add_argument("--task", metavar="TASK", help="the task, where the checkpoint does not say it")
    parser.add_argument(
        "--eval-text", metavar="FILE", help="text to measure accuracy on, instead of the built-in one"
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="text to calibrate on, instead of what a generator writes itself and the built-in one",
    )
    parser.add_argument("--force", action="store_true", help="replace what lies at DIR")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Prune, write, measure; returns what is also in DIR/pruning.json."""
    from gemini.pruning import prune_checkpoint, summary

    report: dict[str, Any] = prune_checkpoint(
        args.model,
        args.output,
        layers=args.layers,
        experts=args.experts,
        heads=args.heads,
        width=args.width,
        vocabulary=args.vocabulary,
        by=args.by,
        compensate=not args.plain,
        task=args.task,
        calibration=args.calibration,
        eval_text=args.eval_text,
        recover=args.recover,
        adapters=args.adapters,
        force=args.force,
    )
    print(summary(report))
    if learned := report["recovery"]:
        print(f"recovery    {recovery_line(learned)}")
    print(f"\ncheckpoint  {args.output}\nnext        gemini-edge compress {args.output} --output BUNDLE")
    return report
