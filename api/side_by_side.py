"""The same function on many inputs at once, each in a process of its own: Ray Tune, if it is installed."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from gemini.errors import UsageError

Run = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]


@contextmanager
def side_by_side(address: str, place: Path) -> Iterator[Run]:
    """A function ``run(work, inputs)``: what ``work`` returns for each, or the exception it ended with.

    ``work`` and the inputs must be picklable. One core for each.

    Args:
        address: "local" starts Ray on this machine; else where a cluster listens, "auto" for the one this
            machine belongs to.
        place: a folder for Ray's own records, which all machines see; removed at the end.

    Raises:
        UsageError: Ray is not installed, or no cluster answers.
    """
    try:
        import ray
        from ray import tune
    except ImportError:
        raise UsageError(
            "Ray Tune is not installed.", "Run: pip install 'gemini-edge[search]', or leave --ray out."
        ) from None
    # Tune would take Ctrl-C for itself and go on with what comes after the trials.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    try:
        ray.init(
            address=None if address == "local" else address,
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # this very class when a node starts too slowly
        raise UsageError(
            f"Ray does not start at {address} ({error}).", "Check the address, or leave --ray out."
        ) from error

    def run(work: Callable[[Any], Any], inputs: Sequence[Any]) -> list[Any]:
        def step(config: dict[str, Any]) -> None:
            tune.report({"answer": work(inputs[config["index"]])})

        tuner = tune.Tuner(
            tune.with_resources(step, {"cpu": 1}),
            param_space={"index": tune.grid_search(list(range(len(inputs))))},
            run_config=tune.RunConfig(storage_path=str(place), verbose=0),
        )
        answers: list[Any] = [None] * len(inputs)
        with redirect_stdout(sys.stderr):  # where progress belongs
            results = tuner.fit()
        for result in results:
            index = result.config["index"]
            answers[index] = result.error if result.error else result.metrics["answer"]
        return answers

    try:
        yield run
    finally:
        ray.shutdown()
        shutil.rmtree(place, ignore_errors=True)
