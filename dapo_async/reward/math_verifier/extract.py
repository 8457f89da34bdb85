r"""The answer within a response: model text comes in, the answer's text or None leaves.

`verify.py` calls it. Searches in a whole response take linear time. The other patterns see at most
`LONGEST_BOX` characters, in which `squeezed` has shortened the runs of whitespace.

marked_answer  the last \boxed{…} or Answer: line, whichever comes later; else a last line `A: …`
"""

from __future__ import annotations

import re

from dapo_async.reward.math_verifier.units import CHANGING

WHITE = " \t\r\n"  # whitespace that may surround an answer
_ANSWER_LINE = re.compile(r"(?i)(?<![a-z])answer(?:[ \t]{1,5}is)?[ \t*_`]{0,9}[:：][ \t*_`]*(.*)")
_BOXED = re.compile(r"\\(?:boxed|fbox)[ \t]{0,3}\{")
_NAKED_BOX = re.compile(r"\\(?:boxed|fbox)[ \t]{0,3}(-?[0-9]+(?:\.[0-9]+)?)(?![0-9])")
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s*$")
_LABEL = re.compile(
    r"(?i)(?:(?<!\s)\s++)?(?:\\text\s*+\{\s*+)?(?:the\s++)?(?:final\s++)?answer\s*+(?:is\s*+)?:"
    r"\s*+(?:\}\s*+)?"
)
_SIGN = re.compile(r"(?:\$|(?:[=(\[{]|\\[(\[])\s*+)[-−]\s*+$")
_POWER = re.compile(r"\s*+\^\s*+(?:\{\s*+)?-?[0-9]++\s*+\}?")
_SPACE = r"(?:\s|\$|\\[()\[\]]|\\quad|\\qquad|\\[,; ])*+"
_BETWEEN_BOXES = re.compile(
    rf"{_SPACE}(?:(?:[a-z]++\s++){{0,2}}|\\text\{{[^{{}}]{{0,30}}){_SPACE}"
    rf"(?:,|;|and\b|or\b|\\text\{{\s*+(?:and|or)\b)\s*+\}}?{_SPACE}"
    rf"(?:[A-Za-z](?:_\{{?\w++\}}?)?\s*+=)?{_SPACE}"
)
_SAID = re.compile(
    r"(?is)(?:(?:so|thus|hence|therefore)[, ]++)?(?:the\s++)?(?:final\s++)?answer\s++is\b"
    r"\s*+(?::\s*+)?(.*?)(?:\.\s*+I hope\b.*)?"
)
_SENTENCE = re.compile(
    r"(?is)(?![^$]*\b(?:or|not)\b)([a-z][a-z ,'’-]*(?:\$[^$0-9=]*\$[a-z ,'’-]*)*)"
    r"\b(?:is|are|equals)\s++((?:(?!\b(?:is|are|equals|or|not)\b).)++)"
)
_IS_IN_TEXT = re.compile(r"\\text\s*\{([^{}]*\b(?:is|are|equals)\b[ :]*)\}\s*(.+)", re.DOTALL)
# Words before the only formula of a sentence that only introduce it as the answer.
_FRAME = re.compile(
    r"(?is)[a-z ,'’-]*\b(?:is|are|was|were|equals|has|have|get|gets)\b[ :*]*"
    r"(?:(?:exactly|precisely|only|just|simply|equal to|a total of)\s+)*|\s*"
)
_LEAD = re.compile(
    r"(?is)(?:(?:exactly|precisely|only|just|simply|equal to|a total of|option|choice)\s++)*"
    r"(?:[a-z]\s*+=)?\s*+"
)
_TURNED = re.compile(
    r"(?i)\b(?:not|never|no|nor|cannot|hardly|wrong|incorrect|false|untrue|other|but|except|minus"
    r"|twice|double|thrice|triple|unless)\b|n['’]t\b"
    r"|\b(?:half|third|quarter|square|squares|root|cube|opposite|negative|negation|reciprocal"
    r"|inverse|multiple|logarithm)\s+(?:of|it)\b"
    r"|\b(?:less|more|greater|smaller|fewer|larger)\s+than\b|\b(?:below|above|under|beyond)\b"
)
_AFTER = re.compile(
    r"\s*+(?:\\?%|[A-Za-z][A-Za-z'./-]*+(?:\s++[A-Za-z][A-Za-z'./-]*+)*+|\^\s*+\{?[23]\}?)?"
    r"(?:\s*+\^\s*+\{?[23]\}?)?\s*+"
)
_A_LINE = re.compile(r"[*_` \t]{0,9}A[*_` \t]{0,9}:[*_` \t]*+(\S.*)")
_OPENING = {"$$": "$$", r"\[": r"\]", r"\(": r"\)"}
_AFTERWORD = re.compile(r"(?s)(?:</s>.*|<\|.*|\.\s*I hope (?:it|this) is correct.*)")
_FLOURISH = re.compile(
    r"(?:(?<!\s)\s++)?(?:(?:\$?\\(?:blacksquare|square|qed)\$?|[∎■□✅✓✔])\s*+)++(\Z)?"
)
_REMARK = re.compile(r"(?<=[0-9$}*])\s++\(([A-Za-z][A-Za-z ,'-]{2,80})\)\s*+\.?\s*+$")
_INLINE = re.compile(r"(?<!\\)\$([^$]++)(?<!\\)\$")
_BLANKS = re.compile(r"(\s{2})\s+")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
LONGEST_BOX, LONGEST_JOINT, MOST_BOXES = 2000, 100, 20  # characters, characters, boxes
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("__", "__"))


