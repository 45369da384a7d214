"""gemini-edge: compress a trained Transformer, prove it, run it without torch."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("gemini-edge")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0+unknown"
