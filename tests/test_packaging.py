"""What is packaged: every module once, the data files, no tests."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
#: Import package of each folder that stands outside ``pot_sparsity/`` or in it.
FOLDERS = {"pot_sparsity": "", "algorithms": "algorithms", "engines": "engines", "configs": "configs"}


def modules() -> set[str]:
    """Every module as a path in the wheel, read from the tree."""
    found = set()
    for folder, inside in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            relative = path.relative_to(ROOT / folder)
            if folder == "pot_sparsity" and relative.parts[0] in FOLDERS.values():
                continue  # the symlinks that make a checkout importable
            found.add(str(PurePosixPath("pot_sparsity", inside, *relative.parts)))
    return found


def test_the_list_of_packages_is_complete() -> None:
    packages = {str(PurePosixPath(module).parent).replace("/", ".") for module in modules()}
    assert sorted(SETTINGS["tool"]["setuptools"]["packages"]) == sorted(packages)
    initialised = {
        m.removesuffix("/__init__.py").replace("/", ".") for m in modules() if m.endswith("/__init__.py")
    }
    assert packages == initialised


def test_symlinks_are_relative() -> None:
    for name in ("algorithms", "engines", "configs"):
        assert (ROOT / "pot_sparsity" / name).readlink() == Path("..", name)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the wheel and the source distribution, built from a copy without build leftovers."""
    if find_spec("build") is None or find_spec("setuptools") is None:
        pytest.skip("the package 'build' is not installed (pip install --group dev)")
    if int(metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("setuptools is older than 77, which pyproject.toml needs")
    folder = tmp_path_factory.mktemp("built")
    source = tmp_path_factory.mktemp("source") / "tree"
    ignored = {".git", ".venv", "build", "dist", "tests"}
    _copy(ROOT, source, ignored)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def _copy(source: Path, target: Path, ignored: set[str]) -> None:
    """Copy a tree with its symlinks as they are, without hidden and ignored entries."""
    target.mkdir()
    for entry in source.iterdir():
        copy = target / entry.name
        if entry.name in ignored or entry.name.startswith(".") or entry.name.endswith(".egg-info"):
            continue
        if entry.is_symlink():
            copy.symlink_to(entry.readlink())
        elif entry.is_dir():
            _copy(entry, copy, {"__pycache__"})
        else:
            copy.write_bytes(entry.read_bytes())


def test_the_wheel_holds_every_module_once(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert {name for name in names if name.endswith(".py")} == modules()
    data = {name for name in names if not name.endswith(".py")}
    configs = {f"pot_sparsity/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assets = {"digits_cnn.onnx", "digits_cnn.json", "digits_calibration.npz", "digits_validation.npz"}
    assert data == {
        "pot_sparsity/py.typed",
        "pot_sparsity/report/report.html",
        "pot_sparsity/report/sweep.html",
        *configs,
        *(f"pot_sparsity/demo_assets/{name}" for name in assets),
    }


def test_the_wheel_is_licensed_and_starts_the_command(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    extra = {name.partition(".dist-info/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
    assert "licenses/LICENSE" in extra
    assert "pot-sparsity = pot_sparsity.cli:main" in archive.read(extra["entry_points.txt"]).decode()


def test_the_source_distribution_holds_every_module_once(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        files = [member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()]
    inside = {name for name in FOLDERS.values() if name}
    sources = {
        str(PurePosixPath(*PurePosixPath(m).parts[1:])) if PurePosixPath(m).parts[1] in inside else m
        for m in modules()
    }
    assert sources <= set(files)
    assert not [name for name, count in Counter(files).items() if count > 1]
