r"""Names that the parser of LaTeX merges: capitals and small letters, letters with primes, names of several letters.

The parser writes every symbol small (so that N = n, which is kind to answers), forgets primes, and reads names such as
`\angle ABC` and `\overrightarrow{AB}` as products. Where that would merge what a text tells apart, both texts get other
letters in place of such names, the same in both.
"""

from __future__ import annotations

import re

from megatron_klear.reward.latex import STYLE

_PRIME = re.compile(r"\s*(?:\^\s*\{\s*((?:\\prime\s*|')+)\}|\^\s*(\\prime)(?![A-Za-z])|('+))")
_CAPITAL_GREEK = "Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega"
_FUNCTIONS = "arc(?:sin|cos|tan)|sin|cos|tan|cot|sec|csc|log|ln|lg|exp|gcd|lcm|max|min|mod|det"
_TOKEN = re.compile(
    r"\\(?:overrightarrow|vec)\s*\{\s*(?P<arrow>[A-Za-z]{2,})\s*\}"
    r"|(?P<derivative>\\[dt]?frac\s*\{\s*d\s*[A-Za-z]\s*\}\s*\{\s*d\s*[A-Za-z]\s*\})"
    r"|(?P<angle_mark>\\angle\s*)(?:\{\s*)?(?P<angle>[A-Z]{3})(?![A-Za-z])(?:\s*\})?"
    rf"|(?<!\d)(?<!\d )(?P<style>{STYLE}\s*\{{)(?P<styled>[A-Za-z])\}}"
    rf"|{STYLE}\s*\{{[^{{}}]*\}}"
    r"|\\(?:begin|end|mathbb|mathcal|mathfrak)\s*(?:\{[^{}]*\}|[A-Za-z])"
    rf"|\\(?P<greek>(?i:{_CAPITAL_GREEK}))(?![A-Za-z])"
    r"|\\[A-Za-z]+|\\."
    rf"|(?<![A-Za-z])(?i:{_FUNCTIONS})(?![A-Za-z])"
    r"|(?P<letter>[A-Za-z])"
    r"|(?P<closing>[)\]}])(?=\s*(?:'|\^\s*\{?\s*(?:\\prime|')))",
    re.DOTALL,
)
_FRESH = (*"wzuvqkhsblmptjrgcnoyxa", r"\xi ", r"\eta ", r"\zeta ", r"\kappa ", r"\tau ", r"\chi ", r"\psi ", r"\nu ")


def tell_apart(first: str, second: str) -> tuple[str, str]:
    r"""Both texts with the same new letters for names that the parser would merge within one of them, or over both.

    A capital is renamed if one text has it in both sizes: `R^2 - r^2`; where one text writes N and the other n, they
    stay one, but not \Gamma and \gamma. Letters with primes, derivatives, directed names and angles are renamed always.
    Texts with more such names than there are free letters are returned as they are.
    """
    texts = (first, second)
    names: list[str] = []
    in_texts = [[name for name, _, _ in _names(text)] for text in texts]
    greek = {name for found in in_texts for name in found if name.startswith("\\")}
    for found in in_texts:
        found_or_greek = {*found, *greek}  # nobody writes \gamma for \Gamma
        both = {name for name in found if name != name.lower() and name.lower() in found_or_greek and _is_symbol(name)}
        # The parser takes a capital I for the imaginary unit: in a text it is a name, of a current or a matrix.
        names += [name for name in found if name in both or name == "I" or not _is_symbol(name)]
    if not names:
        return texts
    used = {char.lower() for text in texts for char in re.sub(r"\\[A-Za-z]+", "", text)}
    used |= {f"\\{command} " for text in texts for command in re.findall(r"\\([A-Za-z]+)", text)}
    free = [letter for letter in _FRESH if letter not in used]
    distinct = list(dict.fromkeys(names))
    if len(distinct) > len(free):
        return texts
    renamed = dict(zip(distinct, free, strict=False))
    return _rename(first, renamed), _rename(second, renamed)


def _names(text: str) -> list[tuple[str, int, int]]:
    """Names of a text with their places: a letter, a Greek one by its command, `f''`, `>AB`, `<ABC`, `/dydx`."""
    found, end = [], 0
    for token in _TOKEN.finditer(text):
        if token.start() < end:
            continue
        start, end = token.span()
        if token["arrow"]:
            found.append((">" + token["arrow"], start, end))
        elif token["derivative"]:
            found.append(("/" + re.sub(r"\\[dt]?frac|[\s{}]", "", token["derivative"]), start, end))
        elif token["angle"]:
            found.append(("<" + min(token["angle"], token["angle"][::-1]), token.end("angle_mark"), end))
        elif token["closing"]:
            primes, end = _primes(text, end)
            found.append(("'" * primes, start + 1, end))
        elif token["greek"]:
            found.append(("\\" + token["greek"], start, end))
        elif token["letter"] or token["styled"]:
            primes, end = _primes(text, end)
            found.append(((token["letter"] or token["styled"]) + "'" * primes, start, end))
    return found


def _primes(text: str, start: int) -> tuple[int, int]:
    """How many primes stand at a place, and where they end."""
    match = _PRIME.match(text, start)
    if match is None:
        return 0, start
    return match.group().count("'") + match.group().count(r"\prime"), match.end()


def _is_symbol(name: str) -> bool:
    """Whether a name is a letter alone, Latin or Greek."""
    return name.startswith("\\") or (len(name) == 1 and name.isalpha())


def _rename(text: str, renamed: dict[str, str]) -> str:
    parts, end = [], 0
    for name, start, stop in _names(text):
        if name in renamed:
            # Primes behind brackets are an exponent of their own: a factor would commute.
            new = f"^{{{renamed[name]}}}" if name[0] == "'" else renamed[name]
            parts += [text[end:start], new]
            end = stop
    return "".join([*parts, text[end:]])


_INDEX = re.compile(
    r"_\s*(?:i(?![A-Za-z])|\{[^{}]*i)|\\(?:sum|prod|hat|vec|mathbf|boldsymbol|imath)(?![A-Za-z])|i\s*(?:=|<|>|\\(?:in|leq?|geq?|neq?)\b)"
    r"|(?:=|<|>)\s*i\s*(?:<|>|\\(?:leq?|geq?)\b)"
)


def with_imaginary_unit(first: str, second: str) -> tuple[str, str]:
    r"""Both texts with `I`, which the parser takes for the imaginary unit, for `i`; in texts of `tell_apart`.

    Where `i` is an index, or one of several directions (i, j, k), both are returned as they are.
    """
    texts = (re.sub(r"\\(?:text|mathrm)\s*\{\s*i\s*\}|\\imath(?![A-Za-z])", " i ", text) for text in (first, second))
    first, second = texts
    found = [{name for name, _, _ in _names(text)} for text in (first, second)]
    names = found[0] | found[1]
    if "i" not in names or _INDEX.search(first) or _INDEX.search(second):
        return first, second
    if names & {"j", "k"}:  # a letter as any other, for which the parser takes no `i` that stands alone
        return _rename(first, {"i": r"{\iota}"}), _rename(second, {"i": r"{\iota}"})
    return _rename(first, {"i": "{I}"}), _rename(second, {"i": "{I}"})
