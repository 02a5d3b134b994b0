"""The values of an answer without their units, and whether the units of two answers agree."""

from __future__ import annotations

from megatron_klear.reward import shape
from megatron_klear.reward.units import Measured, measured, quantities, scaled, without_unnamed


def units_disagree(reference: str, answer: str) -> str:
    """Why the units of an answer cannot be those of the reference, or nothing; one that is missing is forgiven."""
    gold_unit, unit = measured(reference), measured(answer)
    if gold_unit is not None and unit is not None and gold_unit.unit.kind != unit.unit.kind:
        return f"the unit measures {unit.unit.kind}, that of the reference {gold_unit.unit.kind}"
    gold_kinds, kinds_given = (sorted(q.unit.kind for q in _list_of_units(t)) for t in (reference, answer))
    if gold_kinds and kinds_given and gold_kinds != kinds_given:
        return f"units of {', '.join(kinds_given)}, where the reference has {', '.join(gold_kinds)}"
    return ""


def without_units(reference: str, answer: str) -> tuple[str, str]:
    """Values in one unit where both name one; a unit that one side does not name is dropped."""
    golds, several = _list_of_units(reference), _list_of_units(answer)
    if golds and several:
        first, second = ([scaled(item.value, item.unit.size) for item in items] for items in (golds, several))
        return ", ".join(first), ", ".join(second)
    gold, given = measured(reference), measured(answer)
    if gold and given:
        return gold.value, scaled(given.value, given.unit.size / gold.unit.size)
    return bare(reference), bare(answer)


def bare(text: str) -> str:
    """The value, or the values of a list, without any unit."""
    several = _list_of_units(text)
    if several:
        return ", ".join(item.value for item in several)
    known = measured(text)
    text = known.value if known else text
    parts = shape.items(text)
    if len(parts) < 2:
        return without_unnamed(text)
    values = [without_unnamed(part) for part in parts]
    return text if values == parts else ", ".join(values)


def _list_of_units(text: str) -> list[Measured]:
    return quantities(shape.items(text))
