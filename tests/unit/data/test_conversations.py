"""A chat keeps its turns: the last user turn is the problem, the others are its context."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from byte_tokenizer import BYTES
from paths import CONFIGS, QUICKSTART
from pyarrow import parquet
from refusals import refusal as refused
from transformers import AutoTokenizer

from dapo_async import config as knobs
from dapo_async.config import Source
from dapo_async.data import PromptSet, Screening, Tokenizer, load_prompts, load_set, load_tokenizer
from dapo_async.data.screening import fingerprint
from dapo_async.runtime.preflight import check_inputs

Turns = list[dict[str, Any]]
SYSTEM, FIRST, REPLY, LAST = (
    {"role": role, "content": content}
    for role, content in (("system", "9"), ("user", "1"), ("assistant", "8"), ("user", "45"))
)


@pytest.fixture
def chatting(tmp_path: Path) -> Tokenizer:
    """The quickstart's tokenizer with a chat template, which writes roles as digits."""
    tokenizer = AutoTokenizer.from_pretrained(CONFIGS / "base" / "quickstart")
    tokenizer.chat_template = (
        "{% for turn in messages %}"
        "{{ {'system': '1', 'user': '2', 'assistant': '3', 'tool': '4'}[turn['role']] }}="
        "{{ turn['content'] }}={% endfor %}{% if add_generation_prompt %}3={% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    return load_tokenizer(tmp_path / "model")


def write(file: Path, *rows: dict[str, Any]) -> Path:
    if file.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def load(
    file: Path, tokenizer: Tokenizer = BYTES, *, preset: str | None = None, **options: Any
) -> PromptSet:
    source = Source(preset=preset, path=file)
    return load_prompts(source, tokenizer=tokenizer, max_prompt_tokens=2000, **options)


def texts(loaded: PromptSet) -> list[str]:
    return [prompt.text for prompt in loaded.prompts]


def refusal(file: Path, tokenizer: Tokenizer = BYTES, **options: Any) -> str:
    """The message, in one line."""
    with pytest.raises(ValueError) as error:
        load(file, tokenizer, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def verl_row(*turns: dict[str, Any], answer: str = "5") -> dict[str, Any]:
    """A row as verl publishes it."""
    return {
        "data_source": "math_dapo",
        "prompt": list(turns),
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "0"},
    }


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_the_form_of_verl_needs_no_preset_and_no_knob(tmp_path: Path, name: str) -> None:
    rows = [verl_row({"role": "user", "content": f"{row}+1"}, answer=str(row)) for row in range(12)]
    loaded = load(write(tmp_path / name, *rows))
    assert [(prompt.text, prompt.answer, prompt.source) for prompt in loaded.prompts] == [
        (f"{row}+1", str(row), "math_dapo") for row in range(12)
    ]
    assert str(loaded.left_out) == "none"


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
@pytest.mark.parametrize("preset", [None, "dapo_math_17k"])
def test_a_system_turn_is_kept_and_the_user_turn_is_the_problem(
    tmp_path: Path, chatting: Tokenizer, name: str, preset: str | None
) -> None:
    rows = [
        verl_row(SYSTEM, {"role": "user", "content": str(row)}, answer=str(row))
        for row in range(12)
    ]
    file = write(tmp_path / name, *rows)
    loaded = load(file, chatting, preset=preset, template="chat")
    assert texts(loaded) == [f"1=9=2={row}=3=" for row in range(12)]
    assert str(loaded.left_out) == "none"
    assert texts(load(file, chatting, preset=preset, prompt_key="prompt.-1.content")) == texts(
        load(file, chatting, preset=preset, prompt_key="prompt.1.content")
    )


def test_a_set_of_chats_chooses_the_chat_template_by_itself(
    tmp_path: Path, chatting: Tokenizer
) -> None:
    file = write(tmp_path / "rows.jsonl", verl_row(SYSTEM, LAST), verl_row(FIRST))
    assert texts(load(file, chatting)) == ["1=9=2=45=3=", "2=1=3="]
    plain = write(tmp_path / "plain.jsonl", verl_row(LAST))
    assert texts(load(plain, chatting)) == ["45"]


def test_held_out_prompts_get_the_chat_template_of_the_training_set(
    tmp_path: Path, chatting: Tokenizer
) -> None:
    train = write(tmp_path / "train.parquet", verl_row(SYSTEM, LAST))
    heldout = write(tmp_path / "heldout.jsonl", {"prompt": "7", "answer": "1"})
    config = knobs.load(
        CONFIGS / "quickstart.yaml", [f"data.train={train}", f"data.heldout={heldout}"]
    )
    config = replace(config, data=replace(config.data, template=None))
    assert texts(load_set(config, config.data.train, chatting, training=True)) == ["1=9=2=45=3="]
    assert texts(load_set(config, config.data.heldout, chatting)) == ["2=7=3="]


def test_the_system_turn_of_a_row_goes_before_the_system_text_of_the_config(
    tmp_path: Path, chatting: Tokenizer
) -> None:
    file = write(tmp_path / "rows.jsonl", verl_row(SYSTEM, LAST), verl_row(LAST))
    loaded = load(file, chatting, template="chat+{problem}0", system="6")
    assert texts(loaded) == ["1=9=2=450=3=", "1=6=2=450=3="]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ([SYSTEM, FIRST, REPLY, LAST], "1=9=2=1=3=8=2=45=3="),
        ([FIRST, LAST], "2=1=2=45=3="),
        ([{"role": "developer", "content": "9"}, LAST], "1=9=2=45=3="),
        ([FIRST, {"role": "tool", "content": "8"}, LAST], "2=1=4=8=2=45=3="),
        ([SYSTEM, LAST, {"role": "assistant", "content": ""}], "1=9=2=45=3="),
        ([{"role": "user", "content": [{"type": "text", "text": "45"}]}], "2=45=3="),
        ([{"role": "user", "content": [{"text": "4"}, {"text": "5"}]}], "2=4\n5=3="),
        ([{"from": "system", "value": "9"}, {"from": "human", "value": "45"}], "1=9=2=45=3="),
        (
            [
                {"from": "human", "value": "1"},
                {"from": "gpt", "value": "8"},
                {"from": "human", "value": "45"},
            ],
            "2=1=3=8=2=45=3=",
        ),
        ({"role": ["system", "user"], "content": ["9", "45"]}, "1=9=2=45=3="),
        ({"role": "user", "content": "45"}, "2=45=3="),
        (json.dumps([SYSTEM, LAST]), "1=9=2=45=3="),
        ([{"role": " User", "content": "45", "name": "x", "tool_calls": None}], "2=45=3="),
        ([{"role": "user", "content": "45", "images": []}], "2=45=3="),
        ("45", "2=45=3="),
    ],
)
def test_every_common_form_of_a_chat_is_read(
    tmp_path: Path, chatting: Tokenizer, name: str, prompt: Any, text: str
) -> None:
    for column in ("prompt", "messages", "conversations"):
        file = write(tmp_path / name, {column: prompt, "answer": "1"})
        assert texts(load(file, chatting, template="chat")) == [text]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([{"role": "user"}], "column 'prompt' in row 1 of {} holds a list; write text or a number"),
        ([LAST, {"content": "1"}], "has no role and content in turn 2; write both (or from and"),
        ([None, LAST], "has no role and content in turn 1; write both (or from and value)"),
        ([{"role": "critic", "content": "1"}], "has the role 'critic' in turn 1; write one of"),
        ([{"role": None, "content": "1"}], "has the role None in turn 1; write one of system"),
        ([{"role": "user", "content": True}], "has a bool as content of turn 1; write a text, or"),
        ([{"role": "user", "content": [["1"]]}], "has a list as content of turn 1; write a text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "has a part of type 'image_url' in turn 1; only text is read: remove the part",
        ),
        (
            [FIRST, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, LAST],
            "has tool calls in turn 2, which would be lost; write them into its content",
        ),
        (
            {"role": ["user"], "content": ["1", "2"]},
            "has role and content of different lengths; write one of each",
        ),
        (
            "[{'role': 'user', 'content': 'x'}]",
            "is a Python list as text; write it as JSON or as a nested column",
        ),
        (
            {"messages": [LAST]},
            "holds a dict; write text or a number, or set data.prompt_key to prompt.messages",
        ),
    ],
)
def test_a_chat_that_can_not_be_read_is_named(tmp_path: Path, prompt: Any, message: str) -> None:
    file = write(tmp_path / "rows.jsonl", {"prompt": prompt, "answer": "1"})
    line = refusal(file)
    assert message.format(file) in line
    assert line.startswith(f"column 'prompt' in row 1 of {file} ")


