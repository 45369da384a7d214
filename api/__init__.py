"""gemini-edge: compress a trained Transformer, prove it, run it without torch.

import gemini
model = gemini.load_model("gemini-nano")
print(model.generate_text(prompt="Once upon a time", max_length=100))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemini.facade import Model as Model
    from gemini.facade import load_image as load_image
    from gemini.facade import load_model as load_model

# Imported when first asked for: `import gemini` costs nothing, and only the classes of training need torch.
_LAZY = {
    "Model": "gemini.facade",
    "load_image": "gemini.facade",
    "load_model": "gemini.facade",
    "GeminiConfig": "gemini.model.gemini",
    "GeminiForConditionalGeneration": "gemini.model.gemini",
    "GeminiForSequenceClassification": "gemini.model.gemini",
    "GeminiImageProcessor": "gemini.model.gemini",
    "GeminiModel": "gemini.model.gemini",
    "GeminiTokenizer": "gemini.model.gemini",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    # Reading the installed version costs 40 ms, more than the runtime's own import: only when asked for.
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("gemini-edge")
        except PackageNotFoundError:  # a source tree that was never installed
            return "0+unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