def squeezed(text: str) -> str:
    r"""`text` with at most two whitespace characters in a row.

    So a pattern with `\s*` in several places does bounded work on blanks.
    """
    return _BLANKS.sub(r"\1", text)


def marked_answer(text: str) -> str | None:
    r"""The content of the last marker: an `Answer:` line or a complete `\boxed{…}`.

    Returns None without a marker, for an empty marker, and when the last box is cut off.
    - Boxes that are joined by commas, `and` or `or` are one answer of several parts.
    - A line is read from its first `Answer:`, so several claims in one line are no answer.
    - An empty `Answer:` continues on the next line that is not empty, and displayed mathematics
      continues to its end.
    - Without either marker, a last line `A: …`, as in GSM8K, is the answer.
    """
    has_box, line = "box" in text, None  # most responses have no box, which saves three searches
    if has_box:
        text = _NAKED_BOX.sub(r"\\boxed{\1}", text)
    box, cut = (_last_boxes(text), _last_cut(text)) if has_box else (None, None)
    for found in _ANSWER_LINE.finditer(text):
        if box is None or not box[0] <= found.start() < box[1]:  # not a line within the box
            line = found
    if cut is not None and (line is None or cut > line.start()):
        return None
    if box is not None and (line is None or box[0] > line.start()):
        return _content(_LABEL.sub("", squeezed(box[2]))) or None
    if line is None:
        last = _A_LINE.fullmatch(text.rstrip(WHITE).rpartition("\n")[2].strip(WHITE))
        return (_content(last[1]) or None) if last else None
    said, end = line[1].strip(WHITE), line.end()
    if not said.strip("*_` "):
        rest = text[end:].lstrip(WHITE)
        said = rest.partition("\n")[0].strip(WHITE)
        end = len(text) - len(rest) + len(rest.partition("\n")[0])
    return _content(_displayed(said, text[end : end + LONGEST_BOX])) or None


def _displayed(said: str, rest: str) -> str:
    """`said`; where it opens displayed mathematics, with the lines of `rest` up to its end.

    Displayed mathematics that is never closed gives an empty text.
    """
    closing = _OPENING.get(said[:2])
    if closing is None or closing in said[2:]:
        return said
    inside, closed, _ = f"{said[2:]} {rest}".partition(closing)
    return " ".join(inside.split()) if closed else ""


def is_cut(text: str) -> bool:
    """Whether the last box was never closed, as in a truncated response."""
    return _last_cut(text) is not None


def _last_cut(text: str) -> int | None:
    """The start of the last box if it was never closed, else None."""
    last = None
    for last in _BOXED.finditer(text):  # noqa: B007 (the last one is wanted)
        pass
    if last is not None and _closing(text, last.end()) is None:
        return last.start()
    tail = text[-20:]
    bare_box = _BARE_BOX.search(tail)
    return len(text) - len(tail) + bare_box.start() if bare_box else None


