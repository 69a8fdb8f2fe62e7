"""From pixels to what a model's image input takes: the binding of :class:`Preprocess` to one model input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.data.preprocess import Layout, Preprocess, Resize
from pot_sparsity.errors import DataError
from pot_sparsity.graph.graph import Shape, TensorInfo

Pixels = NDArray[np.uint8]
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")  # PIL would start Ghostscript for an EPS
_DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


def infer_layout(shape: Shape | None) -> Layout | None:
    """Layout of an image tensor by where its 1 or 3 channels stand; None if this is no image.

    Unknown dimensions may be anything; where both places fit, or nothing is known, it is NCHW.
    """
    if shape is None or len(shape) != 4:
        return None
    if shape[1] in (1, 3):
        return "NCHW"
    if shape[3] in (1, 3):
        return "NHWC"
    return "NCHW" if shape[1] is None else None


@dataclass(frozen=True, eq=False)
class ImageInput:
    """One model input that takes pictures, and how they are brought to it.

    Attributes
    ----------
    name, layout, dtype
        Of the model's input.
    channels
        1 (grey) or 3.
    height, width
        None where the model takes any size.
    source_layout
        Layout of pictures that come as arrays.
    resize, crop
        Applied in this order.
    reverse
        Whether the channel order is reversed.
    table
        ``[channels, 256]``: value of every pixel value in every channel of the model's order.
    """

    name: str
    layout: Layout
    dtype: np.dtype[np.generic]
    channels: int
    height: int | None
    width: int | None
    source_layout: Layout
    resize: Resize | None
    crop: tuple[int, int] | None
    reverse: bool
    table: AnyArray

    @classmethod
    def bind(cls, inputs: Sequence[TensorInfo], preprocess: Preprocess) -> ImageInput:
        """Bind the preprocessing to the only input of a model.

        Raises
        ------
        DataError
            Several inputs, an input that is no image, or means and scales that do not fit its channels or
            dtype.
        """
        if len(inputs) != 1:
            names = ", ".join(repr(info.name) for info in inputs)
            raise DataError(
                f"images feed a model with one input, this one has {len(inputs)} ({names}): give an .npz "
                "with one array per input name"
            )
        (info,) = inputs
        layout = preprocess.model_layout or infer_layout(info.shape)
        shape = info.shape
        if layout is None or shape is None or len(shape) != 4:
            raise DataError(
                f"model input {info.name!r} of shape {shape_text(shape)} takes no images [N,C,H,W] or "
                f"[N,H,W,C] with 1 or 3 channels: give an .npz with an array under the key {info.name!r}"
            )
        channel, height, width = shape[1:] if layout == "NCHW" else (shape[3], shape[1], shape[2])
        if channel not in (None, 1, 3):
            raise DataError(
                f"model input {info.name!r} of shape {shape_text(shape)} has {channel} channels in layout "
                f"{layout}, images have 1 or 3: correct model_layout or give an .npz with an array under the "
                f"key {info.name!r}"
            )
        channels = channel or 3
        dtype = info.dtype or np.dtype(np.float32)
        return cls(
            info.name,
            layout,
            dtype,
            channels,
            height,
            width,
            preprocess.layout,
            preprocess.resizing,
            preprocess.crop_size,
            preprocess.reverse_input_channels and channels == 3,
            _table(preprocess, channels, dtype, info.name),
        )

    def fitted_size(self, height: int, width: int, where: str) -> tuple[int, int]:
        """Height and width of a picture of this size once resized and cropped.

        Raises
        ------
        DataError
            The model's input has another size.
        """
        before = height, width
        if self.resize is not None:
            height, width = self.resize.size(height, width)
        if self.crop is not None:
            height, width = self.crop
        wanted = self.height or height, self.width or width
        if (height, width) != wanted:
            option = f"{wanted[0]}x{wanted[1]}"
            done = (
                ""
                if (height, width) == before
                else f" and becomes {height}x{width} by --resize and --center-crop"
            )
            raise DataError(
                f"{where} is {before[0]}x{before[1]} (HxW){done}, but model input {self.name!r} takes "
                f"{option}: give --resize {option} or --center-crop {option}"
            )
        return height, width

    def decode(self, path: Path) -> Pixels:
        """Read a picture, resized and cropped: ``[H, W, channels]``; a DataError names the file."""
        try:
            with Image.open(path, formats=_FORMATS) as image:
                if image.mode.startswith(("I", "F")):
                    raise DataError(
                        f"image '{path}' has more than 8 bits a channel (mode {image.mode}): convert it"
                    )
                pixels = image.convert("L" if self.channels == 1 else "RGB")
        except _DECODE_ERRORS as error:
            raise unreadable(path, error) from None
        self.fitted_size(pixels.height, pixels.width, f"image '{path}'")
        return self._fit(pixels)

    def header_size(self, path: Path) -> tuple[int, int]:
        """Fitted height and width of a picture from its header alone; a DataError names the file."""
        try:
            with Image.open(path, formats=_FORMATS) as image:
                width, height = image.size
        except _DECODE_ERRORS as error:
            raise unreadable(path, error) from None
        return self.fitted_size(height, width, f"image '{path}'")

    def pictures(self, array: Pixels, where: str) -> Pixels:
        """Check pictures in the source layout (grey ones also ``[n, H, W]``); returns ``[n, H, W, C]``."""
        if array.ndim == 3 and self.channels == 1:
            array = array[..., None]
        elif array.ndim == 4 and self.source_layout == "NCHW":
            array = np.moveaxis(array, 1, 3)
        if array.ndim != 4 or array.shape[3] != self.channels or 0 in array.shape[1:]:
            wanted = (
                f"[N,H,W,{self.channels}]" if self.source_layout == "NHWC" else f"[N,{self.channels},H,W]"
            )
            got = (
                array.shape
                if self.source_layout == "NHWC" or array.ndim != 4
                else np.moveaxis(array, 3, 1).shape
            )
            raise DataError(
                f"{where} has shape {shape_text(got)}, expected images {wanted}: transpose it, or name its "
                "layout with --layout NHWC or --layout NCHW"
            )
        self.fitted_size(array.shape[1], array.shape[2], where)
        return array

    def fit(self, array: Pixels) -> Pixels:
        """Resize and crop pictures ``[n, H, W, C]`` that :meth:`pictures` has checked."""
        if self.resize is None and self.crop is None:
            return array
        height, width = array.shape[1:3]
        if self.resize is None and self.crop is not None and height >= self.crop[0] and width >= self.crop[1]:
            top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
            return array[:, top : top + self.crop[0], left : left + self.crop[1]]
        planes = array[..., 0] if self.channels == 1 else array
        return np.stack([self._fit(Image.fromarray(np.ascontiguousarray(plane))) for plane in planes])

    def to_model(self, array: Pixels) -> AnyArray:
        """Pictures ``[n, H, W, C]`` of the model's size in its channel order, values, layout and dtype."""
        n, height, width, channels = array.shape
        nchw = self.layout == "NCHW"
        out = np.empty((n, channels, height, width) if nchw else array.shape, self.dtype)
        for picture, target in zip(array, out, strict=True):  # one plane at a time stays in the cache
            for channel in range(channels):
                pixels = picture[..., channels - 1 - channel if self.reverse else channel]
                plane = target[channel] if nchw else target[..., channel]
                np.take(self.table[channel], pixels, out=plane, mode="clip")
        return out

    def _fit(self, image: Image.Image) -> Pixels:
        if self.resize is not None:
            image = self.resize.apply(image)
        if self.crop is not None:
            image = _center_crop(image, *self.crop)
        pixels = np.asarray(image, np.uint8)
        return pixels[..., None] if pixels.ndim == 2 else pixels


