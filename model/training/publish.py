"""A finished run as it is published: half precision, its card, nothing to resume from.

python -m gemini.model.training.publish RUN FOLDER
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch

from gemini.errors import CheckpointError, UsageError
from gemini.model.training.start import load_checkpoint, save_final

_SIDE = ("training.json", "README.md")


def publish(run: Path, folder: Path) -> None:
    """Write the run's model in fp16, tokenizer, summary and card to a new ``folder``.

    Batch norms keep their statistics within fp16's range: a value beyond it is refused (CheckpointError).
    """
    if folder.exists():
        raise UsageError(f"{folder} exists.", "Choose a new folder, or remove it.")
    model, tokenizer = load_checkpoint(run)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.half().isfinite().all():
            raise CheckpointError(f"{name} does not fit into fp16.", "Publish the run's folder itself.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch) / folder.name
        save_final(model.to(torch.float16), tokenizer, made)
        for name in _SIDE:
            if (run / name).is_file():
                shutil.copyfile(run / name, made / name)
        made.rename(folder)


def main(arguments: list[str]) -> None:
    """Publish one run."""
    from gemini.model.offline import import_transformers

    import_transformers()
    publish(*map(Path, arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
