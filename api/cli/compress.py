"""`gemini-edge compress`: from a trained checkpoint to a compressed, measured, verified bundle."""

import argparse
from pathlib import Path
from typing import Any

from gemini.cli.output import columns_of_text, memory_line, recovery_line, results_table, tuning_line
from gemini.errors import UsageError

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
        help="fp32, int8, int8-static, int4, int4-gptq, int4-fast, nf4, or a recipe FILE.toml (default: "
        "int8, or formats chosen layer by layer where a size or a loss is asked of a generator)",
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
        metavar="PATH",
        help="text to calibrate on, instead of what a generator writes itself, or the built-in one; "
        "of an image model a folder of images",
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
        help="what --recover changes beside norms: scales and the codes of 4-bit weights, which takes 16 "
        "bytes a weight, or scales alone (default: codes)",
    )
    parser.add_argument(
        "--kv-cache",
        choices=("int8",),
        help="store keys and values of past tokens in 8 bits: a quarter of the memory, and decoding that is "
        "faster the longer the text; prompts are read more slowly",
    )
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="also write the graphs in half precision, over the same weights: what --device cuda runs",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="of the blocks that cost about as much accuracy as the recipe's, take those that this machine "
        "multiplies fastest with; the recipe's own, a choice for all processors, is recorded beside them",
    )
    parser.add_argument(
        "--memory",
        metavar="GB",
        type=float,
        help="what may be held in memory; weights that would not fit are read from files beside DIR, twice 4 "
        "bytes a weight, which changes nothing but the time (default: what the machine has to spare)",
    )
    parser.add_argument("--force", action="store_true", help="replace a bundle that already lies at DIR")
    search = parser.add_argument_group("search")
    search.add_argument(
        "--search",
        action="store_true",
        help="try recipes beside shares of pruning and keep the best within --max-drop (the fastest), "
        "--max-latency (the most accurate) or both (the smallest); trials, table and plot lie in DIR.search, "
        "where the next search finds them; the exit code is 3 if no trial keeps to the limits",
    )
    search.add_argument(
        "--max-latency",
        metavar="MS",
        type=float,
        help="median milliseconds that a token after the first may take, or, of models that do not "
        "generate, a call with one text of 128 tokens or one picture",
    )
    search.add_argument(
        "--time-limit", metavar="MINUTES", type=float, help="start no further trial after that (default: 60)"
    )
    search.add_argument(
        "--prune-ratios",
        metavar="SHARES",
        help="shares of the feed-forward units to prune (default: 0,0.1,0.2)",
    )
    search.add_argument("--recipes", metavar="RECIPES", help="recipes to try (default: int8,int4,int4-fast)")
    search.add_argument(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const="local",
        help="run trials side by side through Ray Tune, on this machine, or on the cluster at ADDRESS, "
        "whose machines must see MODEL and DIR under the same paths",
    )


def _given(args: argparse.Namespace, names: tuple[str, ...]) -> str | None:
    """The first of these options that was given, as it is written."""
    return next((f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None), None)


def _search(args: argparse.Namespace) -> dict[str, Any]:
    from gemini.search import MINUTES, RATIOS, RECIPES, search_recipes
    from gemini.search_report import table

    if other := _given(args, ("recipe", "target_size", "target_bpw")):
        raise UsageError(f"{other} says what to make, --search looks for it.", "Leave one of them out.")
    for option in ("tune", "gpu"):
        if getattr(args, option):
            raise UsageError(
                f"--{option} is not part of a search.", "Leave it out, and compress the winner with it."
            )
    if other := _given(args, ("recover", "teacher", "learn", "kv_cache", "memory")):
        raise UsageError(
            f"{other} is not part of a search.", "Leave it out, and compress the winner again with it."
        )
    try:
        ratios = [float(each) for each in args.prune_ratios.split(",")] if args.prune_ratios else RATIOS
    except ValueError:
        raise UsageError(
            f"--prune-ratios {args.prune_ratios} are no numbers.", "Write them as 0,0.1,0.2."
        ) from None
    results = search_recipes(
        args.model,
        args.output,
        max_latency=args.max_latency,
        max_drop=args.max_drop,
        time_limit=MINUTES if args.time_limit is None else args.time_limit,
        ratios=ratios,
        recipes=args.recipes.split(",") if args.recipes else RECIPES,
        ray=args.ray,
        task=args.task,
        eval_text=args.eval_text,
        calibration=args.calibration,
        force=args.force,
    )
    print(columns_of_text(table(results)))
    print(f"\nms: for {results['time_of']}\nbundle  {results['bundle']}\nsearch  {results['folder']}")
    return results


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run the pipeline, or a search over it; returns the report."""
    if args.search:
        return _search(args)
    if alone := _given(args, ("max_latency", "time_limit", "prune_ratios", "recipes", "ray")):
        raise UsageError(f"{alone} belongs to --search.", "Add --search, or leave it out.")
    if args.learn and args.recover is None:
        raise UsageError("--learn says what learns, and nothing does.", "Add --recover MINUTES.")
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
        codes=args.learn != "scales",
        kv_cache=args.kv_cache,
        gpu=args.gpu,
        tune=args.tune,
        memory=args.memory,
        force=args.force,
        progress=True,
    )
    print(results_table(report["table"]))
    if plan := report["plan"]:
        counts = ", ".join(f"{count} x {name}" for name, count in plan["formats"].items())
        bits = f"{plan['bits_per_weight']:.2f} bits a weight"
        print(f"\nplan    {bits}: {counts} (plans made: {plan['attempts']})")
    if tuning := report["tuning"]:
        print(f"\ntuned   {tuning_line(tuning)}")
    if learned := report["recovery"]:
        print(f"\nlearned {recovery_line(learned)}")
    if report["memory"]["weights_on_disk"]:
        print(f"\nmemory  {memory_line(report['memory'])}")
    print(f"\nbundle  {args.output}\nreport  {Path(args.output) / 'report.html'}")
    return report
