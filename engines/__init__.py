"""Engines that run models on this machine's CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pot_sparsity.engines.base import Engine
from pot_sparsity.engines.onnxruntime_engine import OnnxRuntimeEngine
from pot_sparsity.engines.openvino_engine import OpenVinoEngine
from pot_sparsity.errors import UserError

#: Engines by the word used on the command line; each is called with the number of threads.
ENGINES: Mapping[str, Callable[[int | None], Engine]] = {
    OpenVinoEngine.name: OpenVinoEngine,
    OnnxRuntimeEngine.name: OnnxRuntimeEngine,
}


def get_engine(name: str, threads: int | None = None) -> Engine:
    """The engine of that name.

    Parameters
    ----------
    name
        A key of :data:`ENGINES`.
    threads
        Number of threads per inference; None lets the engine choose.

    Raises
    ------
    UserError
        The name is not known or the number of threads is not positive.
    """
    if name not in ENGINES:
        raise UserError(f"engine {name!r} is not known: use {' or '.join(ENGINES)}")
    if threads is not None and threads < 1:
        raise UserError(f"the number of threads must be at least 1, not {threads}")
    return ENGINES[name](threads)
