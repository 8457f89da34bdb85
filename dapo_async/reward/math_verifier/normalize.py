"""One spelling for equal answers: a text comes in, the same answer without typesetting leaves.

`verify.py` calls it. It also finds texts that imitate other answers: foreign digits, invisible
characters, and digits that would become one number without the markup between them.
"""

from __future__ import annotations

import re
import unicodedata

_COMMANDS = r"\\(?:text|mathrm|textrm|mbox|textbf|textit|mathbf|textnormal|operatorname)"
TEXT = re.compile(_COMMANDS + r"\s*+\{([^{}]*+)\}")
_REPLACED = (  # in this order; `(?<!\\)` because `\\\\` is the end of a matrix row
    (re.compile(r",\\!\s*"), ","),
    (
        re.compile(
            r"(?<!\\)\\left(?![a-z])|(?<!\\)\\right(?![a-z])|\\displaystyle|(?<!\\)\\!|\\limits"
            r"|\\?\$|(?<!\\)\\[()\[\]]"
        ),
        "",
    ),
    (re.compile(r"(?<!\\)\\[bB]igg?[lr]?(?![A-Za-z])"), ""),
    (re.compile(r"(?<!\\)\\[,;: ]|~|\\quad|\\qquad|\u00a0|\u202f"), " "),
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (
        re.compile(r"\\(?:text|mathrm|textrm|mbox|textbf|mathbf|operatorname)\s*\{\s*([ei])\s*\}"),
        r"\1",
    ),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\\(?:boldsymbol|bm|underline)\s*\{([^{}]*)\}"), r"\1"),
    (
        re.compile(
            r"\\(?:tiny|small|normalsize|large|Large|LARGE|huge|Huge)(?![A-Za-z])\s*"
            r"|\\(?:color|textcolor)\s*\{[^{}]*\}"
        ),
        "",
    ),
    (re.compile(r"(?<![\\A-Za-z])sqrt\s*\{"), r"\\sqrt{"),
    (re.compile(r"(?<=[0-9])\s*+(?:\*\s*+)?pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"\\\{\s*\\\}|\\varnothing(?![a-z])"), r"\\emptyset"),
    (re.compile(r"\\(?:geq?|geqslant)(?![a-z])"), r"\\ge "),
    (re.compile(r"\\(?:leq?|leqslant)(?![a-z])"), r"\\le "),
    (re.compile(r"\\frac\s*([0-9])\s*([0-9])"), r"\\frac{\1}{\2}"),
    (re.compile(r"√\s*(?:\(([^()]*)\)|([0-9]+(?:\.[0-9]+)?|[A-Za-z]|\\pi))"), r"\\sqrt{\1\2}"),
    (re.compile(r"√"), r"\\sqrt"),
    (re.compile(r"\\sqrt\s*([0-9]{2,})"), r"\\sqrt{\1}"),
    (re.compile(r"\s+"), " "),
)
_GREEK = dict(
    zip(
        "αβγδζηθικλμνξρστυφχψωΓΔΘΛΞΣΦΨΩ",
        "alpha beta gamma delta zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon "  # noqa: SIM905
        "phi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega".split(),
        strict=True,
    )
)
_SYMBOLS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "°": r"^\circ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "±": r"\pm ", "’": "'", "，": ",", "：": ":",
}  # fmt: skip
_FRACTIONS = zip("½¼¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "113121234151357", "244335555668888", strict=True)
_UNICODE = str.maketrans(
    _SYMBOLS
    | {letter: rf"\{name} " for letter, name in _GREEK.items()}
    | {each: rf"\frac{{{top}}}{{{bottom}}}" for each, top, bottom in _FRACTIONS}
)
_RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"
_EXPONENT = re.compile(f"[{_RAISED}]+")
_LOWERED = str.maketrans(_RAISED, "0123456789-")
_MARKUP = (
    rf"\\?\$|\\[()\[\]!]|\\displaystyle|\\limits|\\left|\\right|\\q?quad|'|\{{\}}"
    rf"|\}}?\s*+{_COMMANDS}\s*+\{{\s*+\}}?"
)
GLUED = re.compile(
    rf"{_COMMANDS}\s*+\{{[^{{}}]*[0-9]\s*+\}}\s*+\.?[0-9]"
    rf"|[0-9]\s*+(?:(?:{_MARKUP})\s*+)++\.?[0-9]"
)
_ENDS_GLUED = re.compile(f"(?:{GLUED.pattern})" + r"[^A-Za-z]{0,10}$")
_TIGHT_GROUPS = re.compile(r"(?<![0-9,.])[0-9]{1,3}(?:,[0-9]{3})++(?!,*+[0-9])")


def normalised(text: str) -> str:
    """`text` without typesetting, such as spacing, sizes and `{,}`.

    Relations, fractions, roots, exponents and signs get one spelling.
    """
    text = _EXPONENT.sub(lambda match: f"^{{{match[0].translate(_LOWERED)}}}", text).translate(
        _UNICODE
    )
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    text = text.strip().removeprefix("=").strip()
    if re.search(r",\s", text):  # a list with spaces; a comma without one separates thousands
        text = _TIGHT_GROUPS.sub(lambda match: match[0].replace(",", ""), text)
    return text


def is_suspicious(text: str) -> bool:
    """Whether `text` has characters that no answer needs and that look like others.

    These are control and format characters, and digits other than 0 to 9.
    """
    return any(
        (category == "Cc" and character not in "\n\t\r")
        or (category in ("Cf", "Co", "Cs", "Cn", "Nd", "Nl") and not character.isascii())
        for character, category in (
            (character, unicodedata.category(character)) for character in set(text)
        )
    )


def is_glued(text: str) -> bool:
    """Whether digits are separated only by markup, as in `$3$$4$`.

    Without the markup they would be another number.
    """
    return GLUED.search(text) is not None


def ends_glued(text: str) -> bool:
    """Whether the end of `text` is glued in the sense of `is_glued`."""
    return _ENDS_GLUED.search(text) is not None
