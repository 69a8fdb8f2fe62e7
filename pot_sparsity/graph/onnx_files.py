"""Reading ONNX files that nobody vouches for, and writing them so that no final name is half written.

A model file is untrusted: external data may only lie in the model's own folder, every tensor must hold
exactly the bytes its shape asks for, and whatever is wrong ends in one
:class:`~pot_sparsity.errors.ModelError` line.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import TensorProto

from pot_sparsity.errors import ModelError, OutputError

#: Models whose tensors hold more bytes than this do not fit into one protobuf message (2 GiB).
PROTOBUF_LIMIT = 1_900_000_000
#: Tensors below this size stay in the model file when the others go to a data file.
EXTERNAL_THRESHOLD = 1024
_ALIGNMENT = 4096
_HALF_BYTE = (TensorProto.UINT4, TensorProto.INT4, TensorProto.FLOAT4E2M1)
_QUARTER_BYTE = (TensorProto.UINT2, TensorProto.INT2)
#: Types whose packing is not fixed by their numpy item size.
_UNSIZED = (TensorProto.FLOAT6E2M3, TensorProto.FLOAT6E3M2)


def read_proto(path: Path) -> tuple[onnx.ModelProto, bool]:
    """Parse and check an ONNX file.

    Returns
    -------
    tuple
        The model with all its data in memory, and whether some of it came from other files.

    Raises
    ------
    ModelError
        The file is missing, is no ONNX model, is cut off, or has external data that is missing or unsafe.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read the model {path}: {error.strerror}") from error
    proto = _parse(data, path)
    check_proto(proto, str(path))
    external = has_external_data(proto)
    if external:
        load_external_data(proto, path)
    check_tensors(proto, str(path))
    return proto, external


def _parse(data: bytes, path: Path) -> onnx.ModelProto:
    start = data[:64].lstrip()
    if not data:
        raise ModelError(f"{path} is empty, not an ONNX model: export or download it again")
    if start.startswith(b"<"):
        raise ModelError(f"{path} is a web page or XML file, not an ONNX model: download the model itself")
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a Git LFS pointer, not an ONNX model: fetch it with `git lfs pull`")
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        if _is_cut_off(data):
            raise ModelError(f"{path} is truncated: export or copy the ONNX model again") from error
        raise ModelError(f"{path} is not an ONNX model: it cannot be parsed") from error
    return proto


def _is_cut_off(data: bytes) -> bool:
    """Whether the bytes read as fields of a ModelProto of which the last one runs past the end."""
    descriptor = onnx.ModelProto.DESCRIPTOR
    position = fields = 0
    while position < len(data):
        tag, position = _varint(data, position)
        field = descriptor.fields_by_number.get(tag >> 3)
        wire = tag & 7
        if field is None or wire != (0 if field.type == field.TYPE_INT64 else 2):
            return False
        size, position = _varint(data, position)
        if wire == 2:
            position += size
        fields += 1
        if position > len(data):
            return fields > 1
    return False


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A protobuf variable-length integer and the position after it (past the end if it is cut off)."""
    value = 0
    for step in range(10):
        if position + step >= len(data):
            break
        byte = data[position + step]
        value |= (byte & 0x7F) << (7 * step)
        if byte < 0x80:
            return value, position + step + 1
    return value, len(data) + 1


def check_proto(proto: onnx.ModelProto, where: str) -> None:
    """Raise ModelError unless the message is a model this package can work on; ``where`` names it."""
    if not proto.HasField("graph") or proto.ir_version <= 0 or not proto.graph.node:
        raise ModelError(f"{where} is not an ONNX model, or it is truncated: it holds no graph")
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"{where} has ONNX IR version {proto.ir_version}; the installed onnx reads up to "
            f"{onnx.IR_VERSION}: update onnx or export the model for an older one"
        )
    versions = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    newest = onnx.defs.onnx_opset_version()
    if not proto.opset_import:
        raise ModelError(f"{where} declares no opset: it is truncated or was not exported completely")
    if any(not 1 <= version <= newest for version in versions):
        raise ModelError(
            f"{where} uses ONNX opset {max(versions)}; the installed onnx knows 1 to {newest}: "
            "update onnx or export the model with an older opset"
        )
    if not proto.graph.output:
        raise ModelError(f"{where} has no graph outputs: export the model again")
    if any(True for graph in graphs_of(proto) if graph.sparse_initializer):
        raise ModelError(
            f"{where} stores weights as sparse initializers, which are not supported: "
            "export the model with dense weights"
        )


def graphs_of(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and all graphs nested in node attributes."""
    yield proto.graph
    yield from _nested_graphs(proto.graph.node)
    for function in proto.functions:
        yield from _nested_graphs(function.node)


