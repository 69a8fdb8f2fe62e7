"""The seam between formats and everything else: a model that can be viewed, edited, cut and written.

Each format implements :class:`Model` once. Passes and the pipeline only ever use this interface: constants are
rewritten in place in a *copy* of the user's object, the few structural edits that exist are listed in
:attr:`Model.edits`, and whatever is not touched stays as it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import openvino as ov

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.algorithms.quantization.activations import ActivationGrid
from pot_sparsity.graph.graph import Graph, TensorInfo

Format = Literal["onnx", "openvino"]
EditKind = Literal["fuse_batchnorm", "add_bias", "fold_constant", "fake_quantize", "integer_weight"]


@dataclass(frozen=True)
class Edit:
    """One structural edit: what was done, at which node, in one sentence."""

    kind: EditKind
    node: str
    detail: str


@dataclass(frozen=True)
class Runnable:
    """A (cut of a) model that an engine can compile; float16 graphs arrive here as float32.

    Attributes
    ----------
    model
        Serialized ONNX bytes, the path of an ONNX file (models too large for one protobuf), or an ``openvino.Model``.
    inputs, outputs
        Graph tensor names, in the order of the runnable's own inputs and outputs.
    """

    model: bytes | Path | ov.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Model(ABC):
    """A model file or object under edit. Never mutates what the user passed in."""

    #: Structural edits made so far, in order.
    edits: list[Edit]
    #: What the user should know of how it was written, e.g. that an IR could not be patched in place.
    notes: list[str]
    #: Where the model came from, for messages; None for an object passed in Python.
    source: Path | None

    @property
    @abstractmethod
    def format(self) -> Format:
        """``onnx`` or ``openvino``; also decides the format that :meth:`save` writes."""

    @property
    @abstractmethod
    def graph(self) -> Graph:
        """Current networkx view; a new object after every structural edit."""

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """The model's inputs, in order."""
        return tuple(self.graph.tensor(name) for name in self.graph.inputs)

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """The model's outputs, in order (graph tensor names)."""
        return tuple(self.graph.tensor(name) for name in self.graph.outputs)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs' names as the user knows them, in order: the keys of named calibration data."""
        return self.graph.inputs

    @property
    @abstractmethod
    def native(self) -> onnx.ModelProto | ov.Model:
        """The model object itself, e.g. to hand to NNCF. Do not mutate."""

    @property
    @abstractmethod
    def batch_size(self) -> int | None:
        """The fixed leading dimension all inputs share; None where it is free."""

    @abstractmethod
    def copy(self) -> Model:
        """Independent copy (constants may be shared until they are written)."""

    @abstractmethod
    def set_constant(self, tensor: str, value: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> AnyArray:
        """Write a constant's value, cast to its stored dtype; returns the value as stored.

        Raises ValueError if the shape differs from the stored one or the cast overflows to infinity.
        """

    @abstractmethod
    def add_bias(self, node: str, value: np.ndarray[tuple[int, ...], np.dtype[np.floating]]) -> str:
        """Give a Convolution, ConvolutionTranspose or MatMul that has no bias one; returns the constant's tensor name.

        ``value [channels]`` is added along the channel axis (axis 1 for convolutions, the last axis for MatMul,
        axis -2 when the constant operand is on the left). The name of the node's output as consumers and the
        model's outputs see it does not change. Records an ``add_bias`` edit.
        """

    @abstractmethod
    def bypass(self, node: str, *, kind: EditKind, detail: str) -> None:
        """Remove a node with one data input and one output: its consumers read its first input instead.

        The surviving tensor must keep the name and the position of a model output if the removed node produced one.
        Records the edit.
        """

    @abstractmethod
    def replace_operand(self, node: str, port: int, value: AnyArray, *, detail: str) -> str:
        """Connect a new constant to an input port (folds a chain of operators on a weight); returns its tensor name.

        Nodes and constants left without consumers are removed. Records a ``fold_constant`` edit.
        """

    @abstractmethod
    def insert_quantizer(self, tensor: str, readers: Sequence[tuple[str, int]], grid: ActivationGrid) -> str:
        """Let ``readers`` (node, port) see a float32 tensor rounded to a grid; returns the rounded tensor's name.

        Everybody else goes on reading the tensor itself. Records a ``fake_quantize`` edit. Raises
        :class:`~pot_sparsity.errors.ModelError` where the format has no way to write that.
        """

    @abstractmethod
    def store_integers(self, node: str, port: int, integers: AnyArray, scale: AnyArray) -> str:
        """Let an operator read ``integers * scale`` from int8 storage; returns the constant's tensor name.

        Parameters
        ----------
        node, port
            The operator and its float32 operand, which a constant is behind.
        integers
            int8, of the operand's shape.
        scale
            float32, broadcasts to that shape; in ONNX at most one axis is longer than 1.

        Nodes and constants left without consumers are removed. Records an ``integer_weight`` edit.
        """

    @abstractmethod
    def extract(self, outputs: Sequence[str] | None = None, inputs: Sequence[str] | None = None) -> Runnable:
        """The part of the model from ``inputs`` to ``outputs`` (tensor names; default: the model's own).

        Any tensor of the graph may be an output (taps) and any non-constant tensor an input (cuts). Model inputs
        that the cut does not need are left out. Raises ValueError if an output depends on a tensor that is neither
        given nor computed.
        """

    @abstractmethod
    def save(self, folder: Path, stem: str) -> list[Path]:
        """Write the model as ``stem`` + the format's suffix into ``folder``; returns all files written.

        Files appear under their final names only when they are complete.
        """
