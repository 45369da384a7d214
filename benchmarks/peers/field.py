"""Who takes part: bundles on the command line, and peers from a TOML file.

[[peer]]
name = "llama.cpp Q4_0"
adapter = "llama.cpp"
python = "envs/llama/bin/python"     # the interpreter of an environment that has it
model = "models/q4_0.gguf"           # paths are relative to the file's folder
"""

import os
import shutil
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemini.benchmarks.peers.process import ADAPTERS
from gemini.errors import UsageError

OURS = "gemini-edge"
SCRIPTS = {
    OURS: "peer_gemini.py",
    "llama.cpp": "peer_llama_cpp.py",
    "onnxruntime-genai": "peer_ort_genai.py",
    "openvino-genai": "peer_openvino_genai.py",
    "optimum-onnx": "peer_optimum_onnx.py",
    "transformers": "peer_transformers.py",
}
_KEYS = ("name", "adapter", "python", "model")


@dataclass(frozen=True)
class Peer:
    """One row of the comparison; ``command`` starts its adapter."""

    name: str
    adapter: str
    command: tuple[str, ...]
    model: Path

    @property
    def ours(self) -> bool:
        return self.adapter == OURS


def bundle_peers(bundles: Sequence[Path]) -> list[Peer]:
    """Bundles as peers, run by this interpreter."""
    names = [path.resolve().name for path in bundles]
    if len(set(names)) < len(names):
        names = [str(path) for path in bundles]
    command = (sys.executable, str(ADAPTERS / SCRIPTS[OURS]))
    return [
        Peer(f"{OURS} {name}", OURS, command, path.resolve())
        for name, path in zip(names, bundles, strict=True)
    ]


def read_peers(path: Path) -> list[Peer]:
    """The peers of a TOML file. UsageError for a malformed file; a missing interpreter or model is found
    when its row is measured."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"The file {path} cannot be read ({error.strerror}).",
            "`gemini-edge bench --peers help` shows what belongs into it.",
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML ({error}).", "Mend that line.") from None
    entries = data.pop("peer", None)
    if data:
        raise UsageError(f"{path} has the unknown key {min(data)}.", "Use [[peer]] tables only.")
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{path} names no peer.", "Add a [[peer]] table.")
    peers = [_peer(entry, index, path) for index, entry in enumerate(entries, 1)]
    if len({peer.name for peer in peers}) < len(peers):
        raise UsageError(f"Two peers of {path} have the same name.", "Give each a name of its own.")
    return peers


def _peer(entry: Any, index: int, path: Path) -> Peer:
    where = f"Peer {index} of {path}"
    if not isinstance(entry, dict):
        raise UsageError(f"{where} is not a table.", "Write [[peer]].")
    if unknown := set(entry) - set(_KEYS):
        raise UsageError(f"{where} has the unknown key {min(unknown)}.", f"Use {', '.join(_KEYS)}.")
    for key in _KEYS:
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise UsageError(f"{where} has no {key}.", f'Add {key} = "…".')
    if entry["adapter"] not in SCRIPTS:
        raise UsageError(f"{where} has no known adapter.", f"Use one of: {', '.join(SCRIPTS)}.")
    python = os.path.expanduser(entry["python"])
    # Not resolved: the link inside a virtual environment is what makes it one.
    interpreter = shutil.which(python) if os.sep not in python else str(path.parent.absolute() / python)
    model = path.parent.absolute() / Path(entry["model"]).expanduser()
    script = ADAPTERS / SCRIPTS[entry["adapter"]]
    return Peer(entry["name"], entry["adapter"], (interpreter or python, str(script)), model)