def stated(text: str) -> str | None:
    """The answer in a text that is only the sentence `the answer is …`; None for any other text."""
    sentence = _SAID.fullmatch(text.strip(WHITE)) if len(text) <= LONGEST_BOX else None
    return (bare(sentence[1]) or None) if sentence else None


def bare(text: str) -> str:
    r"""`text` without its outer marks.

    These are whitespace, `$`, `\(…\)`, `**`, backquotes, a whole `\boxed{…}`, a final full stop,
    comma or backslash.
    """
    before = None
    while before != text:
        before, text = text, text.strip(WHITE).strip('*`"')
        if text.startswith('\\"') and text.endswith("\\"):
            text = text[2:-1]
        if '\\"' not in text:  # else the backslash is half of a closing quote
            text = text.rstrip("\\")
        if text.endswith((".", ",")) and not text.endswith(".."):
            text = text[:-1]
        for left, right in _DELIMITERS:
            inner = text[len(left) : len(text) - len(right)]
            if (
                text.startswith(left)
                and text.endswith(right)
                and len(text) > len(left) + len(right)
                and left not in inner
            ):
                text = inner
        match = _BOXED.match(text)
        if match and (end := _closing(text, match.end())) == len(text) - 1:
            text = text[match.end() : end]
    return text


def _content(said: str) -> str:
    """The answer in the content of a marker, without a sentence or delimiters around it."""
    said = _AFTERWORD.sub("", squeezed(said))
    said = _FLOURISH.sub(lambda found: found[0] if found[1] is None else "", said)
    remark = _REMARK.search(said) if len(said) <= LONGEST_BOX else None
    if (
        remark
        and not {"mod", *CHANGING}.intersection(remark[1].lower().split())
        and not _TURNED.search(remark[1])
    ):
        said = said[: remark.start()]
    if len(said) > LONGEST_BOX:
        return said
    text = bare(said)
    if sentence := _IS_IN_TEXT.fullmatch(text):
        text = f"{sentence[1]} {sentence[2]}"
    if said_so := _SAID.fullmatch(text):
        text = bare(said_so[1])
    elif (sentence := _SENTENCE.fullmatch(text)) and not _TURNED.search(sentence[1]):
        text = bare(sentence[2])
    formulas = list(_INLINE.finditer(text))
    if len(formulas) != 1:
        return text
    (formula,) = formulas
    before, after = text[: formula.start()], text[formula.end() :].rstrip(" .*")
    if (
        _TURNED.search(before)
        or not (_FRAME.fullmatch(before) or _LEAD.fullmatch(before))
        or not _AFTER.fullmatch(after)
    ):
        return text
    return bare(formula[1]) + (f" {after.strip()}" if after.strip() else "")


def _last_boxes(text: str) -> tuple[int, int, str] | None:
    """`(start, end, contents joined by commas)` of the last box and of boxes joined to it.

    Returns None without a box and when the last box is not closed. A sign right before a box and a
    power right after it, within one formula, are part of its content.
    """
    starts = [(match.start(), match.end()) for match in _BOXED.finditer(text)]
    found: list[tuple[int, int, str]] = []
    for start, inside in reversed(starts[-MOST_BOXES:]):
        end = _closing(text, inside)
        if end is None:
            break
        after = [box for box in found if box[0] > end]  # boxes within this one are part of it
        if after and not _are_joined(text[end + 1 : after[0][0]]):
            break
        content, power = text[inside:end], _POWER.match(text, end + 1)
        if _SIGN.search(text[max(0, start - 20) : start]):
            content = f"-({content})"
        found = [(start, end, f"({content}){power[0]}" if power else content), *after]
    return (
        (found[0][0], found[-1][1], ", ".join(dict.fromkeys(content for *_, content in found)))
        if found
        else None
    )


def _are_joined(between: str) -> bool:
    return len(between) < LONGEST_JOINT and (
        _BETWEEN_BOXES.fullmatch(between) is not None or not between.strip(" $")
    )


def _closing(text: str, start: int) -> int | None:
    """The index of the brace that closes the one before `start`; escaped braces do not count."""
    depth = 1
    for match in _BRACE.finditer(text, start, start + LONGEST_BOX):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None
