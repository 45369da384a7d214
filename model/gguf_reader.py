"""What transformers reads from a checked GGUF file: its configuration, and the file itself only once."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemini.errors import CheckpointError
from gemini.model.gguf import GgufHeader
from gemini.model.offline import first_line, import_transformers


def read_config(path: Path, header: GgufHeader) -> Any:
    """The transformers configuration of a checked GGUF; its ``architectures`` name the causal language model.

    Raises:
        CheckpointError: transformers does not read this architecture from GGUF.
    """
    transformers = import_transformers()
    name = header.metadata["general.architecture"]
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True
        )
        causal = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    except Exception as error:  # any type: metadata of a wrong type fails anywhere in the mapping
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot read the architecture {name!r} from GGUF: "
            f"{first_line(error)}.",
            "Pass the original Hugging Face folder (safetensors) of this model.",
        ) from error
    if causal is None:
        raise CheckpointError(
            f"The architecture {name!r} is not a decoder that generates text.",
            "Pass the original Hugging Face folder (safetensors) of this model.",
        )
    config.architectures = [causal.__name__]
    return config


def loading_options(path: Path) -> dict[str, Any]:
    """Arguments for ``from_pretrained`` that give plain fp32 tensors, never packed ones."""
    packing = getattr(import_transformers(), "GgufConfig", None)  # earlier releases of 5 always unpack
    extra = {} if packing is None else {"quantization_config": packing(dequantize=True)}
    return {"gguf_file": path.name, **extra}


@contextmanager
def one_reader(path: Path) -> Iterator[None]:
    """Inside the context, transformers parses this file once and looks up tensor names once.

    It would build a ``gguf.GGUFReader`` three times, on a memory map that is three times slower to slice
    than an array, and the table of tensor names once for every module of the model: together more than half
    of the time to load SmolLM2-135M. What is read stays the same.

    Raises:
        CheckpointError: the gguf library refuses the file.
    """
    import gguf
    import numpy as np

    reader_class, name_map = gguf.GGUFReader, gguf.get_tensor_name_map

    class PlainReader(reader_class):  # type: ignore[misc, valid-type]
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, value: Any) -> None:
            self._plain = np.asarray(value)

    try:
        reader = PlainReader(str(path))
    except Exception as error:  # any type: the library indexes and converts without checks of its own
        raise CheckpointError(
            f"The gguf library cannot read {path.name}: {first_line(error)}.",
            "Copy or download the file again.",
        ) from error

    def shared(file: Any, *arguments: Any, **options: Any) -> Any:
        same = Path(file).resolve() == path.resolve()
        return reader if same else reader_class(file, *arguments, **options)

    library: Any = gguf  # transformers takes both names from the module at each call
    library.GGUFReader, library.get_tensor_name_map = shared, functools.cache(name_map)
    try:
        yield
    finally:
        library.GGUFReader, library.get_tensor_name_map = reader_class, name_map


def further_end_tokens(header: GgufHeader) -> tuple[int, ...]:
    """End-of-turn and end-of-message tokens that GGUF keeps beside the end of text."""
    keys = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    return tuple(value for key in keys if isinstance(value := header.metadata.get(key), int))
