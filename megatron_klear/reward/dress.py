r"""LaTeX that changes only the looks of an answer, and notations of one meaning, in the one that math-verify reads.

It cannot read `\textcolor{red}{5}`, `[-1, 3[`, `\{x \mid x < 3\}` or `{}_{10}C_3`, reads `\ln 2 \cdot 3` as ln 6 and
`\tan 45^\circ` as the tangent of 45 radians.
"""

from __future__ import annotations

import re

from megatron_klear.reward.latex import UPRIGHT

_NUMBER = r"\d+(?:\.\d+)?"
_DRESS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\\(?:text)?color\s*\{[^{}]*\}"), ""),
    (re.compile(r"\\(?:bf|it|rm|displaystyle|textstyle|scriptstyle)(?![A-Za-z])\s*"), ""),
    (re.compile(r"\\bm(?![A-Za-z])"), r"\\boldsymbol"),
    (re.compile(r"\\(?:boldsymbol|underline|ensuremath)\s*(?=\{\s*[^{}A-Za-z\s])"), ""),
    (re.compile(r"\\(?:tag|label)\*?\s*\{[^{}]*\}|\\[vh]?phantom\s*\{[^{}]*\}"), ""),
    (re.compile(r"\\(?:checkmark|blacksquare)\s*$"), ""),
    (re.compile(r"\\(?:big|Big|bigg|Bigg)[lrm]?(?![A-Za-z])"), ""),
    (re.compile(r"\\lg(?![A-Za-z])"), r"\\log_{10} "),
    (re.compile(r"_\s*(?:\{\s*)?\\(max|min|sup|inf)(?![A-Za-z])(?:\s*\})?"), r"_{\1}"),
    (re.compile(r"\\mathbb\s*([A-Z])(?![A-Za-z])"), r"\\mathbb{\1}"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\(?:hat|vec|mathbf|boldsymbol)\s*\{\s*\\?([ijk])(?:math)?\s*\}"), r" \1 "),
    (re.compile(r"\\(?:lor|vee)(?![A-Za-z])"), r"\\text{ or }"),
    (re.compile(r"\\(?:land|wedge)(?![A-Za-z])"), r"\\text{ and }"),
    (re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\A-Za-z])(floor|ceil)\s*\(([^()]*)\)"), r"{\\l\1 \2 \\r\1}"),
    (re.compile(r"(?<![\\A-Za-z])(sum|prod)_\(([^()]*)\)\s*\^"), r"\\\1_{\2}^"),
    (re.compile(r"(?<=[\d.])\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?"), r"\\overline{\1\2\3}"),
    (re.compile(rf"(?:{UPRIGHT}\s*\{{\s*USD\s*\}}|(?<![A-Za-z])USD)\s*(?=\d)"), r"\\$"),
    (re.compile(rf"^(\d{{1,9}})\s*(?:{UPRIGHT}\s*\{{\s*to\s*\}}|\bto\b)\s*(\d{{1,9}})$"), r"\1:\2"),
    (re.compile(r"\\\\\s*\[\s*-?[\d.]+\s*(?:pt|ex|em|mm|cm)\s*\]"), r"\\\\"),  # the height of a row
    (re.compile(r"\{:\}|\\colon(?![A-Za-z])"), ":"),
    (re.compile(r"(?<!\\!)(?:\\!)+:"), ":"),
    (re.compile(r":(?:\\!)+"), ":"),
    (re.compile(rf"{UPRIGHT}\s*\{{\s*\\\$\s*\}}"), r"\\$"),
    (re.compile(r"\\(?:degree|textdegree)(?![A-Za-z])(?:\s*\{\s*\})?"), r"^\\circ "),
    (re.compile(rf"(?<=\d)\s*\^\s*(?:\{{\s*)?(?:{UPRIGHT}\s*\{{\s*o\s*\}}|o(?![A-Za-z]))(?:\s*\}})?"), r"^\\circ "),
    (re.compile(r"\\backslash(?![A-Za-z])"), r"\\setminus "),
    (re.compile(r"(\\mathbb\s*\{?\s*[A-Z]\s*\}?)\s*-\s*\\\{"), r"\1 \\setminus \\{"),
    (re.compile(r"\\mathbb\s*\{?R\}?\s*_\s*\{\s*\\ge(?:q|qslant)?\s*0\s*\}"), r"[0,\\infty)"),
    (re.compile(r"\\mathbb\s*\{?R\}?\s*_\s*\{\s*>\s*0\s*\}"), r"(0,\\infty)"),
    (re.compile(r"(?:\{\s*\}\s*)?[\^_]\s*\{?(\d{1,6})\}?\s*C\s*_\s*\{?(\d{1,6})\}?"), r"\\binom{\1}{\2}"),
    (re.compile(r"(?<![A-Za-z\\])C\s*\(\s*(\d{1,6})\s*,\s*(\d{1,6})\s*\)"), r"\\binom{\1}{\2}"),
)
_TRIGONOMETRIC = r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])"
_DEGREES = re.compile(rf"({_NUMBER})\s*\^\s*(?:\\circ(?![A-Za-z])|\{{\s*\\circ\s*\}}|\N{{DEGREE SIGN}})")
_OF_DEGREES = re.compile(
    rf"({_TRIGONOMETRIC}(?:\s*\^\s*(?:\d|\{{\s*\d\s*\}}))?\s*(?:\\left)?[({{]?\s*-?)\s*"
    rf"({_NUMBER})\s*(?:\^\s*(?:\\circ(?![A-Za-z])|\{{\s*\\circ\s*\}})|\N{{DEGREE SIGN}})"
)
# An argument ends at a sign of multiplication: \ln 2 \cdot 3 is 3 ln 2.
_BEFORE_TIMES = re.compile(
    r"(\\(?:sin|cos|tan|cot|sec|csc|ln|log(?:\s*_\s*(?:\{[^{}]*\}|\w))?|arcsin|arccos|arctan)(?![A-Za-z])"
    r"(?:\s*\^\s*(?:\d|\{\s*-?\d\s*\}))?)\s*"
    r"(\d+(?:\.\d+)?|[A-Za-z]|\\[a-z]+|\\sqrt\s*\{[^{}]*\}|\\frac\s*\{[^{}]*\}\s*\{[^{}]*\})"
    r"\s*(?=\\(?:cdot|times)(?![A-Za-z])|\*(?!\*))"
)
_CIS = re.compile(
    rf"(?:{UPRIGHT}\s*\{{\s*cis\s*\}}|\\cis(?![A-Za-z]))\s*"
    rf"(?:\(([^()]*)\)|(\\frac\s*\{{[^{{}}]*\}}\s*\{{[^{{}}]*\}}|{_NUMBER}\s*\^\s*\{{?\s*\\circ\s*\}}?|\\pi))"
)
_SYSTEM = re.compile(r"\\begin\s*\{cases\}(.*\S)\s*\\end\s*\{cases\}", re.DOTALL)
_SET_BUILDER = re.compile(
    r"\\\{\s*(?P<name>[A-Za-z])\s*(?:\\in\s*\\mathbb\s*\{?\s*R\s*\}?\s*)?(?:\\mid(?![A-Za-z])|\\vert(?![A-Za-z])|[|:])"
    r"(?P<condition>(?:(?!\\\}).)*)\\\}",
    re.DOTALL,
)
_RELATION = re.compile(r"<|>|\\[gln]eq?(?![A-Za-z])|\\[gl]eqslant|\\neq|[\u2264\u2265\u2260]")
_CUP = re.compile(r"\\cup(?![A-Za-z])|\N{UNION}")


