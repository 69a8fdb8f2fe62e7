"""From what a user names as DATA to a :class:`~pot_sparsity.data.dataset.Dataset`."""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeAlias, TypeGuard, TypeVar, runtime_checkable

import numpy as np

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.data.archive import npz_keys, read_npz
from pot_sparsity.data.conform import as_array, conform
from pot_sparsity.data.dataset import Dataset
from pot_sparsity.data.images import ImageInput, infer_layout
from pot_sparsity.data.labels import Labels, LabelTable, as_labels, labels_from_npz
from pot_sparsity.data.preprocess import Preprocess
from pot_sparsity.data.samples import SampleReader
from pot_sparsity.data.sources import (
    ArraySource,
    FolderSource,
    PictureSource,
    SequenceSource,
    Source,
    SourceDataset,
)
from pot_sparsity.errors import DataError, UserError
from pot_sparsity.graph.graph import TensorInfo

logger = logging.getLogger(__name__)
T = TypeVar("T")
Fetch: TypeAlias = Callable[[Sequence[int]], list[object]]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_FORMS = "DATA is a folder of images, an .npz file or module:callable"


@runtime_checkable
class InferenceData(Protocol):
    """What we use of ``nncf.Dataset``."""

    def get_inference_data(self, indices: list[int] | None = None) -> Iterable[Any]:
        """Items at these positions, all by default, ready for the model."""

    def get_length(self) -> int | None:
        """Number of items where it is known."""

    def get_batch_size(self) -> int | None:
        """Batch size of a loader behind it."""


@runtime_checkable
class Indexable(Protocol):
    """A sequence in the widest sense, such as a torch dataset."""

    def __len__(self) -> int:
        """Number of items."""

    def __getitem__(self, index: int, /) -> Any:
        """Item at a position."""


DataSource: TypeAlias = (
    str
    | Path
    | Dataset
    | InferenceData
    | Indexable
    | Mapping[str, AnyArray]
    | Iterable[object]
    | Callable[[], object]
)


def load_dataset(
    spec: DataSource,
    inputs: Sequence[TensorInfo],
    preprocess: Preprocess | None = None,
    *,
    labels: Path | None = None,
    split: str | None = None,
    samples: int | None = None,
    seed: int = 0,
    base: Path | None = None,
) -> Dataset:
    """Samples for a model.

    Parameters
    ----------
    spec
        A folder of images (searched with its subfolders, sorted by relative path, decoded when they are
        needed); an ``.npz`` with an array ``[N, ...]`` per model input, or ``images`` uint8 ``[N, H, W, C]``,
        and optionally ``labels``; ``module:callable``, imported from ``base``; a callable, an iterable of
        samples (see :class:`~pot_sparsity.data.samples.SampleReader`), an array, a mapping of arrays, an
        ``nncf.Dataset`` or a :class:`Dataset`. Sequences are read lazily, iterables without length and
        position are kept in memory.
    inputs
        The model's inputs.
    preprocess
        Done to pictures: files, ``images``, and uint8 arrays in Python for an image input, but for those of
        an ``nncf.Dataset``. Everything else is taken as it is.
    labels
        A CSV with columns ``file,label`` and optionally ``split`` (image folders), or an ``.npz`` with
        ``labels``.
    split
        Use only the images which that CSV lists with this value in its column ``split``.
    samples
        Use a random subset of this many samples, in their own order; all if there are no more than that.
    seed
        Of that draw.
    base
        Folder that relative paths and modules are looked up in; the working directory by default.

    Raises
    ------
    DataError
        The data is missing, unreadable or does not fit the model or its labels: one line says what to do.
    """
    if split is not None and (labels is None or labels.suffix.lower() == ".npz"):
        raise DataError(f"split {split!r} selects rows of a label CSV: name it with --validation-labels")
    folder = Path.cwd() if base is None else base
    where = _describe(spec)
    data: object = spec
    if isinstance(spec, str) and _CALLABLE.fullmatch(spec) and not (folder / spec).exists():
        data = call_by_name(spec, folder)
    elif callable(spec) and not isinstance(spec, Iterable | Indexable):
        data = _guarded(spec, where)
    if _is_dataset(data):
        return _draw(data, samples, seed)
    loader = _Loader(tuple(inputs), preprocess or Preprocess(), labels and folder / labels, split, where)
    source = loader.from_path(folder / data) if isinstance(data, str | Path) else loader.from_object(data)
    if not len(source):
        raise DataError(f"{where} holds no samples: give at least one")
    dataset = _draw(SourceDataset.whole(source), samples, seed)
    if isinstance(source, FolderSource) and isinstance(dataset, SourceDataset):
        source.check(dataset.indices)
    return dataset