def _center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    scale = max(height / image.height, width / image.width)
    if scale > 1:
        size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _table(preprocess: Preprocess, channels: int, dtype: np.dtype[np.generic], name: str) -> AnyArray:
    """Pixels have 256 values, so every value is computed once, in float64, and rounded once."""
    values: dict[str, NDArray[np.float64]] = {}
    for key, given, neutral in (
        ("mean_values", preprocess.mean_values, 0.0),
        ("scale_values", preprocess.scale_values, 1.0),
    ):
        if len(given) not in (0, 1, channels):
            raise DataError(
                f"{key} has {len(given)} values but model input {name!r} has {channels} channels: give one "
                f"value or {channels}"
            )
        values[key] = np.broadcast_to(np.asarray(given or (neutral,), np.float64), (channels,))[:, None]
    exact = (np.arange(256.0)[None] - values["mean_values"]) / values["scale_values"]
    whole = dtype.kind in "iu" and np.array_equal(exact, exact.astype(np.int64).astype(dtype))
    if not whole and not np.issubdtype(dtype, np.floating):
        raise DataError(
            f"model input {name!r} is {dtype}, which cannot hold the preprocessed pixels: drop mean_values "
            "and scale_values (such a model has its preprocessing inside) or give an .npz with ready arrays"
        )
    return exact.astype(dtype)


def unreadable(path: Path, error: Exception) -> DataError:
    """What is said of an image that cannot be decoded."""
    reason = "no known image format" if isinstance(error, UnidentifiedImageError) else str(error)
    return DataError(f"cannot read image '{path}' ({reason}): replace or remove it")


def shape_text(shape: Sequence[int | None] | None) -> str:
    """A shape as messages show it: ``[?,3,32,32]``."""
    if shape is None:
        return "[...]"
    return "[" + ",".join("?" if dim is None else str(dim) for dim in shape) + "]"
