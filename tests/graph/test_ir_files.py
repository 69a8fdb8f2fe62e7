from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.errors import ModelError, OutputError
from pot_sparsity.graph.ir_files import (
    ALIGNMENT,
    IrConstant,
    IrFile,
    match_constant,
    patch,
    read_ir,
    write_pair,
)

HEAD = '<?xml version="1.0"?>\n<net name="n" version="11">\n<layers>\n'
TAIL = "</layers>\n<edges/>\n</net>\n"


def const(name: str, offset: object, size: object, shape: object, element_type: str = "u8") -> str:
    return (
        f'<layer id="0" name="{name}" type="Const" version="opset1">\n'
        f'  <data element_type="{element_type}" shape="{shape}" offset="{offset}" size="{size}" />\n'
        "</layer>\n"
    )


def write(folder: Path, layers: str, weights: bytes | None = b"", name: str = "m") -> Path:
    path = folder / f"{name}.xml"
    path.write_text(HEAD + layers + TAIL)
    if weights is not None:
        path.with_suffix(".bin").write_bytes(weights)
    return path


def test_constants_are_found_with_the_place_of_their_offset(tmp_path: Path) -> None:
    body = f"<body><layers>{const('inner', 2, 1, 1)}</layers></body>"
    tricky = (
        '<layer id="9" name="odd" type="Const" version="opset1">'
        "<data note=\" offset='7' \" element_type='f32' shape='' offset = '4' size='4'/></layer>"
    )
    loop = f'<layer id="3" name="loop" type="Loop" version="opset5"><data offset="99"/>{body}</layer>'
    ir = read_ir(write(tmp_path, const("é", 0, 2, "2") + loop + tricky, bytes(8)))
    assert [(c.name, c.offset, c.size, c.nested) for c in ir.constants] == [
        ("é", 0, 2, False),
        ("inner", 2, 1, True),
        ("odd", 4, 4, False),
    ]
    assert [ir.xml[slice(*c.span)] for c in ir.constants] == [b"0", b"2", b"4"]
    assert ir.weights() == bytes(8)


def test_a_bin_that_changed_is_not_used(tmp_path: Path) -> None:
    ir = read_ir(write(tmp_path, const("a", 0, 2, 2), b"ab"))
    ir.bin_path.write_bytes(b"abc")
    assert ir.weights() is None


def test_an_ir_without_constants_needs_no_bin(tmp_path: Path) -> None:
    layer = '<layer id="0" name="x" type="Parameter" version="opset1"/>'
    assert read_ir(write(tmp_path, layer, None)).weights() == b""


@pytest.mark.parametrize(
    ("layers", "weights", "text"),
    [
        (const("a", 0, 4, 4), None, "its weights file m.bin is missing: put it beside the .xml file"),
        (const("a", 2, 4, 4), b"12345", "holds 5 bytes but m.xml needs 6: the file is truncated"),
        (const("a", -1, 4, 4), bytes(9), "constant 'a' has offset '-1' and size '4', which are no place"),
        (const("a", 0, "x", 4), bytes(9), "constant 'a' has offset '0' and size 'x', which are no place"),
        (const("a", 0, 4, "4,2"), bytes(9), "constant 'a' states 4 bytes but its shape needs 8"),
        ("", b"", "holds no layers, so it is no OpenVINO model"),
        ("<layer", b"", "is not well-formed XML"),
    ],
)
def test_damaged_ir_is_refused(tmp_path: Path, layers: str, weights: bytes | None, text: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_ir(write(tmp_path, layers, weights))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


BOMB = '<!DOCTYPE net [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>'


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (f'<?xml version="1.0"?>{BOMB}<net><layers>&b;</layers></net>'.encode(), "declares <!DOCTYPE>"),
        (f'<?xml version="1.0"?>{BOMB.lower()}<net/>'.encode(), "declares <!DOCTYPE>"),
        (f'<?xml version="1.0" encoding="utf-16"?>{BOMB}<net/>'.encode("utf-16"), "is not XML in UTF-8"),
        (
            f'<?xml version="1.0" encoding="utf-16"?>{BOMB}<net/>'.encode("utf-16-le"),
            "is not XML in UTF-8",
        ),
        (b"<html><layers/></html>", "its root is <html>, not <net>"),
        (b"", "is not well-formed XML"),
        (b"\x08\x01\x12\x07pytorch", "is not well-formed XML"),
    ],
)
def test_what_is_no_ir_is_refused(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "m.xml"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=re.escape(text)) as caught:
        read_ir(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        read_ir(tmp_path / "absent.xml")


def test_match_needs_one_layer_of_that_name_and_content(tmp_path: Path) -> None:
    layers = const("a", 0, 2, 2) + const("a", 2, 2, 2) + const("b", 4, 2, 2) + const("b", 4, 2, 2)
    weights = b"112233"
    ir = read_ir(write(tmp_path, layers, weights))
    found = match_constant(ir, weights, "a", b"22")
    assert found == ir.constants[1]
    assert match_constant(ir, weights, "a", b"33") is None
    assert match_constant(ir, weights, "b", b"33") is None


def reread(xml: bytes, weights: bytes, folder: Path) -> IrFile:
    path = folder / "again.xml"
    path.write_bytes(xml)
    path.with_suffix(".bin").write_bytes(weights)
    return read_ir(path)


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_patching_gives_every_constant_the_value_it_should_have(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("ir")
    places = data.draw(
        st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)), min_size=1, max_size=6), label="places"
    )
    weights = data.draw(st.binary(min_size=16, max_size=40), label="weights")
    layers = "".join(const(f"c{i}", offset, size, size) for i, (offset, size) in enumerate(places))
    ir = read_ir(write(folder, layers, weights))
    changes: list[tuple[IrConstant, bytes]] = []
    for constant in ir.constants:
        if data.draw(st.booleans()):
            # Few values, so that constants that share bytes often agree.
            byte = data.draw(st.sampled_from(b"xy"))
            changes.append((constant, bytes([byte]) * constant.size))
    xml, patched = patch(ir, weights, changes)
    after = reread(xml, patched, folder)
    wanted = dict(changes)
    for before, now in zip(ir.constants, after.constants, strict=True):
        expected = wanted.get(before, weights[before.offset : before.offset + before.size])
        assert patched[now.offset : now.offset + now.size] == expected
        assert now.offset == before.offset or now.offset % ALIGNMENT == 0
    touched = {i for c, _ in changes for i in range(c.offset, c.offset + c.size)}
    assert all(patched[i] == weights[i] for i in range(len(weights)) if i not in touched)
    blank = re.compile(rb'offset="\d+"')
    assert blank.sub(b"", xml) == blank.sub(b"", ir.xml)


