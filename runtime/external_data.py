"""Which files an ONNX graph would open: a walk over the protobuf wire format, without the onnx package.

onnxruntime itself refuses external data outside the graph's folder; this check also refuses files inside the
folder that the manifest does not list, whose bytes nobody has verified. Field numbers are those of
onnx.proto3.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gemini.runtime.fields import damaged

# message -> {field number: message held by that field}; only the ways that lead to a tensor are listed.
_CHILDREN: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_FIXED = {1: 8, 5: 4}
_KEY = b"location"  # of an entry that makes a tensor external


def external_locations(graph: bytes) -> set[str]:
    """All ``location`` values of external tensors in a serialized ModelProto; BundleError if malformed."""
    values = (value for tensor in _external_tensors(graph) for key, value in tensor if key == _KEY)
    try:
        return {value.decode("utf-8") for value in values}
    except UnicodeDecodeError as error:
        raise damaged("a graph names an external file that is not UTF-8") from error


def external_bytes(graph: bytes) -> int:
    """Bytes of a graph's external tensors, those that lie in one place once."""
    tensors = (dict(tensor) for tensor in _external_tensors(graph))
    places = {(t.get(_KEY), t.get(b"offset", b"0"), t.get(b"length", b"0")) for t in tensors}
    return sum(int(length) for _, _, length in places if length.isdigit())


def _external_tensors(graph: bytes) -> Iterator[list[tuple[bytes, bytes]]]:
    """The (key, value) entries of each external tensor, every one of them: a key may be there twice."""
    pending = [("Model", 0, len(graph))]
    while pending:  # an explicit stack: a hostile graph may nest deeper than Python recurses
        message, start, end = pending.pop()
        entries = []
        for number, low, high in _length_delimited(graph, start, end):
            child = _CHILDREN[message].get(number)
            if child == "Entry":
                texts = {field: graph[i:j] for field, i, j in _length_delimited(graph, low, high)}
                entries.append((texts.get(1, b""), texts.get(2, b"")))
            elif child == "Node" and graph.find(_KEY, low, high) < 0:
                pass  # most have no tensor
            elif child is not None:
                pending.append((child, low, high))
        if entries:
            yield entries


def check_external_data(graph: Path, name: str, listed: frozenset[str]) -> frozenset[str]:
    """The files that tensors of a graph lie in (as ``name``, relative to the bundle); BundleError where one
    is not listed."""
    folder = name.rpartition("/")[0]
    members = set()
    for location in external_locations(graph.read_bytes()):
        member = f"{folder}/{location}" if folder else location
        if member not in listed:
            raise damaged(f"{name} refers to {location[:80]!r}, which the manifest does not list")
        members.add(member)
    return frozenset(members)


def _length_delimited(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, first byte, end) of each length-delimited field of the message data[start:end]."""
    position = start
    while position < end:
        key = data[position]
        if key < 128:  # nearly always; a call costs more than the rest
            position += 1
        else:
            key, position = _varint(data, position, end)
        wire = key & 7
        if wire == 2:
            if position < end and data[position] < 128:
                first = position + 1
                position = first + data[position]
            else:
                size, first = _varint(data, position, end)
                position = first + size
            if position > end:
                raise damaged("a graph file ends inside a field")
            yield key >> 3, first, position
        elif wire == 0:
            _, position = _varint(data, position, end)
        elif wire in _FIXED and position + _FIXED[wire] <= end:
            position += _FIXED[wire]
        else:
            raise damaged("a graph file is not an ONNX model")


def _varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
    raise damaged("a graph file is not an ONNX model")
