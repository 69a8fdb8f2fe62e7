"""Preprocessing in OpenVINO's words: what is done to a picture before the model sees it.

Pictures are 8 bit, in RGB (or grey, where the model takes one channel). The order is fixed: resize, centre
crop, reversal of the channels, ``(x - mean_values) / scale_values``, and last the model's own layout.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from pot_sparsity.errors import RecipeError

Layout = Literal["NHWC", "NCHW"]
_RESIZE_WORDS = "'HxW' (stretch), 'shorter:N' or 'letterbox:N[,pad=114,anchor=topleft|center]'"


@dataclass(frozen=True)
class Resize:
    """How a picture is brought to another size, bilinearly.

    Attributes
    ----------
    kind
        ``stretch`` to exactly ``height`` x ``width``; ``shorter`` scales the shorter side to ``height`` and
        keeps the proportions; ``letterbox`` scales the picture to fit into ``height`` x ``width`` and fills
        the rest.
    height, width
        In pixels (equal for ``shorter``).
    pad
        Value 0..255 of the filling of ``letterbox``.
    anchor
        Where ``letterbox`` puts the picture.
    """

    kind: Literal["stretch", "shorter", "letterbox"]
    height: int
    width: int
    pad: int = 114
    anchor: Literal["topleft", "center"] = "topleft"

    @classmethod
    def parse(cls, text: str) -> Resize:
        """Read ``HxW``, ``shorter:N`` or ``letterbox:N[,pad=P,anchor=A]``; else a ValueError."""
        head, colon, rest = text.strip().partition(":")
        if not colon:
            return cls("stretch", *parse_size(head, f"resize {text!r} is not known: use {_RESIZE_WORDS}"))
        problem = f"resize {text!r} is not known: use {_RESIZE_WORDS}"
        size, *options = rest.split(",")
        height, width = parse_size(size, problem)
        if head == "shorter" and not options and height == width:
            return cls("shorter", height, width)
        if head != "letterbox":
            raise ValueError(problem)
        pad, anchor = 114, "topleft"
        for option in options:
            key, _, value = option.strip().partition("=")
            if key == "pad" and value.isdecimal() and int(value) <= 255:
                pad = int(value)
            elif key == "anchor" and value in ("topleft", "center"):
                anchor = value
            else:
                raise ValueError(problem)
        return cls("letterbox", height, width, pad, "center" if anchor == "center" else "topleft")

    def __str__(self) -> str:
        if self.kind == "shorter":
            return f"shorter:{self.height}"
        if self.kind == "stretch":
            return f"{self.height}x{self.width}"
        return f"letterbox:{self.height}x{self.width},pad={self.pad},anchor={self.anchor}"

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a ``height`` x ``width`` picture after the resize."""
        if self.kind != "shorter":
            return self.height, self.width
        scale = self.height / min(height, width)
        return max(self.height, round(height * scale)), max(self.height, round(width * scale))

    def apply(self, image: Image.Image) -> Image.Image:
        """The resized picture, in the same mode."""
        width, height = image.size
        if self.kind != "letterbox":
            new_height, new_width = self.size(height, width)
            return image.resize((new_width, new_height), Image.Resampling.BILINEAR)
        ratio = min(self.width / width, self.height / height)
        inner = max(1, int(width * ratio)), max(1, int(height * ratio))
        corner = (0, 0)
        if self.anchor == "center":
            corner = (self.width - inner[0]) // 2, (self.height - inner[1]) // 2
        fill = (self.pad,) * len(image.getbands())
        canvas = Image.new(image.mode, (self.width, self.height), fill if len(fill) > 1 else self.pad)
        canvas.paste(image.resize(inner, Image.Resampling.BILINEAR), corner)
        return canvas