def test_patching_without_sharing_leaves_the_xml_and_the_size_alone(tmp_path: Path) -> None:
    ir = read_ir(write(tmp_path, const("a", 0, 2, 2) + const("b", 2, 2, 2), b"1122"))
    assert patch(ir, b"1122", [(ir.constants[1], b"zz")]) == (ir.xml, b"11zz")


def test_patching_splits_constants_that_part_ways(tmp_path: Path) -> None:
    ir = read_ir(write(tmp_path, "".join(const(n, 0, 2, 2) for n in "abc"), b"11"))
    a, b, _ = ir.constants
    xml, weights = patch(ir, b"11", [(a, b"zz"), (b, b"zz")])
    assert weights == b"11" + bytes(62) + b"zz"
    assert [c.offset for c in reread(xml, weights, tmp_path).constants] == [64, 64, 0]


def test_patching_refuses_another_size(tmp_path: Path) -> None:
    ir = read_ir(write(tmp_path, const("a", 0, 2, 2), b"11"))
    with pytest.raises(ValueError, match="holds 2 bytes, not 3"):
        patch(ir, b"11", [(ir.constants[0], b"123")])


def test_a_pair_appears_complete(tmp_path: Path) -> None:
    source = write(tmp_path, const("a", 0, 2, 2), b"11", name="source")

    def copy(xml: Path) -> None:
        xml.write_bytes(source.read_bytes())
        xml.with_suffix(".bin").write_bytes(b"22")

    written = write_pair(tmp_path, "out", copy)
    assert written == [tmp_path / "out.xml", tmp_path / "out.bin"]
    assert written[1].read_bytes() == b"22"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.bin", "out.xml", "source.bin", "source.xml"]


def full_disk(xml: Path) -> None:
    xml.write_text("<net")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def silently_full_disk(xml: Path) -> None:
    xml.write_text(HEAD + const("a", 0, 2, 2) + TAIL)
    xml.with_suffix(".bin").write_bytes(b"1")


def failing_writer(xml: Path) -> None:
    raise RuntimeError("Exception from src/core\nfailed")


@pytest.mark.parametrize(
    ("writer", "text"),
    [
        (full_disk, "No space left on device"),
        (silently_full_disk, "the files are incomplete"),
        (failing_writer, "the files are incomplete"),
    ],
)
def test_a_failed_write_leaves_nothing(tmp_path: Path, writer: object, text: str) -> None:
    (tmp_path / "m.xml").write_text("old")
    assert callable(writer)
    with pytest.raises(OutputError, match=text) as caught:
        write_pair(tmp_path, "m", writer)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m.xml"]
    assert (tmp_path / "m.xml").read_text() == "old"


def test_a_missing_folder_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        write_pair(tmp_path / "absent", "m", full_disk)
