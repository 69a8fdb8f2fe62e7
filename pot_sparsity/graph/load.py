"""One door for every kind of model: files, folders and objects."""

from __future__ import annotations

from pathlib import Path

import onnx
import openvino as ov

# The same entry point as nncf uses; there is no public one.
from openvino._offline_transformations import apply_moc_transformations

from pot_sparsity.errors import ModelError
from pot_sparsity.graph.finite import check_finite
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.onnx_model import OnnxModel, load_onnx
from pot_sparsity.graph.openvino_model import OpenVINOModel, load_ir, reason
from pot_sparsity.graph.openvino_nodes import settle_names

ACCEPTED = (
    "an ONNX file (.onnx), an OpenVINO IR (.xml with its .bin), a TFLite file (.tflite), a TensorFlow "
    "SavedModel folder or frozen graph (.pb), a Paddle model (.pdmodel with its .pdiparams), an "
    "onnx.ModelProto or an openvino.Model"
)

_KINDS = {".tflite": "TFLite", ".pb": "TensorFlow", ".pdmodel": "Paddle"}


def load_model(model: str | Path | onnx.ModelProto | ov.Model) -> Model:
    """Open a model for editing.

    TensorFlow, TFLite and Paddle models are converted by OpenVINO's own frontends and are OpenVINO models
    from then on. (``openvino.convert_model`` would do the same, but reports its use to a server.)

    Parameters
    ----------
    model
        A path, or the model itself, which is not changed.

    Raises
    ------
    ModelError
        The model is missing, damaged, unsafe, of an unknown kind or holds NaN or infinite weights; one line
        says which.
    """
    loaded = _load(model)
    check_finite(loaded)
    return loaded


def _load(model: str | Path | onnx.ModelProto | ov.Model) -> Model:
    if isinstance(model, onnx.ModelProto):
        return OnnxModel(model)
    if isinstance(model, ov.Model):
        return OpenVINOModel(model)
    if not isinstance(model, str | Path):
        raise ModelError(f"an object of type {type(model).__name__} is no model: give {ACCEPTED}")
    path = Path(model)
    if not path.exists():
        raise ModelError(f"{path}: there is no such file or folder: check the path")
    suffix = path.suffix.lower()
    if path.is_dir() or path.name == "saved_model.pb":
        return _load_saved_model(path if path.is_dir() else path.parent)
    if suffix == ".onnx":
        return load_onnx(path)
    if suffix == ".xml":
        return load_ir(path)
    if suffix == ".bin" and path.with_suffix(".xml").is_file():
        raise ModelError(f"{path}: holds only weights: give {path.with_suffix('.xml').name} instead")
    if suffix == ".json" and path.with_suffix(".pdiparams").is_file():
        raise ModelError(
            f"{path}: OpenVINO reads no Paddle models in the .json format: save it as .pdmodel "
            "(set FLAGS_enable_pir_api=0 before paddle.jit.save)"
        )
    if suffix == ".pdiparams" and path.with_suffix(".pdmodel").is_file():
        raise ModelError(f"{path}: holds only weights: give {path.with_suffix('.pdmodel').name} instead")
    if suffix in _KINDS:
        return _convert(path, _KINDS[suffix])
    raise ModelError(f"{path}: files ending in {suffix or 'nothing'!r} are not known: give {ACCEPTED}")


def _load_saved_model(folder: Path) -> OpenVINOModel:
    if not (folder / "saved_model.pb").is_file():
        raise ModelError(f"{folder}: is a folder without saved_model.pb, so no SavedModel: give {ACCEPTED}")
    return _convert(folder, "TensorFlow")


def _convert(path: Path, kind: str) -> OpenVINOModel:
    """Read a foreign format through OpenVINO, folded and fused as ``openvino.convert_model`` does it."""
    if path.is_file():
        with path.open("rb") as stream:
            start = stream.read(8)
        if (kind == "TFLite" and start[4:] != b"TFL3") or (kind != "TFLite" and start[:1] != b"\n"):
            raise ModelError(f"{path}: is not a {kind} model: export or download it again")
    model = _read(path, kind)
    settle_names(model, _read(path, kind))
    return OpenVINOModel(model, path)


def _read(path: Path, kind: str) -> ov.Model:
    try:
        model = ov.Core().read_model(path)
        apply_moc_transformations(model, cf=False)
    except RuntimeError as error:
        raise ModelError(
            f"{path}: OpenVINO cannot read it as a {kind} model ({reason(error)}): export the model again"
        ) from error
    return model