class Preprocess(BaseModel):
    """What is done to pictures before the model sees them; keys as in a file and on the command line.

    Attributes
    ----------
    mean_values, scale_values
        Subtracted from and divided into the pixel values 0..255, one value or one per channel *of the model's
        order* (after ``reverse_input_channels``); empty for none.
    layout
        Layout of pictures that come as arrays.
    model_layout
        Layout of the model's input; None infers it from the input's shape.
    reverse_input_channels
        Whether the model wants BGR.
    resize
        ``HxW``, ``shorter:N`` or ``letterbox:N[,pad=114,anchor=topleft]``; see :class:`Resize`. In a mapping
        or a file also the kind alone (``letterbox``) beside the keys ``size``, ``pad_value`` and ``anchor``.
    center_crop
        ``HxW`` or one number; smaller pictures are first scaled up until both sides reach it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    mean_values: tuple[float, ...] = ()
    scale_values: tuple[float, ...] = ()
    layout: Layout = "NHWC"
    model_layout: Layout | None = None
    reverse_input_channels: bool = False
    resize: str | None = None
    center_crop: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _split_resize(cls, data: Any) -> Any:
        """Join ``resize: letterbox`` with the keys ``size``, ``pad_value`` and ``anchor`` beside it."""
        if not isinstance(data, Mapping):
            return data
        settings = dict(data)
        kind = settings.get("resize")
        if kind not in ("stretch", "shorter", "letterbox"):
            return settings
        if "size" not in settings:
            raise ValueError(f"resize {kind!r} needs the key 'size' beside it, or use {_RESIZE_WORDS}")
        text = _size_text(settings.pop("size"))
        if kind == "letterbox":
            text += f",pad={settings.pop('pad_value', 114)},anchor={settings.pop('anchor', 'topleft')}"
        settings["resize"] = text if kind == "stretch" else f"{kind}:{text}"
        return settings

    @field_validator("mean_values", "scale_values", mode="before")
    @classmethod
    def _values(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [part.strip() for part in value.split(",")] if value.strip() else []
        return [value] if isinstance(value, int | float) else value

    @field_validator("scale_values")
    @classmethod
    def _no_zero(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if 0.0 in value:
            raise ValueError("a scale of 0 divides by zero: use 1 for channels that are not scaled")
        return value

    @field_validator("resize")
    @classmethod
    def _resize(cls, value: str | None) -> str | None:
        return None if value is None else str(Resize.parse(value))

    @field_validator("center_crop", mode="before")
    @classmethod
    def _crop(cls, value: Any) -> Any:
        if value is None:
            return None
        height, width = parse_size(_size_text(value), f"center_crop {value!r} is not known: use N or 'HxW'")
        return f"{height}x{width}"

    @property
    def resizing(self) -> Resize | None:
        """The resize as an object."""
        return None if self.resize is None else Resize.parse(self.resize)

    @property
    def crop_size(self) -> tuple[int, int] | None:
        """Height and width of the centre crop."""
        return None if self.center_crop is None else parse_size(self.center_crop, "center_crop")


def parse_size(text: str, problem: str) -> tuple[int, int]:
    """Height and width from ``N`` or ``HxW``; ValueError with ``problem`` otherwise."""
    parts = text.strip().lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdecimal() and 0 < int(part) <= 65535 for part in parts):
        raise ValueError(problem)
    return int(parts[0]), int(parts[-1])


def _size_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "x".join(str(part) for part in value)
    return str(value)


def load_preprocess(source: Preprocess | Mapping[str, Any] | str | Path | None) -> Preprocess:
    """Preprocessing from an object, a mapping, a JSON or YAML file with the same keys, or None.

    Raises
    ------
    RecipeError
        File missing or neither JSON nor YAML, unknown key (the nearest known one is named), illegal value.
    """
    if isinstance(source, Preprocess):
        return source
    if source is None:
        return Preprocess()
    settings = source if isinstance(source, Mapping) else _read(Path(source))
    try:
        return Preprocess.model_validate(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, Preprocess.model_fields, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(Preprocess.model_fields)}"
            raise RecipeError(f"unknown preprocessing key '{key}'; {hint}") from None
        message = str(first["msg"]).removeprefix("Value error, ")
        raise RecipeError(f"preprocessing{f' key {key!r}' if key else ''}: {message}") from None


def _read(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        settings = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise RecipeError(f"cannot read preprocessing file '{path}': {error.strerror}") from None
    except (ValueError, yaml.YAMLError):
        raise RecipeError(f"preprocessing file '{path}' is neither valid JSON nor YAML") from None
    if not isinstance(settings, Mapping):
        raise RecipeError(
            f"preprocessing file '{path}' must be a mapping of keys such as mean_values and resize"
        )
    return settings
