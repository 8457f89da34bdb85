r"""Equality of plain answers without a symbolic engine: two texts come in; True, False or None (undecided) leaves. Called by `math.py`.

Integers, decimals, simple and mixed fractions, percentages, units and currencies, words and choices. Decided exactly, with integers and fractions.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

MOST_DIGITS, MOST_EXPONENT = 2000, 300
ROUNDED_DECIMALS = 4  # so many, rightly rounded, stand for a fraction whose decimals never end

_REPLACED = (  # in turn; a backslash right before is the end of a matrix row
    (re.compile(r",\\!\s*"), ","),
    (re.compile(r"(?<!\\)\\left(?![a-z])|(?<!\\)\\right(?![a-z])|\\displaystyle|(?<!\\)\\!|\\limits|\\?\$|(?<!\\)\\[()\[\]]"), ""),
    (re.compile(r"(?<!\\)\\[,;: ]|~|\\quad|\\qquad|\u00a0|\u202f"), " "),
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\(?:text|mathrm|textrm|mbox|textbf|mathbf|operatorname)\s*\{\s*([ei])\s*\}"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\\\{\s*\\\}|\\varnothing(?![a-z])"), r"\\emptyset"),
    (re.compile(r"\\(?:geq?|geqslant)(?![a-z])"), r"\\ge "),
    (re.compile(r"\\(?:leq?|leqslant)(?![a-z])"), r"\\le "),
    (re.compile(r"\\frac\s*([0-9])\s*([0-9])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\s+"), " "),
)
_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
     "°": r"^\circ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "√": r"\sqrt", "’": "'", "，": ",", "：": ":"}
)  # fmt: skip
_TEXT = re.compile(r"\\(?:text|mathrm|textrm|mbox|textbf|textit|mathbf|textnormal|operatorname)\s*\{([^{}]*)\}")
_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)"
_DECIMAL = re.compile(rf"([+-]?)\s*({_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE]([+-]?[0-9]{{1,3}}))?")
_SCIENTIFIC = re.compile(r"([0-9.]+)[eE]([+-]?[0-9]{1,3})")
_FRACTION = re.compile(rf"([+-]?)\s*(?:({_INTEGER})\s*/\s*({_INTEGER})|\\frac\s*\{{\s*([+-]?)\s*({_INTEGER})\s*\}}\s*\{{\s*({_INTEGER})\s*\}})")
_MIXED = re.compile(r"([+-]?)\s*([0-9]+)(?: ([0-9]+)/([0-9]+)| ?\\frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\})")
_PERCENT = re.compile(r"\s*(?:\\?%|(?i:percent|percentage|pct)\b\.?)")
_CURRENCY = re.compile(r"(?:\\\$|[$€£¥₹]|\\(?:euro|pounds)\b|(?:USD|EUR|GBP|Rs\.?)(?= ?[0-9]))\s*")
_UNIT = re.compile(
    r"(?:\s*\^?\s*\{?\\(?:circ|degree)\}?|\s*(?:mm|cm|dm|km|m|mg|kg|g|ml|hrs?|mph|°)(?:\s*[²³]|\s*\^\s*\{?[23]\}?)?|\s*[€£¥₹$]"
    r"|((?:\s+[A-Za-z][A-Za-z'./-]+){1,3})(?:\s*\^\s*\{?[23]\}?)?)\.?"
)
_NO_UNITS = frozenset(
    "and or not to nor but if is isn't was isnt in of at by as with plus minus times over divided mod modulo squared cubed percent percentage pct "  # noqa: SIM905
    "hundred thousand million billion trillion dozen half halves third thirds quarter quarters fourths tenth tenths hundredths point pi sqrt ln log "
    "sin cos tan base factorial choose either wrong incorrect otherwise except less more than".split()
)
_SEPARATOR = re.compile(r"[,;|]|\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b")
_APART = re.compile(r"(?:[0-9.]|\\frac\{[^{}]*\}\{[^{}]*\})\s+[+-]?(?:[0-9]|\.[0-9])")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' ,.-]*[A-Za-z]")
_CHOICE = re.compile(r"\(\s*([A-Za-z])\s*\)(?:\s.*)?|([A-Z])(?:[.):]\s.*|[.):])?|([a-z])")
_FUNCTIONS = frozenset("sin cos tan cot sec csc log ln exp sqrt max min gcd lcm det mod pi".split())  # noqa: SIM905


@dataclass(frozen=True, slots=True)
class Number:
    """An exact value as it was written."""

    value: Fraction
    percent: bool  # value 28 for "28%"
    decimals: int | None  # digits after the point; None for fractions


def normalised(text: str) -> str:
    """`text` without the marks of typesetting: spacing, sizes, `{,}`; relations, fractions and signs in one spelling."""
    text = text.translate(_UNICODE)
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    return text.strip()


def spelt_out(text: str) -> str:
    """A number such as `3e8` as a product, which the symbolic engine reads; anything else as it is."""
    return _SCIENTIFIC.sub(r"\1\\cdot10^{\2}", text) if number(text) is not None else text


def is_suspicious(text: str) -> bool:
    """Whether `text` has characters that no answer needs and that pass for others: control and format characters, digits other than 0 to 9."""
    return any(
        (category == "Cc" and character not in "\n\t\r") or (category in ("Cf", "Co", "Cs", "Cn", "Nd", "Nl") and not character.isascii())
        for character, category in ((character, unicodedata.category(character)) for character in set(text))
    )


def number(text: str) -> Number | None:
    """The value of a normalised plain number with its unit or currency, if it is one."""
    if len(text) > MOST_DIGITS:
        return None
    text = _CURRENCY.sub("", _TEXT.sub(r" \1", text).strip(), count=1).strip()
    if text.startswith("(") and text.endswith(")") and text.count("(") == 1:
        text = text[1:-1].strip()
    for pattern, value_of in ((_MIXED, _mixed), (_FRACTION, _fraction), (_DECIMAL, _decimal)):
        match = pattern.match(text)
        if match is None:
            continue
        percent = _PERCENT.match(text, match.end())
        end = percent.end() if percent else match.end()
        if _is_unit(text[end:]) and (value := value_of(match)) is not None:
            return Number(value, percent is not None, _decimals(match[0]) if pattern is _DECIMAL else None)
    return None


def equal_numbers(answer: Number, gold: Number) -> bool:
    """Exactly equal; `28%` also equals 28 and 0.28; at least four decimals also equal the fraction that they rightly round."""
    if answer.percent != gold.percent:
        percent, other = (answer, gold) if answer.percent else (gold, answer)
        return other.value in (percent.value, percent.value / 100)
    if answer.value == gold.value:
        return True
    # Decimals that never end have no exact spelling but the fraction itself.
    if gold.decimals is None and answer.decimals is not None and answer.decimals >= ROUNDED_DECIMALS and not _ends(gold.value):
        return abs(answer.value - gold.value) * 2 * 10**answer.decimals <= 1
    return False


def words(text: str) -> str | None:
    """The letters of an answer in words, such as `\\text{no solution}`, in lower case; None when it is something else."""
    text = _TEXT.sub(r" \1 ", text).strip(" .")
    if not _WORDS.fullmatch(text) or text.lower() in _FUNCTIONS or not re.search("[A-Za-z]{3}", text):
        return None
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def choice(text: str) -> str | None:
    """The letter of a chosen option: `C`, `(C)`, `\\text{(C)}`, `C.`, `(C) 34`; None when it is something else."""
    match = _CHOICE.fullmatch(_TEXT.sub(r" \1 ", text).strip())
    return (match[1] or match[2] or match[3]).upper() if match else None


def plain_equal(answer: str, gold: str) -> bool | None:
    """Whether two normalised answers are equal, as far as that is plain; None: ask the symbolic engine."""
    if answer == gold or ("".join(answer.split()) == "".join(gold.split()) and not _APART.search(answer + "|" + gold)):
        return True
    if not re.search(r"[0-9A-Za-z]", answer) or is_suspicious(answer) or not _is_balanced(answer):
        return False
    if _APART.search(answer) and number(answer) is None:
        return False
    gold_number, answer_number = number(gold), number(answer)
    if gold_number is not None and answer_number is not None:
        return equal_numbers(answer_number, gold_number)
    if gold_number is not None and any(not equal_numbers(part, gold_number) for part in _listed(answer)):
        return False
    gold_words, answer_words = words(gold), words(answer)
    if gold_words is not None:
        return answer_words == gold_words if answer_words is not None or number(answer) is not None else None
    if answer_words is not None and gold_number is not None:
        return False
    gold_choice = choice(gold)
    if gold_choice is not None and (answer_choice := choice(answer)) is not None:
        return answer_choice == gold_choice
    return None


def _listed(answer: str) -> list[Number]:
    """The plain numbers of an answer that has several parts."""
    parts = _SEPARATOR.split(answer)
    return [value for part in parts if (value := number(part.strip())) is not None] if len(parts) > 1 else []


def _is_balanced(text: str) -> bool:
    """Whether every brace of LaTeX is closed: what is cut off is no answer."""
    return text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


def _is_unit(rest: str) -> bool:
    if not rest.strip(" ."):
        return True
    match = _UNIT.fullmatch(rest)
    return match is not None and not (match[1] and _NO_UNITS & set(match[1].lower().split()))


def _integer(digits: str) -> int:
    return int(re.sub("[ ,]", "", digits))


def _decimal(match: re.Match[str]) -> Fraction | None:
    exponent = int(match[3] or 0)
    if abs(exponent) > MOST_EXPONENT:
        return None
    value = Fraction(re.sub("[ ,]", "", match[2]).rstrip(".") or "0") * Fraction(10) ** exponent
    return -value if match[1] == "-" else value


def _decimals(written: str) -> int:
    return len(written.partition(".")[2]) if "e" not in written.lower() else 0


def _fraction(match: re.Match[str]) -> Fraction | None:
    top, bottom = _integer(match[2] or match[5]), _integer(match[3] or match[6])
    if bottom == 0:
        return None
    return Fraction(top, bottom) * (-1 if (match[1] == "-") != (match[4] == "-") else 1)


def _mixed(match: re.Match[str]) -> Fraction | None:
    top, bottom = int(match[3] or match[5]), int(match[4] or match[6])
    if bottom == 0 or top >= bottom:
        return None
    value = int(match[2]) + Fraction(top, bottom)
    return -value if match[1] == "-" else value


def _ends(value: Fraction) -> bool:
    """Whether the decimals of `value` end: its denominator has no prime factors but 2 and 5."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1
