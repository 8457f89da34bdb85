"""Presets find the columns of published sets, templates surround problems, rows are screened."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pytest
from byte_tokenizer import BYTES
from paths import CONFIGS
from pyarrow import parquet
from shared_data import DATA, EVALUATION_SETS, needs_data
from transformers import AutoTokenizer

from dapo_async import config as knobs
from dapo_async.config import Source, parse_source
from dapo_async.config.validate import TEMPLATES as NAMES
from dapo_async.data import (
    PRESETS,
    TEMPLATES,
    PromptSet,
    Screening,
    Tokenizer,
    load_fingerprints,
    load_prompts,
    load_set,
    load_tokenizer,
    preset_of,
)
from dapo_async.data.presets import answer_of
from dapo_async.data.screening import fingerprint
from dapo_async.runtime.preflight import check_inputs

QUICKSTART = CONFIGS / "quickstart.yaml"


Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(
    file: Path,
    rows: Rows,
    *,
    preset: str | None = None,
    screening: Screening = Screening(),  # noqa: B008 (frozen)
    prompt_key: str | None = None,
    answer_key: str | None = None,
    template: str | None = None,
) -> PromptSet:
    """Writes the rows to `file` and loads them."""
    return load_prompts(
        Source(preset=preset, path=write(file, rows)),
        tokenizer=BYTES,
        prompt_key=prompt_key,
        answer_key=answer_key,
        template=template,
        max_prompt_tokens=2000,
        screening=screening,
    )


def pairs(loaded: PromptSet) -> list[tuple[int, str, str]]:
    return [(prompt.row, prompt.text, prompt.answer) for prompt in loaded.prompts]


def published_row(problem: str, answer: str) -> dict[str, Any]:
    """A row of the published DAPO-Math-17k: a chat of one turn, with DAPO's prompt around it."""
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": TEMPLATES["dapo"].replace("{problem}", problem), "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"{problem}-{answer}"},
    }


def test_published_dapo_math_gives_each_prompt_once_and_none_with_two_answers(
    tmp_path: Path,
) -> None:
    rows = [
        published_row(f"What is ${number} + {number}$?", str(2 * number)) for number in range(40)
    ] * 100
    rows[1234] = published_row("What is $34 + 34$?", "69")  # one of a hundred copies disagrees
    rows[2000] = published_row("What  is\n$0 + 0$?", "0 ")  # a copy but for whitespace
    rows[2001] = published_row("What is $0 - 0$?", "7")  # no copy: a sign differs
    loaded = load(tmp_path / "dapo.parquet", rows, preset="dapo_math_17k")
    kept = [number for number in range(40) if number != 34]
    expected = [(number, rows[number]["prompt"][0]["content"], str(2 * number)) for number in kept]
    assert pairs(loaded) == [*expected, (2001, rows[2001]["prompt"][0]["content"], "7")]
    assert loaded.left_out.counts == {
        "repeated": 4000 - 100 - 39 - 1,
        "with conflicting answers": 100,
    }
    assert (
        "3860 repeated (rows 41, 81, 121, …), 100 with conflicting answers (rows 35, 75, 115, …)"
        in loaded.summary
    )


@pytest.mark.parametrize(
    ("answers", "kept"),
    [
        (("2", "2.0", "2."), ["2"]),
        (("1/2", r"\frac{1}{2}", r"$\dfrac12$", "0.5"), ["1/2"]),
        (("34", "34."), ["34"]),
        ((r"x  + 1", "x + 1"), ["x  + 1"]),
        (("2", "2.0", "3"), []),
        (("12", "1 2"), []),
        (("1/3", "0.3333"), []),  # as a gold answer it would refuse 1/3
        (("28", "28%", "0.28"), []),  # each is equal to the second alone
        (("x + 1", "1 + x"), []),  # only the symbolic engine could tell
    ],
)
def test_answers_that_are_plainly_equal_do_not_conflict(
    tmp_path: Path, answers: tuple[str, ...], kept: list[str]
) -> None:
    rows = [{"prompt": "x", "answer": answer} for answer in (*answers, answers[0])]
    rows.append({"prompt": "y", "answer": "0"})
    loaded = load(tmp_path / "a.jsonl", rows, screening=Screening(deduplicate=True))
    assert [answer for _, text, answer in pairs(loaded) if text == "x"] == kept
    reason = "repeated" if kept else "with conflicting answers"
    assert loaded.left_out.counts == {reason: len(answers) + (not kept)}