def test_a_chat_that_does_not_end_in_a_user_turn_is_left_out(tmp_path: Path) -> None:
    row = {"messages": [LAST, REPLY], "answer": "1"}
    file = write(tmp_path / "rows.jsonl", row, {"messages": [LAST], "answer": "1"}, row)
    loaded = load(file)
    assert texts(loaded) == ["45"]
    assert str(loaded.left_out) == "2 not ending in a user turn (rows 1, 3)"
    file = write(tmp_path / "rows.parquet", row, {"messages": [SYSTEM], "answer": "1"})
    assert refusal(file) == (
        f"{file} has no usable prompt; left out: 2 not ending in a user turn (rows 1, 2); "
        "remove the last turns, or set data.prompt_key=messages.-2.content"
    )
    assert texts(load(file.with_suffix(".jsonl"), prompt_key="messages.0.content")) == ["45"] * 3


def test_a_template_without_place_for_turns_is_refused_with_the_remedy(
    tmp_path: Path, chatting: Tokenizer
) -> None:
    file = write(tmp_path / "rows.jsonl", verl_row(LAST), verl_row(SYSTEM, FIRST, REPLY, LAST))
    alone = "set data.prompt_key=prompt.-1.content to leave the turns out"
    assert refusal(file, chatting, template="dapo") == (
        f"row 2 of {file} has turns before its problem (system, user, assistant), which need a "
        f"chat template, but data.template is 'dapo'; set data.template=chat+dapo, or {alone}"
    )
    assert refusal(file, chatting, template="Q: {problem}").endswith(f"template=chat, or {alone}")
    assert f"has none; use an instruction-tuned model, or {alone}" in refusal(file, template="chat")
    assert texts(load(file, template="dapo", prompt_key="prompt.-1.content")) == texts(
        load(write(tmp_path / "plain.jsonl", *[verl_row(LAST)] * 2), template="dapo")
    )


