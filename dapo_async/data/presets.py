"""Published data sets: their place on the hub, their columns and their templates.

`PRESETS` has one entry per data set.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from dapo_async.config import Source, parse_source
from dapo_async.reward.math_verifier.normalize import normalised
from dapo_async.reward.math_verifier.numeric import parse_number

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*\{?")
END_OF_FORMULA = re.compile(r"(?<!\\)\$|\\[\])]|\\\\|\\end\b|\n")


@dataclass(frozen=True, slots=True)
class Preset:
    """A published data set.

    Columns are written as in `data.prompt_key`. Of several columns the first that a row has is
    read, because copies of a data set name them differently.
    """

    hub: str  # its place on the hub, written as in data.train
    problem: tuple[str, ...] = ("problem",)
    answer: tuple[str, ...] = ("answer",)
    # For columns that hold more than the answer: see `answer_of`.
    answer_form: Mapping[str, str] = field(default_factory=dict)
    template: str = "boxed"
    wrapped: str | None = None  # the template that the published problems already have
    deduplicate: bool = False
    language: Literal["en", "zh"] | None = None  # problems of another language are left out


DAPO_PROBLEM, DAPO_ANSWER = ("problem", "prompt"), ("answer", "reward_model.ground_truth")
# 1,791,700 rows: each of the 17,917 prompts occurs a hundred times. Some are in Chinese.
DAPO_MATH = Preset(
    "hub:BytedTsinghua-SIA/DAPO-Math-17k:train",
    DAPO_PROBLEM,
    DAPO_ANSWER,
    template="dapo",
    wrapped="dapo",
    deduplicate=True,
)
PRESETS = MappingProxyType(
    {
        "dapo_math_17k": DAPO_MATH,
        "dapo_math_17k_en": replace(DAPO_MATH, language="en"),
        "dapo_math_17k_zh": replace(DAPO_MATH, language="zh"),
        "gsm8k": Preset(
            "hub:openai/gsm8k/main:train", ("question",), answer_form={"answer": "hashes"}
        ),
        "math": Preset(
            "hub:DigitalLearningGmbH/MATH-lighteval:train",
            answer=("answer", "solution"),
            answer_form={"solution": "boxed"},
        ),
        "math500": Preset("hub:HuggingFaceH4/MATH-500:test"),
        # In DAPO's own copy each problem occurs 32 times.
        "aime24": Preset(
            "hub:HuggingFaceH4/aime_2024:train",
            DAPO_PROBLEM,
            DAPO_ANSWER,
            template="dapo",
            wrapped="dapo",
            deduplicate=True,
        ),
        "aime25": Preset("hub:math-ai/aime25:test", template="dapo"),
        "amc23": Preset("hub:math-ai/amc23:test", ("problem", "question"), template="dapo"),
    }
)


def preset_of(source: Source) -> tuple[Preset | None, Source]:
    """The preset of a source, and the source with `hub:PRESET` replaced by its place on the hub.

    The preset is None for a source without one. Raises ValueError for an unknown preset.
    """
    name = source.preset
    if name is None and source.hub is not None and "/" not in source.hub:
        name = source.hub
    if name is None:
        return None, source
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{name!r} is no preset of data; did you mean {near!r}? "
            f"Known are {', '.join(PRESETS)}; for a path write ./{name}"
        )
    preset = PRESETS[name]
    if source.hub is None or "/" in source.hub:
        return preset, source
    home = parse_source(preset.hub)
    return preset, Source(
        name,
        None,
        home.hub,
        source.subset or home.subset,
        source.revision,
        source.split or home.split,
    )


def answer_of(text: str, form: str | None) -> str:
    r"""The gold answer in a column; empty where there is none in this form.

    `hashes` (GSM8K): the text after the last ####, without commas; a number without #### is the
    answer itself. `boxed` (MATH): the content of the last \boxed{…} or \fbox{…}; after one without
    braces, such as \boxed 5, the rest of its formula. None: the whole text.
    """
    if form == "hashes":
        _, hashes, last = text.rpartition("####")
        return last.replace(",", "").strip() if hashes or parse_number(normalised(last)) else ""
    if form == "boxed":
        return _last_boxed(text)
    return text


def _last_boxed(text: str) -> str:
    starts = [match.end() for match in BOX.finditer(text)]
    if not starts:
        return ""
    if text[starts[-1] - 1] != "{":
        formula = END_OF_FORMULA.split(text[starts[-1] :], maxsplit=1)[0].strip(" .,")
        return formula if formula.count("{") == formula.count("}") else ""
    depth = 1
    for end in range(starts[-1], len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return text[starts[-1] : end].strip()
    return ""