def _nested_graphs(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    for node in nodes:
        for graph in subgraphs(node):
            yield graph
            yield from _nested_graphs(graph.node)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Graphs that a node holds in its attributes (If, Loop, Scan)."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def tensors_of(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    """All tensors the model stores: initializers and attributes, nested graphs and functions included."""
    graphs = list(graphs_of(proto))
    for graph in graphs:
        yield from graph.initializer
    for owner in (*graphs, *proto.functions):
        for node in owner.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.TENSOR:
                    yield attribute.t
                elif attribute.type == onnx.AttributeProto.TENSORS:
                    yield from attribute.tensors


def has_external_data(proto: onnx.ModelProto) -> bool:
    """Whether some tensor's data lies in another file."""
    return any(tensor.data_location == TensorProto.EXTERNAL for tensor in tensors_of(proto))


def stored_bytes(tensor: TensorProto) -> int | None:
    """Bytes that the shape and type of a tensor ask for; None where the type does not fix them (strings)."""
    count: int = prod(tensor.dims)
    if tensor.data_type in _HALF_BYTE:
        return (count + 1) // 2
    if tensor.data_type in _QUARTER_BYTE:
        return (count + 3) // 4
    if tensor.data_type == TensorProto.STRING or tensor.data_type in _UNSIZED:
        return None
    return count * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def total_bytes(proto: onnx.ModelProto) -> int:
    """Bytes of all tensors together."""
    return sum(stored_bytes(tensor) or 0 for tensor in tensors_of(proto))


def check_tensors(proto: onnx.ModelProto, where: str) -> None:
    """Raise ModelError if a tensor in memory holds more or less data than its shape says."""
    for tensor in tensors_of(proto):
        _check_header(tensor, where)
        expected = stored_bytes(tensor)
        if expected is None:
            continue
        if tensor.HasField("raw_data"):
            found, wanted, unit = len(tensor.raw_data), expected, "bytes"
        else:
            field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
            found, wanted, unit = len(getattr(tensor, field)), prod(tensor.dims), "values"
            if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
                wanted *= 2
            elif tensor.data_type in (*_HALF_BYTE, *_QUARTER_BYTE):
                wanted = expected
        if found != wanted:
            raise ModelError(
                f"{where}: tensor {tensor.name!r} of shape {tuple(tensor.dims)} needs {wanted} {unit} but "
                f"holds {found}: the model is truncated or damaged, export it again"
            )


def _check_header(tensor: TensorProto, where: str) -> None:
    if tensor.data_type not in TensorProto.DataType.values() or tensor.data_type == TensorProto.UNDEFINED:
        raise ModelError(f"{where}: tensor {tensor.name!r} has no known type ({tensor.data_type})")
    if any(dim < 0 for dim in tensor.dims):
        raise ModelError(f"{where}: tensor {tensor.name!r} has the impossible shape {tuple(tensor.dims)}")


def load_external_data(proto: onnx.ModelProto, path: Path) -> None:
    """Read external data into ``proto``, refusing every file outside the folder of ``path``."""
    for tensor in tensors_of(proto):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        _check_header(tensor, str(path))
        entries = {entry.key: entry.value for entry in tensor.external_data}
        file = _external_file(entries.get("location", ""), tensor.name, path)
        where = f"{path}: external data of tensor {tensor.name!r}"
        expected = stored_bytes(tensor)
        try:
            offset = int(entries.get("offset") or 0)
            length = int(entries.get("length") or expected or 0)
        except ValueError as error:
            raise ModelError(f"{where} has an offset or length that is no number: export it again") from error
        if expected is None or offset < 0 or length != expected:
            raise ModelError(f"{where}: shape {tuple(tensor.dims)} needs {expected} bytes, not {length}")
        try:
            with file.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                if offset + length > size:
                    raise ModelError(
                        f"{where} runs past the end of {file.name} ({offset + length} of {size} bytes): "
                        "the file is truncated or belongs to another model"
                    )
                stream.seek(offset)
                tensor.raw_data = stream.read(length)
        except OSError as error:
            raise ModelError(f"{where}: cannot read {file}: {error.strerror}") from error
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")


def _external_file(location: str, tensor: str, path: Path) -> Path:
    """The data file, which must be a regular file inside the model's folder, symbolic links followed."""
    where = f"{path}: external data of tensor {tensor!r}"
    pure = PureWindowsPath(location)
    if not location or PurePosixPath(location).is_absolute() or pure.anchor or ".." in pure.parts:
        raise ModelError(
            f"{where} points outside the model's folder ({location!r}); refused: "
            "keep the data beside the model"
        )
    folder = path.parent.resolve()
    file = (folder / location).resolve()
    if not file.is_relative_to(folder):
        raise ModelError(
            f"{where} is a link that leaves the model's folder ({location!r} -> {file}); refused: "
            "copy the data beside the model"
        )
    if not file.is_file():
        raise ModelError(f"{where}: the file {location!r} is missing from {path.parent}: copy it there")
    return file


def write_proto(proto: onnx.ModelProto, folder: Path, stem: str, *, external: bool) -> list[Path]:
    """Write ``<stem>.onnx`` and, if asked for or needed for the size, ``<stem>.onnx.data`` into ``folder``.

    Returns
    -------
    list of Path
        The model file first.

    Raises
    ------
    OutputError
        A file cannot be written; nothing is left behind.
    """
    names = [f"{stem}.onnx"]
    if external or total_bytes(proto) > PROTOBUF_LIMIT:
        names.append(f"{names[0]}.data")
    with _appear_complete(folder, names) as files:
        if len(files) == 2:
            with files[1].open("xb") as stream:
                proto = _externalized(proto, names[1], stream)
                _flush(stream)
        try:
            data = proto.SerializeToString()
        except (EncodeError, ValueError) as error:
            raise OutputError(f"{folder / names[0]} does not fit into one ONNX file: {error}") from error
        with files[0].open("xb") as stream:
            stream.write(data)
            _flush(stream)
    return [folder / name for name in names]


def _externalized(proto: onnx.ModelProto, location: str, stream: BinaryIO) -> onnx.ModelProto:
    """A copy of ``proto`` whose large tensors lie in ``stream``."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    for tensor in tensors_of(result):
        size = stored_bytes(tensor)
        if size is None or size < EXTERNAL_THRESHOLD:
            continue
        if not tensor.HasField("raw_data"):
            stored = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor))
            tensor.ClearField(onnx.helper.tensor_dtype_to_field(tensor.data_type))
            tensor.raw_data = stored.raw_data
        stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
        onnx.external_data_helper.set_external_data(tensor, location, stream.tell(), size)
        stream.write(tensor.raw_data)
        tensor.ClearField("raw_data")
    return result


def _flush(stream: BinaryIO) -> None:
    """Force the data to disk, so that a full disk shows before the file gets its final name."""
    stream.flush()
    os.fsync(stream.fileno())


@contextmanager
def _appear_complete(folder: Path, names: Sequence[str]) -> Iterator[list[Path]]:
    """Temporary files that are renamed to ``names`` when the block ends well, the first name last."""
    token = uuid.uuid4().hex[:12]
    temporary = [folder / f".{name}.{token}.tmp" for name in names]
    try:
        yield temporary
        for file, name in reversed(list(zip(temporary, names, strict=True))):
            os.replace(file, folder / name)
    except OSError as error:
        raise OutputError(
            f"cannot write {folder / names[0]}: {error.strerror or error}: "
            "free some space or choose another folder"
        ) from error
    finally:
        for file in temporary:
            with suppress(OSError):
                file.unlink(missing_ok=True)
