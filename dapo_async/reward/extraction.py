r"""Where an answer stands in a response: model text comes in, the answer's text or None leaves. Called by `math.py`; every search is linear.

conclusion     what follows the last </think>; nothing while the thinking is not closed
marked_answer  the last \boxed{…} or Answer: line of it, whichever comes later
"""

from __future__ import annotations

import re

WHITE = " \t\r\n"  # the white space that may stand around an answer
THINK, END_OF_THINKING = "<think>", "</think>"
_ANSWER_LINE = re.compile(r"(?i)(?<![a-z])answer(?:[ \t]{1,5}is)?[ \t*_`]{0,9}[:：][ \t*_`]*(.*)")
_BOXED = re.compile(r"\\(?:boxed|fbox)[ \t]{0,3}\{")
_SPACE = r"(?:\s|\$|\\[()\[\]]|\\quad|\\qquad|\\[,; ])*"
_BETWEEN_BOXES = re.compile(
    rf"{_SPACE}(?:(?:[a-z]+\s+){{0,2}}|\\text\{{[^{{}}]{{0,30}}){_SPACE}(?:,|;|and\b|or\b|\\text\{{\s*(?:and|or)\b)\s*\}}?{_SPACE}(?:[A-Za-z](?:_\{{?\w+\}}?)?\s*=)?{_SPACE}"
)
_SAID = re.compile(r"(?is)(?:(?:so|thus|hence|therefore)[, ]+)?(?:the\s+)?(?:final\s+)?answer\s+is\b\s*:?\s*(.*?)(?:\.\s*I hope\b.*)?")
_SENTENCE = re.compile(r"(?is)(?![^$]*\b(?:or|not)\b)[a-z][a-z ,'-]*(?:\$[^$0-9=]*\$[a-z ,'-]*)*\bis\s+((?:(?!\b(?:is|or|not)\b).)+)")
_AFTERWORD = re.compile(r"(?s)(?:<\|.*|\.\s*I hope (?:it|this) is correct.*)")
_INLINE = re.compile(r"(?<!\\)\$([^$]+)(?<!\\)\$")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
LONGEST_BOX, LONGEST_JOINT, MOST_BOXES = 2000, 100, 20  # characters, characters, boxes
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("__", "__"))


def conclusion(response: str) -> str | None:
    """What follows the last `</think>`, or all of it where there is none; None for thinking that was opened and not closed: nothing is concluded."""
    text = response.rpartition(END_OF_THINKING)[2]
    return None if THINK in text else text


def marked_answer(text: str) -> str | None:
    r"""The content of the marker that comes last: an `Answer:` line, or a whole `\boxed{…}`; None without one, or with nothing in it.

    Boxes with nothing but commas, `and` or `or` between them are one answer of several parts. A line is read from its first `Answer:` on, so that
    several claims in one line are no answer; an empty one is continued by the next line that is not.
    """
    line = None
    for line in _ANSWER_LINE.finditer(text):  # noqa: B007 (the last one is wanted)
        pass
    box = _last_boxes(text)
    if box is not None and (line is None or box[0] > line.start()):
        return _content(box[1]) or None
    if line is None:
        return None
    said = line[1].strip(WHITE)
    if not said.strip("*_` "):
        said = text[line.end() :].strip(WHITE).partition("\n")[0]
    return _content(said) or None


def is_cut(text: str) -> bool:
    """Whether the last box was never closed: a truncated response."""
    starts = [match.end() for match in _BOXED.finditer(text)]
    return bool(starts) and _closing(text, starts[-1]) is None


def bare(text: str) -> str:
    r"""`text` without what only surrounds it: white space, `$`, `\(…\)`, `**`, backquotes, a whole `\boxed{…}`, a full stop."""
    before = None
    while before != text:
        before, text = text, text.strip(WHITE).strip('*`"')
        if text.startswith('\\"') and text.endswith("\\"):
            text = text[2:-1]
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1]
        for left, right in _DELIMITERS:
            inner = text[len(left) : len(text) - len(right)]
            if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right) and left not in inner:
                text = inner
        match = _BOXED.match(text)
        if match and (end := _closing(text, match.end())) == len(text) - 1:
            text = text[match.end() : end]
    return text


def _content(said: str) -> str:
    """The answer in what a marker's line says: a sentence around it is left away, and formulas without their delimiters."""
    said = _AFTERWORD.sub("", said)
    if len(said) > LONGEST_BOX:
        return said
    text = bare(said)
    if sentence := _SAID.fullmatch(text) or _SENTENCE.fullmatch(text):
        text = bare(sentence[1])
    formulas, rest = _INLINE.findall(text), _INLINE.sub("", text)
    if len(formulas) == 1 and not re.search(r"(?i)[0-9\\]|\b(?:or|not|and)\b", rest):
        return bare(f"{formulas[0]}{_unit_after(text)}")
    return text


def _unit_after(text: str) -> str:
    """The words behind the one formula of `text`, such as the percent of `$28$ percent`."""
    words = text.rpartition("$")[2].strip(" .*")
    return f" {words}" if re.fullmatch(r"%|[A-Za-z]+", words) else ""


def _last_boxes(text: str) -> tuple[int, str] | None:
    """`(start, contents joined by commas)` of the last box and those right before it; None when there is none, or when the last is not closed."""
    starts = [(match.start(), match.end()) for match in _BOXED.finditer(text)]
    contents: list[str] = []
    first = len(text)
    for start, inside in reversed(starts[-MOST_BOXES:]):
        end = _closing(text, inside)
        if end is None or (contents and not _are_joined(text[end + 1 : first])):
            break
        if text[inside:end] not in contents:
            contents.insert(0, text[inside:end])
        first = start
    return (first, ", ".join(contents)) if contents else None


def _are_joined(between: str) -> bool:
    return len(between) < LONGEST_JOINT and (_BETWEEN_BOXES.fullmatch(between) is not None or not between.strip(" $"))


def _closing(text: str, start: int) -> int | None:
    """Index of the brace that closes the one opened before `start`; escaped ones don't count."""
    depth = 1
    for match in _BRACE.finditer(text, start, start + LONGEST_BOX):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None