def test_the_published_prompt_does_not_hide_a_problem_from_the_check(tmp_path: Path) -> None:
    rows = [published_row("Find $x+1$.", "1"), published_row("Find $y$.", "1")]
    against = {
        "one": frozenset({fingerprint("find x 1")}),
        "two": frozenset({fingerprint("Find x+1"), ""}),
    }

    def loaded(contamination: Literal["drop", "warn", "off"]) -> PromptSet:
        screening = Screening(contamination=contamination, against=against)
        return load(tmp_path / "a.jsonl", rows, preset="dapo_math_17k", screening=screening)

    dropped, warned = loaded("drop"), loaded("warn")
    assert [row for row, *_ in pairs(dropped)] == [1]
    assert (dropped.left_out.counts, dropped.contaminated) == (
        {"contaminated": 1},
        {"one": 1, "two": 1},
    )
    assert dropped.summary.endswith(
        "1 contaminated (row 1); evaluation problems among them, left out: one 1, two 1"
    )
    assert len(warned.prompts) == 2
    assert warned.summary.endswith(
        "left out: none; evaluation problems among them, kept for training: one 1, two 1"
    )
    assert loaded("off").summary.endswith("left out: none")


def test_languages_are_told_by_chinese_characters(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Find x.", "answer": "1"},
        {"prompt": "求 x。", "answer": "1"},
        {"prompt": "Trouvez x é.", "answer": "1"},
    ]
    english = load(tmp_path / "a.jsonl", rows, preset="dapo_math_17k_en")
    assert [row for row, *_ in pairs(english)] == [0, 2]
    chinese = load(tmp_path / "a.jsonl", rows, preset="dapo_math_17k_zh")
    assert [row for row, *_ in pairs(chinese)] == [1]
    assert chinese.left_out.counts == {"of another language": 2}


@pytest.mark.parametrize(
    ("preset", "row", "text", "answer"),
    [
        (
            "gsm8k",
            {"question": "How many?", "answer": "There are <<1+1=2>>2.\n#### 1,234"},
            "boxed",
            "1234",
        ),
        ("gsm8k", {"question": "How many?", "answer": "7", "solution": "…"}, "boxed", "7"),
        (
            "math",
            {"problem": "How many?", "solution": r"\boxed{1} and \boxed{\frac{1}{2}} so"},
            "boxed",
            r"\frac{1}{2}",
        ),
        ("math", {"problem": "How many?", "solution": r"\boxed{1}", "answer": "3"}, "boxed", "3"),
        ("math500", {"problem": "How many?", "answer": r"\sqrt{2}"}, "boxed", r"\sqrt{2}"),
        ("aime24", {"problem": "How many?", "answer": 73}, "dapo", "73"),
        ("aime24", published_row("How many?", "073"), "dapo", "073"),
        ("aime25", {"problem": "How many?", "answer": "336"}, "dapo", "336"),
        ("amc23", {"question": "How many?", "answer": 27.0}, "dapo", "27"),
        ("amc23", {"problem": "How many?", "answer": "27"}, "dapo", "27"),
    ],
)
def test_a_preset_finds_problem_and_answer_in_each_published_form(
    tmp_path: Path, preset: str, row: dict[str, Any], text: str, answer: str
) -> None:
    assert pairs(load(tmp_path / "a.jsonl", [row], preset=preset)) == [
        (0, TEMPLATES[text].replace("{problem}", "How many?"), answer)
    ]