def without_dress(text: str) -> str:
    r"""Without colours, boldness, tags and sizes, and with intervals, sets and functions as the parser reads them."""
    text = re.sub(r"\s+", " ", re.sub(r"(?<!\\)~", " ", text))  # one space at a time keeps the patterns linear
    for pattern, replacement in _DRESS:
        text = pattern.sub(replacement, text)
    text = _CIS.sub(lambda match: rf"e^{{i ({_in_radians(match[1] or match[2])})}}", text)
    text = _OF_DEGREES.sub(r"\1{\\frac{\2 \\pi}{180}}", text)
    text = _BEFORE_TIMES.sub(r"{\1 \2} ", text)
    system = _SYSTEM.fullmatch(text.strip())
    if system and "&" not in system[1] and all("=" in row for row in system[1].split(r"\\")):
        text = system[1].replace(r"\\", ",")
    return _as_condition(_as_half_open(text.strip()))


def _in_radians(text: str) -> str:
    return _DEGREES.sub(r"\\frac{\1 \\pi}{180}", text)


def _as_half_open(text: str) -> str:
    """`]a, b[` as `(a, b)`, in unions, too; a text of which any part is no interval is left alone."""
    if not (text[:1] == "]" or text[-1:] == "["):
        return text
    parts = [part.strip() for part in _CUP.split(re.sub(r"\\(?:left|right)(?![A-Za-z])", "", text))]
    if not all(len(part) > 4 and part[0] in "([]" and part[-1] in ")[]" and "," in part for part in parts):
        return text
    return r" \cup ".join(part[0].replace("]", "(") + part[1:-1] + part[-1].replace("[", ")") for part in parts)


def _as_condition(text: str) -> str:
    r"""The condition of `\{x \mid x < 3\}`; sets of integers and sets without a relation are left alone."""
    found = _SET_BUILDER.fullmatch(re.sub(r"\\(?:left|right|middle)(?![A-Za-z])\s*", "", text))
    if found is None or not _RELATION.search(found["condition"]):
        return text
    return found["condition"].strip()
