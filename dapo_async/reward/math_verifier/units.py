"""Units and other words beside a number: which of them keep its value, and which change it.

`numeric.py` calls it.
"""

from __future__ import annotations

import re

from dapo_async.reward.math_verifier.normalize import TEXT

_ALIASES = {
    "millimeter": "mm", "centimeter": "cm", "decimeter": "dm", "meter": "m", "kilometer": "km",
    "millimetre": "mm", "centimetre": "cm", "decimetre": "dm", "metre": "m", "kilometre": "km",
    "milligram": "mg", "gram": "g", "kilogram": "kg", "milliliter": "ml", "liter": "l",
    "millilitre": "ml", "litre": "l", "second": "s", "sec": "s", "minute": "min", "hour": "h",
    "hr": "h", "foot": "ft", "feet": "ft", "inch": "in", "inche": "in", "mile": "mi", "yard": "yd",
    "pound": "lb", "ounce": "oz", "cent": "cent", "dollar": "dollar", "euro": "euro", "day": "day",
    "week": "week", "month": "month", "year": "year", "yr": "year", "degree": "degree",
    "radian": "radian", "sq": "square", "cu": "cubic", "unit": "unit", "mph": "mph", "kph": "kph",
}  # fmt: skip
_KNOWN = _ALIASES | {name: name for name in (*_ALIASES.values(), "square", "cubic", "per")}
_ABBREVIATION = r"(?:mm|cm|dm|km|mg|kg|m[lL]|hrs?|mph|min|ft|in|oz|lbs?|yds?|mi)"
_TIGHT = r"(?:mm|cm|dm|km|mg|kg|m[lL]|hrs?|mph)"
_POWER = r"(?:\s*+\^\s*+\{?[23]\}?)?"
_WORD = r"[A-Za-z][A-Za-z'./-]+"
_DEGREES = r"(?:\^\s*+)?\{?\\(?:circ|degree)\}?(?:\s*+[CF])?"
_UNIT = re.compile(
    rf"(?:\s*+{_DEGREES}|\s*+{_TIGHT}{_POWER}|\s++[mgshlL]{_POWER}(?:/(?:s|h|min){_POWER})?"
    rf"|\s++in\.?{_POWER}|\s*+[€£¥₹$]|((?:\s++{_WORD}){{1,4}}){_POWER})\.?"
)
_TRAILING = re.compile(
    rf"(?<=[0-9A-Za-z}})])(?:\s*+{_DEGREES}|\s*+{_TIGHT}{_POWER}"
    rf"|((?:\s++{_WORD}){{1,4}}){_POWER})\.?\s*+$"
)
_TRAILING_TEXT = re.compile(TEXT.pattern + _POWER + r"\.?\s*+$")
FUNCTIONS = frozenset(
    "sin cos tan cot sec csc log ln exp sqrt max min gcd lcm det mod pi arcsin arccos "  # noqa: SIM905
    "arctan sinh cosh tanh binom frac".split()
)
_LINKING = frozenset(
    "and or to in of at by as with for if otherwise union inf infinity either".split()  # noqa: SIM905
)
CHANGING = frozenset(  # words that change the value of a number beside them
    "not nor but is isn't was wasn't isnt aren't are except exclude excluding never none "  # noqa: SIM905
    "no wrong incorrect false untrue plus minus negative times over divided modulo "
    "squared cubed root percent percentage pct hundred thousand million billion trillion "
    "hundreds thousands millions billions trillions dozen dozens half halves third "
    "thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh sevenths "
    "eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth "
    "thousandths millionth millionths point factorial choose base bn mln mn mio mil tn "
    "gross score scores pair pairs couple couples tens twice double triple fold less "
    "more fewer below above under least most than or/and zero one two three four five "
    "six seven eight nine quadrillion quintillion sextillion lakh crore myriad grand "
    "kilo mega giga permille basis inverse reciprocal maybe perhaps unless ignoring "
    "opposite ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty thirty forty fifty sixty seventy eighty ninety can't cannot doesn't "
    "don't anything".split()
)


def is_unit(rest: str) -> bool:
    """Whether the text after a number keeps its value: nothing, a unit, a currency or a thing."""
    if not rest.strip(" ."):
        return True
    match = _UNIT.fullmatch(rest)
    return match is not None and (match[1] is None or _are_things(match[1]))


def unit_of(rest: str) -> str:
    """A known unit in one spelling; empty without a unit and for counted things."""
    power = re.search(r"\^\s*\{?([23])\}?", rest)
    parts = re.findall(r"[A-Za-z]+|/", rest.replace("\\circ", "degree"))
    words = ["per" if part == "/" else _known(part) for part in parts]
    if not words or None in words:
        return ""
    return " ".join(
        [
            *({"2": ["square"], "3": ["cubic"]}[power[1]] if power else []),
            *(word for word in words if word is not None),
        ]
    )


def without_unit(text: str, *, symbols: bool) -> str:
    r"""`text` without a unit at its end.

    `\text{ cm}^2` is always a unit; `cm^2` and `square units` are not when `symbols` is true, which
    means that letters are variables.
    """
    if (match := _TRAILING_TEXT.search(text)) and match.start() and _are_things(match[1]):
        return text[: match.start()].rstrip(" \\")
    match = None if symbols else _TRAILING.search(text)
    return text[: match.start()] if match and (match[1] is None or _are_things(match[1])) else text


def words_of(text: str) -> set[str]:
    r"""The words of `text` in lower case, also those within `\text{…}`.

    Commands, functions, points such as AB, linking words such as `and`, and a leading `name =` are
    left out.
    """
    text = TEXT.sub(r" \1 ", text).strip()
    lead, equals, rest = text.partition("=")
    if equals and not _words(lead) & CHANGING:
        text = rest
    return _words(text)


def _words(text: str) -> set[str]:
    text = re.sub(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+|\b[A-Z]{2,4}\b", " ", text)
    return {
        word
        for each in re.findall(r"[A-Za-z][A-Za-z']+", text)
        if (word := each.lower()) not in FUNCTIONS | _LINKING
    }


def _are_things(said: str) -> bool:
    if re.search(r"\b[A-KM-Z]\b", said):  # 34 K, 34 M
        return False
    words = re.split(r"[\s-]+", said.strip().strip(".").lower())
    return not set(words) & (CHANGING | FUNCTIONS | _LINKING) and all(
        _is_thing(word) for word in words
    )


def _is_thing(word: str) -> bool:
    """Whether a word names a thing; short words without a vowel are products of variables."""
    return all(
        _known(part) is not None or (len(part) > 2 and re.search("[aeiouy]", part) is not None)
        for part in filter(None, re.split(r"[./']+", word))
    )


def _known(word: str) -> str | None:
    word = word.lower()
    return _KNOWN.get(word) or _KNOWN.get(word.removesuffix("s"))