def test_knobs_that_are_set_replace_those_of_the_preset(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "1 #### 2", "gold": "3", "other": "b"}] * 2
    file = tmp_path / "a.jsonl"
    given = load(
        file,
        rows,
        preset="gsm8k",
        screening=Screening(deduplicate=True),
        prompt_key="other",
        answer_key="gold",
        template="{problem}!",
    )
    assert pairs(given) == [(0, "b!", "3")]
    published = [published_row("a", "1")] * 3
    every = load(file, published, preset="dapo_math_17k", screening=Screening(deduplicate=False))
    assert len(every.prompts) == 3


def test_nested_columns_are_named_with_dots(tmp_path: Path) -> None:
    rows: Rows = [
        {"chat": [{"text": "a"}], "gold": {"value": 1}},
        {"chat": [], "gold": {"value": 1}},
    ]
    with pytest.raises(ValueError, match=re.escape("row 2 of")) as error:
        load(tmp_path / "a.jsonl", rows, prompt_key="chat.0.text", answer_key="gold.value")
    assert str(error.value).endswith(
        "has no column 'chat.0.text'; set data.prompt_key to one of gold.value"
    )
    assert pairs(
        load(tmp_path / "a.jsonl", rows[:1], prompt_key="chat.0.text", answer_key="gold.value")
    ) == [(0, "a", "1")]


def test_an_answer_that_the_form_does_not_find_is_empty() -> None:
    assert [answer_of(text, "boxed") for text in ("none", r"\boxed{1", r"\boxed {a{b}}}")] == [
        "",
        "",
        "a{b}",
    ]
    assert answer_of("1 #### 2 #### 3,000", "hashes") == "3000"
    assert [
        answer_of(text, "hashes") for text in ("She has 7.", "2 + 5 = 7", "1,234", "-7.5", "")
    ] == ["", "", "1234", "-7.5", ""]


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"So $x = \boxed 5$, as was asked.", "5"),
        (r"\boxed{1}, no: $\boxed 12.$", "12"),
        (r"\[ x = \boxed \frac{1}{2}. \] So it is.", r"\frac{1}{2}"),
        (r"\begin{align*} x &= \boxed 5.\end{align*}", "5"),
        (r"It costs $\boxed \$5$.", r"\$5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{4} or \fbox {\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"{\boxed 5} is cut wrongly", ""),
        (r"$\boxed$ 5", ""),
        (r"\boxedsymbol 5", ""),
    ],
)
def test_boxes_without_braces_and_framed_boxes_are_boxes(solution: str, answer: str) -> None:
    assert answer_of(solution, "boxed") == answer


def test_hub_with_a_preset_names_its_place_on_the_hub() -> None:
    preset, source = preset_of(parse_source("hub:gsm8k"))
    assert (preset, source.where, source.name) == (
        PRESETS["gsm8k"],
        "hub:openai/gsm8k/main:train",
        "gsm8k",
    )
    assert preset_of(parse_source("hub:gsm8k:test"))[1].where == "hub:openai/gsm8k/main:test"
    assert preset_of(parse_source("gsm8k=hub:me/copy"))[1].where == "hub:me/copy"
    with pytest.raises(
        ValueError,
        match=re.escape(
            "'gsm8' is no preset of data; did you mean 'gsm8k'? "
            "Known are dapo_math_17k, dapo_math_17k_en, dapo_math_17k_zh, gsm8k, math"
        ),
    ):
        preset_of(parse_source("gsm8=/a"))


