"""OpenVINO IR files as text and bytes: safe reading, and patching of constants in place.

``ov.save_model`` rewrites even a graph nobody edited. So where only constants change, the pair of files is
patched: the ``.bin`` at the offsets that the ``.xml`` states, the ``.xml`` not at all (unless constants that
shared bytes part ways: then the number of the offset).
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.parsers import expat

from pot_sparsity.errors import ModelError, OutputError

#: Alignment of data appended to a ``.bin``, in bytes.
ALIGNMENT = 64

_BITS = (
    dict.fromkeys(("f64", "i64", "u64"), 64)
    | dict.fromkeys(("f32", "i32", "u32"), 32)
    | dict.fromkeys(("f16", "bf16", "i16", "u16"), 16)
    | dict.fromkeys(("i8", "u8", "boolean", "f8e4m3", "f8e5m2", "f8e8m0"), 8)
    | dict.fromkeys(("i4", "u4", "nf4", "f4e2m1"), 4)
)
_ATTRIBUTE = re.compile(rb"\s+([\w:.\-]+)\s*=\s*(?:\"([^\"]*)\"|'([^']*)')")
_DECLARATION = re.compile(rb"<!\s*(DOCTYPE|ENTITY)", re.IGNORECASE)


@dataclass(frozen=True)
class IrConstant:
    """A ``Const`` layer of an IR.

    Attributes
    ----------
    name
        Of the layer; not necessarily unique.
    offset, size
        Place of its bytes in the ``.bin``.
    span
        Where in the ``.xml`` the digits of the offset stand (begin, end).
    nested
        Whether it belongs to the body of an If, Loop or TensorIterator.
    """

    name: str
    offset: int
    size: int
    span: tuple[int, int]
    nested: bool


@dataclass(frozen=True)
class IrFile:
    """An IR whose two files belong together: every constant lies within the ``.bin``.

    Attributes
    ----------
    xml_path, bin_path
        The files.
    xml
        Content of the ``.xml``.
    constants
        In the order of the ``.xml``, bodies of If, Loop and TensorIterator included.
    stamp
        Size and time of modification of the ``.bin`` when it was checked; None if there was none.
    """

    xml_path: Path
    bin_path: Path
    xml: bytes
    constants: tuple[IrConstant, ...]
    stamp: tuple[int, int] | None

    def weights(self) -> bytes | None:
        """Content of the ``.bin``; None if it is not the file any more that was checked."""
        if _stamp(self.bin_path) != self.stamp:
            return None
        return b"" if self.stamp is None else self.bin_path.read_bytes()


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def read_ir(path: Path) -> IrFile:
    """Read and check an IR without running any of it; ModelError says what is wrong in one line."""
    try:
        xml = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}): check the path and its permissions"
        ) from error
    constants = tuple(_Scanner(path, xml).constants)
    bin_path = path.with_suffix(".bin")
    needed = max((c.offset + c.size for c in constants), default=0)
    stamp = _stamp(bin_path) if bin_path.is_file() else None
    if stamp is None:
        if needed:
            raise ModelError(
                f"{path}: its weights file {bin_path.name} is missing: put it beside the .xml "
                "file, as it was exported"
            )
    elif stamp[0] < needed:
        raise ModelError(
            f"{bin_path}: holds {stamp[0]} bytes but {path.name} needs {needed}: the file is "
            "truncated or belongs to another model; copy or export both files again"
        )
    return IrFile(path, bin_path, xml, constants, stamp)


class _Scanner:
    """Collects the constants of an IR in one pass of a parser that resolves no entities."""

    def __init__(self, path: Path, xml: bytes) -> None:
        self.constants: list[IrConstant] = []
        self._path = path
        self._xml = xml
        self._layers = 0
        self._stack: list[str] = []
        self._layer: list[tuple[str, str]] = []
        declaration = _DECLARATION.search(xml)
        if declaration is not None:
            self._refuse_declaration(declaration.group(1).decode().upper())
        if not _is_utf8(xml):
            raise ModelError(f"{path}: is not XML in UTF-8: {_ADVICE}")
        self._parser = expat.ParserCreate("utf-8")
        self._parser.StartDoctypeDeclHandler = lambda *_: self._refuse_declaration("DOCTYPE")
        self._parser.EntityDeclHandler = lambda *_: self._refuse_declaration("ENTITY")
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        try:
            self._parser.Parse(xml, True)
        except expat.ExpatError as error:
            raise ModelError(f"{path}: is not well-formed XML ({error}): {_ADVICE}") from error
        if not self._layers:
            raise ModelError(f"{path}: holds no layers, so it is no OpenVINO model: {_ADVICE}")

    def _refuse_declaration(self, word: str) -> None:
        raise ModelError(
            f"{self._path}: declares <!{word}>, which no OpenVINO model needs and which can be an attack: "
            "refused; export the model again"
        )

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        if not self._stack and tag != "net":
            raise ModelError(
                f"{self._path}: its root is <{tag}>, not <net>, so it is no OpenVINO model: {_ADVICE}"
            )
        if tag == "layer":
            self._layers += self._stack[-1:] == ["layers"]
            self._layer.append((attributes.get("type", ""), attributes.get("name", "")))
        elif tag == "data" and self._stack[-1:] == ["layer"] and self._layer[-1][0] == "Const":
            self.constants.append(self._constant(attributes))
        self._stack.append(tag)

    def _end(self, tag: str) -> None:
        self._stack.pop()
        if tag == "layer":
            self._layer.pop()

    def _constant(self, attributes: Mapping[str, str]) -> IrConstant:
        name = self._layer[-1][1]
        numbers = [attributes.get("offset", ""), attributes.get("size", "")]
        if not all(re.fullmatch(r"[0-9]{1,18}", text) for text in numbers):
            raise ModelError(
                f"{self._path}: constant {name!r} has offset {numbers[0]!r} and size {numbers[1]!r}, which "
                "are no place in a file: the model is damaged, export it again"
            )
        offset, size = map(int, numbers)
        expected = _bytes_of(attributes.get("element_type", ""), attributes.get("shape", ""))
        if expected is not None and expected != size:
            raise ModelError(
                f"{self._path}: constant {name!r} states {size} bytes but its shape needs {expected}: the "
                "model is damaged, export it again"
            )
        span = _offset_span(self._xml, self._parser.CurrentByteIndex)
        return IrConstant(name, offset, size, span, nested=len(self._layer) > 1)


def _is_utf8(text: bytes) -> bool:
    try:
        return "\0" not in text.decode("utf-8")
    except UnicodeDecodeError:
        return False


_ADVICE = "give the .xml file that ov.save_model wrote"


def _bytes_of(element_type: str, shape: str) -> int | None:
    bits = _BITS.get(element_type.lower())
    dims = [dim.strip() for dim in shape.split(",") if dim.strip()]
    if bits is None or not all(re.fullmatch(r"[0-9]{1,18}", dim) for dim in dims):
        return None
    return -(-math.prod(map(int, dims)) * bits // 8)


def _offset_span(xml: bytes, begin: int) -> tuple[int, int]:
    """Where the value of the attribute ``offset`` stands in the tag that begins at ``begin``."""
    position = begin + len(b"<data")
    while match := _ATTRIBUTE.match(xml, position):
        if match.group(1) == b"offset":
            return match.span(2) if match.group(2) is not None else match.span(3)
        position = match.end()
    raise ValueError(f"the tag at byte {begin} has no attribute 'offset'")


def match_constant(ir: IrFile, weights: bytes | memoryview, name: str, stored: bytes) -> IrConstant | None:
    """The layer of that name whose bytes are ``stored``; None unless there is exactly one."""
    found = [
        c
        for c in ir.constants
        if c.name == name and not c.nested and weights[c.offset : c.offset + c.size] == stored
    ]
    return found[0] if len(found) == 1 else None


def patch(ir: IrFile, weights: bytes, changes: Sequence[tuple[IrConstant, bytes]]) -> tuple[bytes, bytes]:
    """New ``(xml, bin)`` of an IR with other bytes in some constants; every other byte stays as it is.

    Constants may share bytes of the ``.bin``. They are replaced in place where all constants that read them
    agree on the result; a constant that wants other bytes than its neighbours gets its own at the end of the
    file, and its offset in the XML is changed.

    Raises
    ------
    ValueError
        If a new value has another size than the old one.
    """
    wanted = dict(changes)
    for constant, data in changes:
        if len(data) != constant.size:
            raise ValueError(f"constant {constant.name!r} holds {constant.size} bytes, not {len(data)}")
    result = bytearray(weights)
    moved: list[tuple[IrConstant, bytes]] = []
    for constant, data in changes:
        if _agreed(ir, constant, data, wanted):
            result[constant.offset : constant.offset + constant.size] = data
        else:
            moved.append((constant, data))
    offsets: dict[tuple[int, int], bytes] = {}
    appended: dict[bytes, int] = {}
    for constant, data in moved:
        if data not in appended:
            result.extend(bytes(-len(result) % ALIGNMENT))
            appended[data] = len(result)
            result.extend(data)
        offsets[constant.span] = str(appended[data]).encode()
    return _replace_spans(ir.xml, offsets), bytes(result)


def _agreed(ir: IrFile, constant: IrConstant, data: bytes, wanted: Mapping[IrConstant, bytes]) -> bool:
    """Whether every constant that overlaps ``constant`` is the same range and wants the same bytes."""
    end = constant.offset + constant.size
    for other in ir.constants:
        if other.offset < end and constant.offset < other.offset + other.size:
            same = (other.offset, other.size) == (constant.offset, constant.size)
            if not same or wanted.get(other) != data:
                return False
    return True


def _replace_spans(text: bytes, replacements: Mapping[tuple[int, int], bytes]) -> bytes:
    pieces: list[bytes] = []
    position = 0
    for (begin, end), new in sorted(replacements.items()):
        pieces += [text[position:begin], new]
        position = end
    return b"".join([*pieces, text[position:]])


def write_pair(folder: Path, stem: str, write: Callable[[Path], None]) -> list[Path]:
    """Let ``write`` make an IR in a temporary folder, check it and give both files their final names.

    Parameters
    ----------
    folder, stem
        The files become ``folder/stem.xml`` and ``folder/stem.bin``.
    write
        Is given the path of the ``.xml``; writes it and the ``.bin`` beside it.

    Raises
    ------
    OutputError
        A file cannot be written completely; nothing is left behind.
    """
    names = [f"{stem}.xml", f"{stem}.bin"]
    try:
        with tempfile.TemporaryDirectory(prefix=f".{stem}.", suffix=".tmp", dir=folder) as temporary:
            files = [Path(temporary) / name for name in names]
            write(files[0])
            files[1].touch()
            for file in files:
                _flush(file)
            # A writer that met a full disk may not have said so.
            read_ir(files[0])
            for file, name in reversed(list(zip(files, names, strict=True))):
                os.replace(file, folder / name)
    except (OSError, RuntimeError, ModelError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "the files are incomplete"
        raise OutputError(
            f"cannot write {folder / names[0]}: {why}: free some space or choose another folder"
        ) from error
    return [folder / name for name in names]


def _flush(path: Path) -> None:
    """Force a file to disk, so that a full disk shows before the file gets its final name."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