def test_the_last_turn_of_a_text_is_the_text(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", {"prompt": "45", "answer": "1"})
    assert texts(load(file, prompt_key="prompt.-1.content")) == ["45"]
    assert "has no column 'prompt.-1.text'" in refusal(file, prompt_key="prompt.-1.text")


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
@pytest.mark.parametrize("gold", [{"ground_truth": 5.0}, '{"ground_truth": "5"}'])
def test_a_nested_answer_is_read_from_objects_and_from_json_text(
    tmp_path: Path, name: str, gold: Any
) -> None:
    file = write(tmp_path / name, {"prompt": "x", "reward_model": gold})
    for key in (None, "reward_model.ground_truth"):
        assert [prompt.answer for prompt in load(file, answer_key=key).prompts] == ["5"]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_a_missing_column_is_named_with_the_nested_columns_that_are_there(
    tmp_path: Path, name: str
) -> None:
    row = {"chat": [SYSTEM, LAST], "meta": {"gold": {"value": "5"}}, "data_source": "math"}
    file = write(tmp_path / name, row, row)
    assert refusal(file, prompt_key="chat") == (
        f"row 1 of {file}, the first of 2 such rows, has no column 'answer'; "
        "set data.answer_key to one of chat.-1.content, meta.gold.value, data_source"
    )
    assert refusal(file, answer_key="meta.gold.value").endswith(
        "has no column 'prompt'; set data.prompt_key to one of chat, meta.gold.value, data_source"
    )
    loaded = load(file, answer_key="meta.gold.value", prompt_key="chat.-1.content")
    assert texts(loaded) == ["45", "45"]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            "{% if messages[0]['role'] == 'system' %}"
            "{{ raise_exception('System role not supported') }}{% endif %}"
            "{{ messages[-1].content }}",
            "fails: System role not supported",
        ),
        ("{{ messages[-1]['content'] }}", "leaves out the system turn '9'"),
        (
            "{{ messages[0].content }}{{ messages[-1].content }}",
            "leaves out the user turn '1'",
        ),
    ],
)
def test_a_chat_template_that_loses_a_turn_is_refused_with_the_row(
    tmp_path: Path, chatting: Any, template: str, why: str
) -> None:
    chatting.chat_template = template
    file = write(tmp_path / "rows.jsonl", verl_row(LAST), verl_row(SYSTEM, FIRST, REPLY, LAST))
    line = refusal(file, chatting, template="chat")
    assert line.startswith(
        f"row 2 of {file} has turns before its problem (system, user, assistant), "
        "but the chat template in "
    )
    assert why in line
    assert line.endswith("or set data.prompt_key=prompt.-1.content to leave the turns out")