def test_every_preset_has_a_source_and_a_template_and_every_template_a_text() -> None:
    for preset in PRESETS.values():
        assert re.fullmatch(r"hub:[\w-]+/[\w.-]+(/\w+)?:(train|test)", preset.hub)
        assert preset.template in TEMPLATES
        assert preset.wrapped is None or preset.wrapped in TEMPLATES
    assert {name.removeprefix("chat+") for name in NAMES} == TEMPLATES.keys()
    assert all(text.count("{problem}") == 1 for text in TEMPLATES.values())


@pytest.fixture
def chatting(tmp_path: Path) -> Tokenizer:
    """The quickstart's tokenizer with a chat template, which writes roles as digits."""
    tokenizer = AutoTokenizer.from_pretrained(CONFIGS / "base" / "quickstart")
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ {'system': '1', 'user': '2'}[turn['role']] }}="
        "{{ turn['content'] }}={% endfor %}"
        "{% if add_generation_prompt %}3={% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    return load_tokenizer(tmp_path / "model")


@pytest.mark.parametrize(
    ("template", "system", "text"),
    [
        ("chat", None, "2=45=3="),
        ("chat", "9", "1=9=2=45=3="),
        ("chat", "", "1==2=45=3="),
        ("chat+0{problem}0", None, "2=0450=3="),
    ],
)
def test_a_chat_template_surrounds_the_problem_with_and_without_system_text(
    tmp_path: Path, chatting: Tokenizer, template: str, system: str | None, text: str
) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "45", "answer": "1"}])
    (prompt,) = load_prompts(
        source, tokenizer=chatting, template=template, system=system, max_prompt_tokens=99
    ).prompts
    assert prompt.text == text
    assert prompt.token_ids.tolist() == [
        10 if character == "=" else int(character) for character in text
    ]


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "45", "answer": "1"}])
    with pytest.raises(
        ValueError,
        match=r"data.template=chat needs a chat template, but the model's tokenizer has none",
    ):
        load_prompts(
            source,
            tokenizer=load_tokenizer(CONFIGS / "base" / "quickstart"),
            template="chat",
            max_prompt_tokens=99,
        )


def test_system_text_needs_a_chat_template() -> None:
    with pytest.raises(
        ValueError, match=r"data.system needs a chat template \(data.template is '\{problem\}='\)"
    ):
        knobs.load(QUICKSTART, ["data.system=x"])
    assert knobs.load(QUICKSTART, ["data.system=x", "data.template=chat+boxed"]).data.system == "x"


def test_held_out_prompts_get_the_training_template_and_are_not_screened(
    tmp_path: Path,
) -> None:
    train = write(
        tmp_path / "train.jsonl",
        [{"question": "11", "answer": "#### 1"}, {"question": "12", "answer": "#### 1"}],
    )
    heldout = write(
        tmp_path / "heldout.jsonl",
        [{"problem": "11", "answer": "1"}, {"problem": "求", "answer": "1"}],
    )
    config = knobs.load(
        QUICKSTART,
        [
            f"data.train=gsm8k={train}",
            f"data.heldout=math500={heldout}",
            "data.contamination=drop",
        ],
    )
    config = replace(config, data=replace(config.data, template=None, max_prompt_tokens=999))
    training, held_out = (
        load_set(config, config.data.train, BYTES, training=True),
        load_set(config, config.data.heldout, BYTES),
    )
    boxed = TEMPLATES["boxed"]
    assert [text for _, text, _ in pairs(training)] == [boxed.replace("{problem}", "12")]
    assert [text for _, text, _ in pairs(held_out)] == [
        boxed.replace("{problem}", problem) for problem in ("11", "求")
    ]
    assert (training.contaminated, held_out.contaminated) == ({"math500": 1}, {})