def call_by_name(spec: str, folder: Path) -> Any:
    """What ``module:callable`` returns, with ``folder`` on the module path while it is imported and called.

    Raises
    ------
    DataError
        No such module or callable, or an exception of theirs.
    """
    module_name, _, name = spec.partition(":")
    sys.path.insert(0, str(folder))
    try:
        importlib.invalidate_caches()
        function: Any = _guarded(lambda: _import(module_name, spec), f"importing module {module_name!r}")
        for part in name.split("."):
            function = getattr(function, part, None)
        if not callable(function):
            raise DataError(
                f"module {module_name!r} has no callable {name!r}: define a function that returns the samples"
            )
        return _guarded(function, f"'{spec}'")
    finally:
        sys.path.remove(str(folder))


def _import(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # a module that the user's own module needs
        top = name.partition(".")[0]
        raise DataError(f"no module {name!r} for '{spec}': run where {top}.py lies, or install it") from None


@dataclass(frozen=True)
class _Loader:
    inputs: tuple[TensorInfo, ...]
    preprocess: Preprocess
    labels: Path | None
    split: str | None
    where: str

    def from_path(self, path: Path) -> Source:
        if path.is_dir():
            return self._folder(path)
        if not path.is_file():
            raise DataError(f"no such file or folder: '{path}'; {_FORMS}")
        if path.suffix.lower() != ".npz":
            raise DataError(f"'{path}' is neither a folder nor an .npz file: {_FORMS}")
        return self._archive(path)

    def _folder(self, folder: Path) -> Source:
        files = sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
        )
        if not files:
            raise DataError(f"folder '{folder}' holds no images ({', '.join(IMAGE_SUFFIXES)}): {_FORMS}")
        image_input = ImageInput.bind(self.inputs, self.preprocess)
        if self.labels is None or self.labels.suffix.lower() == ".npz":
            return FolderSource(folder, tuple(files), image_input, self._outer_labels(len(files)))
        indices, values = LabelTable.read(self.labels, self.split).select(files, folder)
        return FolderSource(folder, tuple(files[i] for i in indices), image_input, values)

    def _archive(self, path: Path) -> Source:
        names = [info.name for info in self.inputs]
        keys = npz_keys(path)
        ready = all(name in keys for name in names)
        if "images" in keys and (not ready or "images" in names):
            arrays = read_npz(path, {*names, "images", "labels"})
            images = as_array(arrays["images"], f"array 'images' in '{path}'")
            if images.dtype == np.uint8 and not (ready and not self._takes_pictures()):
                return self._pictures(images, f"array 'images' in '{path}'", self._inner_labels(arrays, path))
            if not ready:
                raise DataError(
                    f"array 'images' in '{path}' has dtype {images.dtype}: images are uint8; save ready "
                    f"arrays under the model's input names {', '.join(names)}"
                )
        elif not ready:
            raise DataError(
                f"'{path}' has the arrays {', '.join(keys) or 'none'}, expected the model's inputs "
                f"{', '.join(names)} (ready arrays) or 'images' (uint8): rename them"
            )
        arrays = read_npz(path, {*names, "labels"})
        return self._named(arrays, f" in '{path}'", self._inner_labels(arrays, path))

    def from_object(self, data: object) -> Source:
        if data is None:
            raise DataError(f"{self.where} returned nothing: return an iterable of samples")
        if isinstance(data, Mapping):
            absent = [info.name for info in self.inputs if info.name not in data]
            if absent:
                raise DataError(
                    f"{self.where} has no key {absent[0]!r} (found: {', '.join(map(str, data)) or 'none'}): "
                    "give one array per model input"
                )
            return self._named(data, f" of {self.where}", None)
        if isinstance(data, np.ndarray):
            if data.dtype == np.uint8 and self._takes_pictures():
                return self._pictures(data, self.where, None)
            if len(self.inputs) != 1:
                names = ", ".join(info.name for info in self.inputs)
                raise DataError(
                    f"{self.where} feeds one input, the model has {names}: give a mapping of arrays"
                )
            return self._named({self.inputs[0].name: data}, f" of {self.where}", None)
        if isinstance(data, InferenceData):
            return self._inference_data(data)
        if isinstance(data, Indexable) and not isinstance(data, str | bytes):
            return self._sequence(_fetcher(data, self.where), len(data), self._reader(pairs=True))
        if isinstance(data, Iterable) and not isinstance(data, str | bytes):
            return self._in_memory(_guarded(lambda: list(data), self.where), self._reader(pairs=True))
        raise DataError(f"{self.where} is or returned {type(data).__name__}: give an iterable of samples")

    def _inference_data(self, data: InferenceData) -> Source:
        self._say_ready()
        reader = self._reader(pairs=False)
        count = data.get_length()
        if count is None or data.get_batch_size() is not None:  # a loader has no random access
            return self._in_memory(_guarded(lambda: list(data.get_inference_data()), self.where), reader)

        def fetch(indices: Sequence[int]) -> list[object]:
            return _guarded(lambda: list(data.get_inference_data(list(indices))), self.where)

        return self._sequence(fetch, count, reader)

    def _sequence(self, fetch: Fetch, count: int, reader: SampleReader) -> Source:
        if not count:
            raise DataError(f"{self.where} holds no samples: give at least one")
        first = reader.sample(fetch([0])[0], 0)
        if first.size > 1:
            return self._in_memory(fetch(range(count)), reader)
        return SequenceSource(fetch, count, reader, first.labels is not None, self._outer_labels(count))

    def _in_memory(self, items: Sequence[object], reader: SampleReader) -> Source:
        if not items:
            raise DataError(f"{self.where} holds no samples: give at least one")
        batch = reader.join([reader.sample(item, i) for i, item in enumerate(items)], range(len(items)))
        outer = self._outer_labels(batch.size)
        return ArraySource(batch.inputs, batch.labels if outer is None else outer)

    def _reader(self, *, pairs: bool) -> SampleReader:
        pictures = pairs and self._takes_pictures()
        image_input = ImageInput.bind(self.inputs, self.preprocess) if pictures else None
        return SampleReader(self.where, self.inputs, image_input, pairs)

    def _pictures(self, array: AnyArray, where: str, labels: Labels | None) -> Source:
        image_input = ImageInput.bind(self.inputs, self.preprocess)
        outer = self._outer_labels(array.shape[0] if array.ndim else 0)
        pictures = image_input.pictures(array.astype(np.uint8, copy=False), where)
        return PictureSource(pictures, image_input, labels if outer is None else outer)

    def _named(self, arrays: Mapping[str, object], suffix: str, labels: Labels | None) -> Source:
        ready: dict[str, AnyArray] = {}
        for info in self.inputs:
            where = f"array {info.name!r}{suffix}"
            ready[info.name] = conform(as_array(arrays[info.name], where), info, where)
        sizes = {name: array.shape[0] for name, array in ready.items()}
        if len(set(sizes.values())) > 1:
            raise DataError(
                f"arrays{suffix} have different numbers of samples {sizes}: give the same for all inputs"
            )
        self._say_ready()
        outer = self._outer_labels(next(iter(sizes.values())))
        return ArraySource(ready, labels if outer is None else outer)

    def _takes_pictures(self) -> bool:
        """Whether a uint8 array for this model is meant as pictures."""
        if len(self.inputs) != 1 or self.inputs[0].dtype == np.bool_:
            return False
        shape = self.inputs[0].shape
        if self.preprocess.model_layout is not None:
            return shape is not None and len(shape) == 4
        return infer_layout(shape) is not None

    def _say_ready(self) -> None:
        if self.preprocess != Preprocess():
            logger.warning("%s holds ready arrays: preprocessing applies to images only", self.where)

    def _inner_labels(self, arrays: Mapping[str, AnyArray], path: Path) -> Labels | None:
        if (
            self.labels is not None
            or "labels" not in arrays
            or any(info.name == "labels" for info in self.inputs)
        ):
            return None
        counts = [len(array) for key, array in arrays.items() if key != "labels" and array.ndim]
        return as_labels(arrays["labels"], f"array 'labels' in '{path}'", counts[0] if counts else 0)

    def _outer_labels(self, count: int) -> Labels | None:
        if self.labels is None:
            return None
        if self.labels.suffix.lower() != ".npz":
            raise DataError(
                f"label file '{self.labels}' is matched by file name, but {self.where} has no files: give an "
                f".npz with an array 'labels' [{count}]"
            )
        return labels_from_npz(self.labels, count)


