"""The section of a recipe that chooses bits layer by layer."""

from __future__ import annotations

from pydantic import Field, field_validator

from pot_sparsity.algorithms.quantization.choices import BitChoice
from pot_sparsity.section import Section


class MixedSettings(Section):
    """Few-bit layers: bits of weights and activations and a pattern of zeros, chosen layer by layer, instead of INT8.

    The budget ``bops`` decides; ``pruning.pattern`` and ``quantization`` do not count.
    """

    enabled: bool = Field(False, description="whether to choose bits layer by layer")
    choices: tuple[str, ...] = Field(
        ("8w8a", "4w4a", "8w8a+2:4", "4w4a+2:4"),
        min_length=1,
        description="what layers choose from: bits of weights and of activations (2 to 8), and an n:m pattern or none",
    )
    first_and_last: str | None = Field(
        "8w8a", description="what the first and the last layer get; null lets them choose"
    )

    @field_validator("choices")
    @classmethod
    def _each_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(str(BitChoice.parse(text)) for text in value))

    @field_validator("first_and_last")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        return None if value is None else str(BitChoice.parse(value))
