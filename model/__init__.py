"""Reading foreign checkpoints: a Hugging Face folder, a GGUF file or a catalog name becomes a `Checkpoint`.

    from gemini.model import load_checkpoint
    checkpoint = load_checkpoint("smollm2-135m")

Importing this package is cheap: torch and transformers are imported when a checkpoint is loaded.
"""

from gemini.model.checkpoint import Checkpoint, load_checkpoint
from gemini.model.pooling import Pooling

__all__ = ["Checkpoint", "Pooling", "load_checkpoint"]