def test_copies_and_conflicts_are_found_in_whole_chats(tmp_path: Path, chatting: Tokenizer) -> None:
    again = {"role": "user", "content": "11"}
    other = {"role": "system", "content": "7"}
    file = write(
        tmp_path / "rows.jsonl",
        verl_row(SYSTEM, FIRST, REPLY, again, answer="1"),
        verl_row(SYSTEM, LAST, REPLY, again, answer="2"),  # another first turn: no conflict
        verl_row(other, FIRST, REPLY, again, answer="3"),  # another system turn: no conflict
        verl_row(SYSTEM, FIRST, REPLY, again, answer="1.0"),  # a copy
        verl_row(SYSTEM, LAST, answer="4"),
        verl_row(SYSTEM, LAST, answer="5"),  # a conflict
    )
    loaded = load(file, chatting, template="chat", screening=Screening(deduplicate=True))
    assert [prompt.answer for prompt in loaded.prompts] == ["1", "2", "3"]
    assert str(loaded.left_out) == "1 repeated (row 4), 2 with conflicting answers (rows 5, 6)"


def test_an_evaluation_problem_is_found_in_every_user_turn(
    tmp_path: Path, chatting: Tokenizer
) -> None:
    file = write(
        tmp_path / "rows.jsonl",
        verl_row(SYSTEM, FIRST, REPLY, LAST),
        verl_row(SYSTEM, LAST),
        verl_row({"role": "system", "content": "1"}, {"role": "user", "content": "6"}),
    )
    screening = Screening(contamination="drop", against={"one": frozenset({fingerprint("1")})})
    loaded = load(file, chatting, template="chat", screening=screening)
    assert [prompt.row for prompt in loaded.prompts] == [1, 2]
    assert loaded.contaminated == {"one": 1}


def test_the_language_of_a_chat_is_that_of_its_user_turns(
    tmp_path: Path, chatting: Tokenizer
) -> None:
    chinese = {"role": "user", "content": "求"}
    file = write(tmp_path / "rows.jsonl", verl_row(chinese, REPLY, LAST), verl_row(SYSTEM, LAST))
    loaded = load(file, chatting, preset="dapo_math_17k_en", template="chat")
    assert [prompt.row for prompt in loaded.prompts] == [1]


def test_a_preset_removes_its_prompt_text_within_a_chat(
    tmp_path: Path, chatting: Tokenizer
) -> None:
    from dapo_async.data import TEMPLATES

    wrapped = {"role": "user", "content": TEMPLATES["dapo"].replace("{problem}", "45")}
    file = write(tmp_path / "rows.parquet", verl_row(SYSTEM, wrapped))
    assert texts(load(file, chatting, preset="dapo_math_17k", template="chat")) == ["1=9=2=45=3="]
    (text,) = texts(load(file, chatting, preset="dapo_math_17k"))
    assert text == f"1=9=2={wrapped['content']}=3="


def test_a_number_of_a_problem_may_look_like_a_list(tmp_path: Path) -> None:
    problems = ["[1, 2] has what length?", "[{1}]", '{"a": 1}', "[{'a': 1}]", '["a"]']
    file = write(tmp_path / "rows.jsonl", *({"prompt": one, "answer": "1"} for one in problems))
    assert texts(load(file)) == problems
    assert re.search(r"left out: none$", load(file).summary)


def test_the_cases_of_the_field_end_as_they_should(tmp_path: Path) -> None:
    half = write(tmp_path / "half.jsonl", {"prompt": "q \ud83d 1", "answer": "1"})
    assert refused(f"data.train={half}").startswith(
        f"{half} has no usable prompt; left out: 1 with half a character (a lone surrogate) (row 1)"
    )
    numbers = [{"role": "user", "content": str(row)} for row in range(12)]
    plain = write(tmp_path / "plain.parquet", *map(verl_row, numbers))
    inputs = check_inputs(knobs.load(QUICKSTART, ["ray.address=local", f"data.train={plain}"]))
    assert inputs.train is not None
    assert texts(inputs.train) == [f"{row}=" for row in range(12)]
    system = write(tmp_path / "system.parquet", *(verl_row(SYSTEM, number) for number in numbers))
    place = f"row 1 of {system} has turns before its problem (system), which need a chat template"
    assert refused(f"data.train=dapo_math_17k={system}") == (
        f"{place}, but data.template is '{{problem}}='; set data.template=chat, or set "
        "data.prompt_key=prompt.-1.content to leave the turns out"
    )
    assert refused(f"data.train=dapo_math_17k={system}", "data.template=null").startswith(
        f"{place}, but the model's tokenizer has none; use an instruction-tuned model, or"
    )
    alone = [f"data.train=dapo_math_17k={system}", "data.prompt_key=prompt.-1.content"]
    inputs = check_inputs(knobs.load(QUICKSTART, ["ray.address=local", *alone]))
    assert inputs.train is not None
    assert texts(inputs.train) == [f"{row}=" for row in range(12)]
