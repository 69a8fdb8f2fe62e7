"""Schedules: by which steps the sparsity grows to its target."""

from __future__ import annotations


def cubic_schedule(initial: float, final: float, iterations: int) -> list[float]:
    """Sparsity of each iteration, steep at first and flat at the end.

    ``s_t = s_f + (s_i - s_f) (1 - t / T)^3`` for t = 0..T (POT section 3, equation for ``s_t``).

    Parameters
    ----------
    initial, final
        Sparsity ``s_i`` at t = 0 and ``s_f`` at t = T, with ``0 <= initial <= final <= 1``.
    iterations
        T, at least 0; 0 gives the final sparsity alone.

    Returns
    -------
    list of float
        T + 1 values that never decrease, from exactly ``initial`` (T > 0) to exactly ``final``.

    Raises
    ------
    ValueError
        Where an argument is out of its range.

    Examples
    --------
    >>> [round(s, 4) for s in cubic_schedule(0.1, 0.5, 4)]
    [0.1, 0.3312, 0.45, 0.4938, 0.5]
    >>> cubic_schedule(0.1, 0.5, 0)
    [0.5]
    """
    for name, value in (("initial", initial), ("final", final)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} sparsity must be between 0 and 1, got {value}")
    if initial > final:
        raise ValueError(
            f"initial sparsity {initial} is larger than the final sparsity {final}: a schedule can only "
            "grow, so lower the initial one"
        )
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0, got {iterations}")
    if iterations == 0:
        return [final]
    later = [final + (initial - final) * (1.0 - t / iterations) ** 3 for t in range(1, iterations + 1)]
    return [initial, *later]
