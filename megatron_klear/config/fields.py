"""What every settings section is made of: the schema options, units and bounded number types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field

SECTION = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)
"""Options of every section: unknown keys and silent conversions refused, docstrings under fields are their help."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Marks what a number counts or measures; shown by `--help`."""

    name: str


Positive = Field(ge=1)
"""A count of which at least one is needed."""

NonNegative = Field(ge=0)
"""A count or amount that may be nothing."""

PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]

Layers = Annotated[int | None, Unit("layers"), Positive]
Width = Annotated[int | None, Unit("channels"), Positive]
Heads = Annotated[int | None, Unit("heads"), Positive]

Tokens = Annotated[int, Unit("tokens"), Positive]
Steps = Annotated[int, Unit("steps"), Positive]
StepsOrNever = Annotated[int, Unit("steps"), NonNegative]
Ranks = Annotated[int, Unit("ranks"), Positive]
Sequences = Annotated[int, Unit("sequences"), Positive]
Prompts = Annotated[int, Unit("prompts"), Positive]
Responses = Annotated[int, Unit("responses"), Positive]
Seconds = Annotated[float, Unit("seconds"), Field(gt=0)]
