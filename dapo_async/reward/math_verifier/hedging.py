"""Whether a text claims the expression that it ends with. `symbolic.py` calls it.

`It is not 34`, `at most 34` and `34 million` end with 34 but claim another value.
"""

from __future__ import annotations

import re

from dapo_async.reward.math_verifier.units import CHANGING

MOST_CHARACTERS = 100
_CLAUSE = re.compile(r"[.;!?\n,:]|\b(?:so|but|thus|hence|therefore)\b")
_NEGATED = re.compile(r"(?i)\b(?:not|never|cannot|neither|nor|wrong|incorrect|hardly)\b|n['’]t\b")
_TURNED = re.compile(
    r"(?i)(?:\b(?:minus|negative|twice|double|triple|half|half of"
    r"|(?:less|more|greater|fewer|larger|smaller) than|below|above|under|beyond"
    r"|at most|at least|up to|nearly|almost"
    r"|(?:square|root|logarithm|multiple|opposite|reciprocal|inverse) of"
    r"|log|ln|sin|cos|tan|sqrt)|[0-9]\s*+(?:to|through|times))"
    r"\s++(?:the\s++)?$"
)
_AFTER = re.compile(r"[\s$})*\\]*+(?:(?:text|mathrm)\s*+\{\s*+)?([A-Za-z][A-Za-z']*+)")
_TAKEN_BACK = re.compile(
    r"(?i)[\s$})*\\]*+(?:text\s*+\{\s*+|\(\s*+)?"
    r"(?:(?:(?:is|was|are)\s++)?(?:not|wrong|incorrect|false|never)"
    r"|or\s++(?:so|less|more|fewer|above|below))\b"
)
_SEPARATORS, _OPENING = ", \t\r\n", "$({*\\ \t\r\n"
# Right after a number: another factor, an ordinal, a ratio. Letters that are common units pass.
_GOES_ON = re.compile(r"(?:[abdefijknopqruvwxyz]\b|(?:st|nd|rd|th)\b|\s*+:\s*+[0-9])")
_HARMLESS = frozenset(
    "is was are but more less fewer times percent percentage pct pair pairs couple couples "  # noqa: SIM905
    "score scores point".split()
)


def claims(text: str, expression: str) -> bool:
    """Whether `text` claims its last `expression`.

    It does not when the words around the expression deny it, change its value or continue it.
    """
    found = _last_place(expression[:MOST_CHARACTERS], text)
    if found is None:
        return True
    place, end = found
    before = text[max(0, place - 200) : place]
    opened = before.rstrip(_OPENING)
    clause = _CLAUSE.split(opened if opened == before else f"{opened} ")[-1]
    after = text[end:]
    following = _AFTER.match(after)
    if (
        _NEGATED.search(re.split("[0-9]", clause)[-1])
        or _TURNED.search(clause)
        or _TAKEN_BACK.match(after)
    ):
        return False
    if expression[-1:].isdigit() and _GOES_ON.match(after):
        return False
    return following is None or following[1].lower() not in CHANGING - _HARMLESS


def _last_place(expression: str, text: str) -> tuple[int, int] | None:
    """The start and end of the last `expression` in `text`; None when it is not there.

    Whitespace and commas are ignored: math-verify returns numbers without their separators.
    """
    kept = [place for place, character in enumerate(text) if character not in _SEPARATORS]
    wanted = "".join(character for character in expression if character not in _SEPARATORS)
    start = "".join(text[place] for place in kept).rfind(wanted)
    return (kept[start], kept[start + len(wanted) - 1] + 1) if start >= 0 and wanted else None
