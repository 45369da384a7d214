"""What this project trained itself: a folder a model, with its checkpoint and its bundle."""

from pathlib import Path

SHIPPED = ("gemini-nano",)


def shipped_bundle(name: str) -> Path:
    """The folder of the bundle that comes with the package; an installation may have left it out."""
    return Path(__file__).parent / name / "bundle"
