"""`gemini-edge compress`: from a trained checkpoint to a compressed, measured, verified bundle."""

import argparse
from pathlib import Path
from typing import Any

from gemini.cli.output import recovery_line, results_table

HELP = "Compress a checkpoint into a bundle, with the accuracy it lost and the report that shows it."
EXAMPLE = "gemini-edge compress smollm2-135m --recipe int4 --output bundles/smollm2 --max-drop 20"
TASKS = (
    "text-generation",
    "text-classification",
    "feature-extraction",
    "image-classification",
    "text2text-generation",
    "image-to-text",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `compress`."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a Hugging Face folder with safetensors, a .gguf file, "
        "or a catalog name (gemini-nano, smollm2-135m, all-minilm-l6-v2)",
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="the bundle to write")
    parser.add_argument(
        "--recipe",
        metavar="RECIPE",
        help="fp32, int8, int4, nf4, or a recipe FILE.toml (default: int8, or formats chosen layer by layer "
        "where a size or a loss is asked of a generator)",
    )
    parser.add_argument(
        "--target-size",
        metavar="MB",
        type=float,
        help="choose formats layer by layer so that the bundle has at most that size",
    )
    parser.add_argument(
        "--target-bpw",
        metavar="BITS",
        type=float,
        help="choose formats layer by layer so that a weight costs that many bits on average",
    )
    parser.add_argument("--task", choices=TASKS, help="the task, where the checkpoint does not say it")
    parser.add_argument(
        "--eval-text", metavar="FILE", help="text to measure accuracy on, instead of the built-in one"
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="text to calibrate on, instead of what a generator writes itself, or the built-in one",
    )
    parser.add_argument(
        "--max-drop",
        metavar="PERCENT",
        type=float,
        help="the loss of accuracy against fp32 that is allowed; without --recipe, formats of a generator "
        "are raised until it holds; else the bundle is set aside as DIR.rejected and the exit code is 3",
    )
    parser.add_argument(
        "--recover",
        metavar="MINUTES",
        type=float,
        help="let the compressed generator learn from the uncompressed one for so long, on the text of "
        "--calibration or on what that one writes; a run that was cut off goes on when started again",
    )
    parser.add_argument(
        "--teacher",
        metavar="MODEL",
        help="the model to learn from instead, such as the one that MODEL was pruned from",
    )
    parser.add_argument(
        "--learn",
        choices=("codes", "scales"),
        default="codes",
        help="what --recover changes beside norms: scales and the codes of 4-bit weights, which takes 16 "
        "bytes a weight, or scales alone (default: codes)",
    )
    parser.add_argument("--force", action="store_true", help="replace a bundle that already lies at DIR")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run the pipeline; returns its report."""
    from gemini.pipeline import compress_model

    report: dict[str, Any] = compress_model(
        args.model,
        args.output,
        args.recipe,
        task=args.task,
        eval_text=args.eval_text,
        calibration=args.calibration,
        target_size=args.target_size,
        target_bpw=args.target_bpw,
        max_drop=args.max_drop,
        recover=args.recover,
        teacher=args.teacher,
        codes=args.learn == "codes",
        force=args.force,
        progress=True,
    )
    print(results_table(report["table"]))
    if plan := report["plan"]:
        counts = ", ".join(f"{count} x {name}" for name, count in plan["formats"].items())
        bits = f"{plan['bits_per_weight']:.2f} bits a weight"
        print(f"\nplan    {bits}: {counts} (plans made: {plan['attempts']})")
    if learned := report["recovery"]:
        print(f"\nlearned {recovery_line(learned)}")
    print(f"\nbundle  {args.output}\nreport  {Path(args.output) / 'report.html'}")
    return report
