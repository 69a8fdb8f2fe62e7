"""Names of the ways to compress a layer for hardware with few-bit arithmetic: ``8w8a``, ``4w4a+2:4``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pot_sparsity.algorithms.arrays import Pattern

_FORM = re.compile(r"(\d+)w(\d+)a(?:\+(\d+:\d+))?")
#: Bits of weights and of activations that can be stored and simulated.
BITS = (2, 8)
#: Bits of a multiplication that is not quantized: what budgets are relative to.
DENSE_BITS = 32


@dataclass(frozen=True)
class BitChoice:
    """Bits of weights and activations, and the pattern of zeros (``None``: no zeros are asked for)."""

    weight_bits: int
    activation_bits: int
    pattern: Pattern | None = None

    @classmethod
    def parse(cls, text: str) -> BitChoice:
        """Read ``8w8a`` or ``4w4a+2:4``; raises ValueError with what is allowed otherwise."""
        found = _FORM.fullmatch(text)
        bits = (int(found[1]), int(found[2])) if found else (0, 0)
        if found is None or not all(BITS[0] <= number <= BITS[1] for number in bits):
            raise ValueError(
                f"{text!r} is not known: write the bits of weights and activations ({BITS[0]} to {BITS[1]}) and, with "
                "a plus, an n:m pattern, like '8w8a' or '4w4a+2:4'"
            )
        return cls(*bits, Pattern.parse(found[3]) if found[3] else None)

    def __str__(self) -> str:
        bits = f"{self.weight_bits}w{self.activation_bits}a"
        return bits if self.pattern is None else f"{bits}+{self.pattern}"

    def bops(self, macs: float, density: float = 1.0) -> float:
        """Bit operations of ``macs`` multiplications: times bits of weights, bits of activations and density."""
        return macs * self.weight_bits * self.activation_bits * density