def _fetcher(data: Indexable, where: str) -> Fetch:
    def fetch(indices: Sequence[int]) -> list[object]:
        return _guarded(lambda: [data[i] for i in indices], where)

    return fetch


def _guarded(function: Callable[[], T], where: str) -> T:
    """Call what the user wrote; whatever it raises becomes one line that says where it came from."""
    try:
        return function()
    except UserError:
        raise
    except Exception as error:
        text = (str(error).splitlines() or [""])[0]
        raise DataError(f"{where} raised {type(error).__name__}: {text}; correct that code") from error


def _draw(dataset: Dataset, samples: int | None, seed: int) -> Dataset:
    if samples is None:
        return dataset
    if samples < 1:
        raise DataError(f"--samples {samples}: ask for at least 1")
    if samples >= len(dataset):
        if samples > len(dataset):
            logger.warning("%d samples asked for, there are %d: all are used", samples, len(dataset))
        return dataset
    chosen = np.random.default_rng(seed).choice(len(dataset), size=samples, replace=False)
    return dataset.subset(np.sort(chosen).astype(np.int64))


def _is_dataset(spec: object) -> TypeGuard[Dataset]:
    """Whether this is a :class:`Dataset`; isinstance would compute the fingerprint."""
    return callable(getattr(spec, "batches", None)) and callable(getattr(spec, "subset", None))


def _describe(spec: object) -> str:
    if isinstance(spec, str | Path):
        return f"'{spec}'"
    name = getattr(spec, "__name__", None)
    return f"callable '{name}'" if isinstance(name, str) else f"the {type(spec).__name__} of samples"
