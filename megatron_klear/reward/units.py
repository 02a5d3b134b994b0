r"""Units behind an answer: math-verify drops them, so that 3 hours would equal 3 minutes.

A unit that only one side names is still dropped, and one that is not in the table (12 apples) says nothing. Where both
are known, kinds must agree, and values are compared in the same unit: 180 minutes are 3 hours.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from megatron_klear.reward.latex import STYLED, UPRIGHT


class Unit(NamedTuple):
    """A kind of quantity, and how many of its smallest common unit make one."""

    kind: str
    size: Fraction


class Measured(NamedTuple):
    """An expression and the unit behind it."""

    value: str
    unit: Unit


# Exact by definition: the international yard and pound of 1959, the US gallon of 231 cubic inches.
_TABLE = {
    "time": {
        "1/1000000000": "ns nanosecond nanoseconds",
        "1/1000000": "us microsecond microseconds",
        "1/1000": "ms millisecond milliseconds",
        "1": "s sec secs second seconds",
        "60": "min mins minute minutes",
        "3600": "h hr hrs hour hours",
        "86400": "day days",
        "604800": "week weeks",
    },
    "calendar": {"1": "month months", "12": "year years yr yrs"},
    "length": {
        "1/1000000000000": "pm picometer picometers picometre picometres",
        "1/1000000000": "nm nanometer nanometers nanometre nanometres",
        "1/1000000": "um micrometer micrometers micrometre micrometres micron microns",
        "1/1000": "mm millimeter millimeters millimetre millimetres",
        "1/100": "cm centimeter centimeters centimetre centimetres",
        "1": "m meter meters metre metres",
        "1000": "km kilometer kilometers kilometre kilometres",
        "254/10000": "in inch inches",
        "3048/10000": "ft foot feet",
        "9144/10000": "yd yard yards",
        "1609344/1000": "mi mile miles",
    },
    "mass": {
        "1/1000000": "ug microgram micrograms",
        "1/1000": "mg milligram milligrams",
        "1": "g gram grams",
        "1000": "kg kilogram kilograms",
        "1000000": "tonne tonnes",
        "45359237/100000": "lb lbs pound pounds",
        "45359237/1600000": "oz ounce ounces",
    },
    "volume": {
        "1/1000": "ml mL milliliter milliliters millilitre millilitres",
        "1": "l L liter liters litre litres",
        "3785411784/1000000000": "gal gallon gallons",
        "3785411784/4000000000": "qt quart quarts",
        "3785411784/8000000000": "pt pint pints",
        "3785411784/16000000000": "cup cups",
        "3785411784/128000000000": "fl-oz fluid-ounce fluid-ounces",
    },
    "length to the power 2": {"40468564224/10000000": "acre acres", "10000": "ha hectare hectares"},
    "count": {"12": "dozen dozens"},
    "money": {"1": "cent cents", "100": r"\$ dollar dollars usd"},
    "money in euros": {"1": "euro euros eur"},
    "money in pounds": {"1": "sterling"},
    "angle in degrees": {
        "1": r"^\circ degree degrees",
        "1/60": "arcmin arcminute arcminutes",
        "1/3600": "arcsec arcsecond arcseconds",
    },
    "angle in radians": {"1": "rad radian radians"},
    "temperature in Celsius": {"1": "degC celsius"},
    "temperature in Fahrenheit": {"1": "degF fahrenheit"},
    "temperature in kelvins": {"1": "K kelvin kelvins"},
    "speed": {"1609344/3600000": "mph", "1000/3600": "kph kmh"},
    "frequency": {"1": "Hz hertz", "1000": "kHz kilohertz", "1000000": "MHz megahertz", "1000000000": "GHz gigahertz"},
    "force": {"1": "N newton newtons", "1000": "kN kilonewton kilonewtons"},
    "energy": {
        "1602176634/10000000000000000000000000000": "eV electronvolt electronvolts electron-volt electron-volts",
        "1602176634/10000000000000000000000000": "keV",
        "1602176634/10000000000000000000000": "MeV",
        "1602176634/10000000000000000000": "GeV",
        "1/1000": "mJ millijoule millijoules",
        "1": "J joule joules",
        "1000": "kJ kilojoule kilojoules",
        "1000000": "MJ megajoule megajoules",
        "4184/1000": "cal calorie calories",
        "4184": "kcal kilocalorie kilocalories",
        "3600000": "kWh kilowatt-hour kilowatt-hours",
    },
    "power": {
        "1/1000": "mW milliwatt milliwatts",
        "1": "W watt watts",
        "1000": "kW kilowatt kilowatts",
        "1000000": "MW megawatt megawatts",
    },
    "pressure": {
        "1": "Pa pascal pascals",
        "1000": "kPa kilopascal kilopascals",
        "1000000": "MPa megapascal megapascals",
        "100000": "bar bars",
        "101325": "atm atmosphere atmospheres",
    },
    "voltage": {"1/1000": "mV millivolt millivolts", "1": "V volt volts", "1000": "kV kilovolt kilovolts"},
    "charge": {"1/1000000000": "nC", "1/1000000": "uC", "1/1000": "mC", "1": "coulomb coulombs"},
    "capacitance": {"1/1000000000000": "pF", "1/1000000000": "nF", "1/1000000": "uF", "1": "farad farads"},
    "magnetic flux density": {"1/1000": "mT", "1": "T tesla teslas"},
    "current": {"1/1000000": "uA", "1/1000": "mA milliampere milliamperes", "1": "A amp amps ampere amperes"},
    "resistance": {"1": r"\Omega ohm ohms", "1000": r"kohm k\Omega", "1000000": r"Mohm M\Omega"},
    "amount": {"1/1000": "mmol millimole millimoles", "1": "mol mole moles"},
    "information": {
        "1": "bit bits",
        "8": "B byte bytes",
        "8000": "kB KB kilobyte kilobytes",
        "8000000": "MB megabyte megabytes",
        "8000000000": "GB gigabyte gigabytes",
    },
}
_UNITS = {
    name: Unit(kind, Fraction(size))
    for kind, sizes in _TABLE.items()
    for size, names in sizes.items()
    for name in names.split()
}
_ABBREVIATIONS = "mm|cm|km|kg|mg|ml|mL|mph|kph|ft|yd|lbs|lb|oz|hrs|hr|mins|min|secs|sec"

_MARKED = re.compile(
    r"(?P<value>.*[^\s~\\])(?:~|\\[,;:! ]|\s)*"
    rf"{UPRIGHT}\s*\{{\s*(?P<unit>[^{{}}]*?)\s*\}}\s*"
    r"(?:\^\s*\{?\s*(?P<power>-?[123])\s*\}?)?",
    re.DOTALL,
)
_DEGREES = re.compile(r"(?P<value>.*\S)\s*\^\s*\{?\s*\\circ\s*\}?", re.DOTALL)
_MONEY = re.compile(r"\\?\$\s*(?P<value>.*\d)", re.DOTALL)
_TEMPERATURE = re.compile(r"(?P<value>.*[^\s^{])\s*\^?\s*\{?\s*\\circ\s*\}?\s*(?P<scale>[CF])", re.DOTALL)
_TIMES = re.compile(r"(?:\s|\\cdot(?![A-Za-z])|\\[,;: ]|~|\u00b7|\*)+")
_PRIME = re.compile(r"(?P<value>[-+]?\d[\d.,]*)\s*(?:'|\^\s*\{?\s*\\prime\s*\}?)")
_DEGREES_OF = re.compile(r"(?:degrees?|\^?\s*\{?\s*\\circ\s*\}?)\s*(C|F|[Cc]elsius|[Ff]ahrenheit)")
_SPACE = re.compile(r"(?:~|\\[,;:! ]|\s)+")
_QUANTITY = r"""(\d+(?:\.\d+)?)\s*([A-Za-z]++|\^\s*\{?\s*\\circ(?:\s*\})?|''?|")\.?"""
_QUANTITIES = re.compile(rf"{_QUANTITY}(?:[\s,]*+(?:and\s+)?{_QUANTITY})+")
_UNMARKED = re.compile(
    rf"([-+]?[\d.,/]*\d)(?:~|\\[,;: ]|\s)*((?:{_ABBREVIATIONS})(?:/(?:s|h|{_ABBREVIATIONS}))?)((?:\^\{{?[23]\}}?)?)"
)
# With a space between: 5m is a product.
_ONE_LETTER = re.compile(r"([-+]?\d[\d.,/]*)(?:~|\\[,;: ]|\s)+(?:([mgshlL])|(m)(\^\{?[23]\}?))")
_POWER_IN_WORDS = re.compile(r"(?:(square|sq\.?)|(cubic|cu\.?))\s+(.+)", re.IGNORECASE)
_PRODUCT = re.compile(
    r"(?P<above>[A-Za-z]+(?:\^[23])?)(?:\\,|\\cdot(?![A-Za-z])|\\ |\u00b7|\s)+"
    r"(?P<below>[A-Za-z]+)\s*\^-(?P<power>[123])"
)
_BRACED_POWER = re.compile(r"\^\s*\{\s*(-?\d)\s*\}")
_STYLED_POWERS = re.compile(r"\\(?:text|textrm|mathrm)\s*\{(?:[^{}]|\^\s*\{\s*-?\d\s*\})*\}")
_STYLED_RATE = re.compile(
    r"\\d?frac\s*\{\s*\\(?:text|mathrm)\s*\{([^{}]*)\}\s*\}\s*\{\s*\\(?:text|mathrm)\s*\{([^{}]*)\}\s*((?:\^[23])?)\s*\}"
)
_MICRO = re.compile(
    r"(?:\\mu(?![A-Za-z])|\u00b5|\u03bc)\s*(?:\\(?:text|mathrm)\s*\{\s*([A-Za-z])\s*\}|(?=(?:m|s|g|A|C|F)\s*\}))"
)
_OHMS = re.compile(r"\\(?:text|mathrm)\s*\{\s*([kM])\s*(?:\}\s*\\Omega(?![A-Za-z])|\\Omega\s*\})")
_MILLE = {"k": "kohm", "M": "Mohm"}
_RATE = re.compile(r"(.+?)\s*(?:/|\bper\b)\s*(.+)")


def in_plain_units(text: str) -> str:
    r"""Units as one marked text: `\mathrm{m\,s^{-1}}`, `\frac{\text{m}}{\text{s}}`, `\mu\text{m}`, `\text{k}\Omega`."""
    text = _MICRO.sub(lambda match: rf"\text{{u{match[1]}}}" if match[1] else "u", text)
    text = _OHMS.sub(lambda match: rf"\text{{ {_MILLE[match[1]]}}}", text)
    text = _STYLED_POWERS.sub(lambda match: _BRACED_POWER.sub(r"^\1", match.group()), text)
    return _STYLED_RATE.sub(r"\\text{ \1/\2\3}", text)


def mark_abbreviation(text: str) -> str:
    r"""`5 cm`, `5\,cm^3`, `5 m` as `5\text{ cm}`, `5\text{ cm}^3`, `5\text{ m}`: no products, as `5m` may be one."""
    one_letter = _ONE_LETTER.fullmatch(text)
    if one_letter:
        value, letter, metre, power = one_letter.groups("")
        return rf"{value}\text{{ {letter or metre}}}{power}"
    return _UNMARKED.sub(r"\1\\text{ \2}\3", text) if _UNMARKED.fullmatch(text) else text


def measured(text: str) -> Measured | None:
    r"""The value and unit of a text that ends in a known one (`\$5` begins with it), else None."""
    money = _MONEY.fullmatch(text)
    if money:
        return Measured(money.group("value"), _UNITS[r"\$"])
    temperature = _TEMPERATURE.fullmatch(STYLED.sub(r"\1", text))
    if temperature:
        return Measured(temperature.group("value"), _UNITS[f"deg{temperature.group('scale')}"])
    degrees = _DEGREES.fullmatch(text)
    if degrees:
        return Measured(degrees.group("value"), _UNITS[r"^\circ"])
    prime = _PRIME.fullmatch(text)
    if prime:  # of a length; a minute of an angle stands behind degrees (`in_one_unit`)
        return Measured(prime.group("value"), _UNITS["ft"])
    match = _MARKED.fullmatch(text)
    unit = None if match is None else _unit(match.group("unit"))
    if match is None or unit is None:
        return None
    power = match.group("power")
    if power:  # that of the last factor, as in m/s squared
        raised = _unit(f"{match.group('unit')}^{power}")
        return None if raised is None else Measured(match.group("value"), raised)
    return Measured(match.group("value"), unit)


def without_unnamed(text: str) -> str:
    r"""Without a unit that is not in the table: `12\text{ apples}`."""
    match = _MARKED.fullmatch(text)
    if match is None or not (match["value"][-1] in ")}]0123456789" or match["value"].endswith(r"\pi")):
        return text
    return match["value"]


def in_one_unit(text: str) -> str:
    r"""`3 hours 20 minutes` as `200\text{ minutes}`, `30^\circ 15'` as `\frac{121}{4}^\circ`; others unchanged."""
    plain = _SPACE.sub(" ", STYLED.sub(r" \1 ", text.replace("°", r"^\circ"))).strip()
    if not _QUANTITIES.fullmatch(plain):
        return text
    found = re.findall(_QUANTITY, plain)
    names = [name for _, name in found]
    if "circ" in names[0]:
        names = [r"^\circ", *({"'": "arcmin", "''": "arcsec", '"': "arcsec"}.get(name, name) for name in names[1:])]
    else:
        names = [{"'": "ft", "''": "in", '"': "in"}.get(name, name) for name in names]
    units = [_unit(name) for name in names]
    if units[0] is not None and units[0].kind == "time":
        units = [_UNITS["min"] if name == "m" else unit for name, unit in zip(names, units, strict=True)]
    known = [unit for unit in units if unit is not None]
    sizes = [unit.size for unit in known]
    is_one_kind = len(known) == len(units) and len({unit.kind for unit in known}) == 1
    if not is_one_kind or any(after >= before for before, after in pairwise(sizes)):
        return text
    total = sum(Fraction(number) * size for (number, _), size in zip(found, sizes, strict=True))
    in_degrees = known[0].kind == "angle in degrees"
    value = Fraction(total / sizes[0 if in_degrees else -1])
    written = str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    name = {"m": "min"}.get(names[-1], names[-1]) if known[0].kind == "time" else names[-1]
    return rf"{written}^\circ" if in_degrees else rf"{written}\text{{ {name}}}"


def quantities(parts: list[str]) -> list[Measured]:
    """The values and units of several texts; empty unless there are at least two and each has a known unit."""
    found = [item for item in map(measured, parts) if item is not None]
    return found if len(found) == len(parts) > 1 else []


def scaled(expression: str, factor: Fraction) -> str:
    """LaTeX of an expression times a fraction."""
    return expression if factor == 1 else rf"\frac{{{factor.numerator}}}{{{factor.denominator}}} \cdot ({expression})"


def _unit(name: str) -> Unit | None:
    name = name.strip().rstrip(".")
    temperature = _DEGREES_OF.fullmatch(name)
    name = f"deg{temperature.group(1)[0].upper()}" if temperature else name.replace("fl oz", "fl-oz")
    hyphened = name.casefold().replace(" ", "-")
    known = _UNITS.get(name) or (_UNITS.get(hyphened) if len(name) > 2 else None)
    if known:
        return known
    product = _PRODUCT.fullmatch(name)
    if product:  # m s^-1
        return _unit(
            f"{product['above']}/{product['below']}" + ("" if product["power"] == "1" else f"^{product['power']}")
        )
    power = _POWER_IN_WORDS.fullmatch(name)
    if power:
        base = _unit(power.group(3))
        return base and _to_power(base, 2 if power.group(1) else 3)
    rate = _RATE.fullmatch(name)
    if rate is None:
        caret = re.fullmatch(r"(.+?)\s*\^\s*([23])", name)
        base = _unit(caret.group(1)) if caret else None
        return _to_power(base, int(caret.group(2))) if caret and base else _product(name)
    above, below = _unit(rate.group(1)), _unit(rate.group(2))
    if above is None or below is None:
        return None
    is_speed = (above.kind, below.kind) == ("length", "time")
    return Unit("speed" if is_speed else f"{above.kind} per {below.kind}", above.size / below.size)


def _product(name: str) -> Unit | None:
    """`N m` and `kW \\cdot h`; None unless each factor is a known unit."""
    factors = [factor for factor in _TIMES.split(name) if factor]
    units = [_UNITS.get(factor) for factor in factors]
    known = [unit for unit in units if unit is not None]
    if len(known) < 2 or len(known) < len(units):
        return None
    kinds = " times ".join(sorted(unit.kind for unit in known))
    size = Fraction(math.prod(unit.size for unit in known))
    return Unit("energy" if kinds in ("force times length", "power times time") else kinds, size)


def _to_power(unit: Unit, power: int) -> Unit:
    """Square and cubic units; a cubic length is a volume, whose smallest common unit is the litre."""
    if power == 1:
        return unit
    if (unit.kind, power) == ("length", 3):
        return Unit("volume", unit.size**3 * 1000)
    return Unit(f"{unit.kind} to the power {power}", unit.size**power)