def test_the_fingerprint_of_the_inputs_changes_with_the_training_prompts(
    tmp_path: Path,
) -> None:
    train = write(
        tmp_path / "train.jsonl", [{"prompt": "11", "answer": "1"}, {"prompt": "12", "answer": "1"}]
    )
    evaluation = write(tmp_path / "evaluation.jsonl", [{"prompt": "13", "answer": "1"}])

    def fingerprint_with(mode: str, *more: str) -> str | None:
        overrides = [f"data.train={train}", f"data.contamination={mode},{evaluation}", *more]
        return check_inputs(knobs.load(QUICKSTART, overrides)).fingerprint

    first = fingerprint_with("drop")
    assert fingerprint_with("warn", "data.max_prompt_tokens=9") == first
    assert fingerprint_with("warn", "data.template='{problem}'") != first
    write(evaluation, [{"prompt": "12", "answer": "1"}])
    assert fingerprint_with("drop") != first


@pytest.mark.slow
@needs_data
def test_dapo_math_has_the_evaluation_problems_that_its_column_in_eval_marks() -> None:
    file = DATA / "dapo_math_17k" / "data.jsonl"
    against = {
        name: load_fingerprints(Source(preset=name, path=path))
        for name, path in EVALUATION_SETS.items()
    }
    assert {name: len(known) for name, known in against.items()} == {
        "aime24": 30,
        "aime25": 30,
        "amc23": 40,
        "math500": 500,
        "gsm8k": 1319,
    }
    source = Source(preset="dapo_math_17k", path=file)
    dropped = load_prompts(
        source,
        screening=Screening(deduplicate=False, contamination="drop", against=against),
        tokenizer=BYTES,
        max_prompt_tokens=10**6,
    )
    kept = {prompt.row for prompt in dropped.prompts}
    in_eval = [json.loads(line)["in_eval"] for line in file.read_text().splitlines()]
    assert [row not in kept for row in range(len(in_eval))] == in_eval
    assert (sum(in_eval), dropped.contaminated) == (19, {"math500": 8, "amc23": 11})
    without_amc = {name: known for name, known in against.items() if name != "amc23"}
    fewer = load_prompts(
        source,
        screening=Screening(deduplicate=False, contamination="drop", against=without_amc),
        tokenizer=BYTES,
        max_prompt_tokens=10**6,
    )
    assert fewer.left_out.counts == {"contaminated": 8}


@pytest.mark.slow
@needs_data
def test_screening_of_dapo_math_leaves_as_many_prompts_as_the_recipes_say() -> None:
    against = {
        name: load_fingerprints(Source(preset=name, path=path))
        for name, path in EVALUATION_SETS.items()
    }
    source = Source(preset="dapo_math_17k", path=DATA / "dapo_math_17k" / "data.jsonl")
    found = load_prompts(
        source,
        tokenizer=BYTES,
        max_prompt_tokens=10**6,
        screening=Screening(contamination="drop", against=against),
    )
    assert (len(found.prompts), found.left_out.counts) == (
        17168,
        {"repeated": 101, "with conflicting answers": 2, "contaminated": 19},
    )


@pytest.mark.slow
@needs_data
def test_the_languages_of_dapo_math_are_those_of_its_column_lang() -> None:
    file = DATA / "dapo_math_17k" / "data.jsonl"
    languages = [json.loads(line)["lang"] for line in file.read_text().splitlines()]
    english = load_prompts(
        Source(preset="dapo_math_17k_en", path=file),
        tokenizer=BYTES,
        max_prompt_tokens=10**6,
        screening=Screening(deduplicate=False),
    )
    assert [prompt.row for prompt in english.prompts] == [
        row for row, language in enumerate(languages) if language == "en"
    ]


@needs_data
@pytest.mark.parametrize("name", EVALUATION_SETS)
def test_every_evaluation_set_here_loads_whole_by_its_preset(name: str) -> None:
    source = Source(preset=name, path=EVALUATION_SETS[name])
    loaded = load_prompts(source, tokenizer=BYTES, max_prompt_tokens=10**6)
    assert (len(loaded.prompts), str(loaded.left_out)) == (
        {"gsm8k": 1319, "math500": 500, "amc23": 40}.get(name, 30),
        "none",
    )
