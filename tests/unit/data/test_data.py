"""Data: rows become prompts or are counted, errors are one line, the stream has a fixed order."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from byte_tokenizer import CHARACTERS
from paths import CONFIGS
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dapo_async.data import PromptSet, PromptStream, load_prompts, load_tokenizer
from dapo_async.data.plain_tokenizer import PlainTokenizer
from dapo_async.types import Prompt

QUICKSTART = CONFIGS / "base" / "quickstart"


class Load(Protocol):
    """Writes rows to a file and loads them."""

    def __call__(
        self,
        *rows: object,
        template: str = "{problem}",
        prompt_key: str = "prompt",
        answer_key: str = "answer",
        max_prompt_tokens: int = 100,
    ) -> PromptSet: ...


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def write_and_load(
        *rows: object,
        template: str = "{problem}",
        prompt_key: str = "prompt",
        answer_key: str = "answer",
        max_prompt_tokens: int = 100,
    ) -> PromptSet:
        path = tmp_path / "problems.jsonl"
        path.write_text(
            "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        )
        return load_prompts(
            path,
            tokenizer=CHARACTERS,
            prompt_key=prompt_key,
            answer_key=answer_key,
            template=template,
            max_prompt_tokens=max_prompt_tokens,
        )

    return write_and_load


def prompts(count: int) -> list[Prompt]:
    return [Prompt(row, f"problem {row}", np.array([row], np.int32), "1") for row in range(count)]


def test_a_row_becomes_a_prompt_with_the_template_around_its_problem(load: Load) -> None:
    (prompt,) = load({"prompt": "a{b}", "answer": "7"}, template="Q: {problem} {x}=").prompts
    assert (prompt.row, prompt.text, prompt.answer) == (0, "Q: a{b} {x}=", "7")
    assert prompt.token_ids.tolist() == [81, 58, 32, 97, 123, 98, 125, 32, 123, 120, 125, 61]
    assert prompt.token_ids.dtype == np.int32


def test_the_source_of_a_row_is_read_where_it_has_one(load: Load) -> None:
    sources = [
        prompt.source
        for prompt in load(
            {"prompt": "x", "answer": "1", "data_source": "gsm8k"}, {"prompt": "y", "answer": "2"}
        ).prompts
    ]
    assert sources == ["gsm8k", ""]


def test_columns_are_chosen_by_name_and_numbers_are_taken_as_text(load: Load) -> None:
    (prompt,) = load(
        {"question": "6*7", "gold": 42}, prompt_key="question", answer_key="gold"
    ).prompts
    assert (prompt.text, prompt.answer) == ("6*7", "42")


def test_overlong_and_empty_rows_are_counted_and_others_keep_their_row_number(
    load: Load,
) -> None:
    rows = [
        {"prompt": "four", "answer": "1"},
        {"prompt": "fives", "answer": "1"},
        {"prompt": "ok", "answer": " "},
        {"prompt": "ok", "answer": None},
        {"prompt": "", "answer": "1"},
        "",
        {"prompt": "last", "answer": 0},
    ]
    loaded = load(*rows, max_prompt_tokens=4)
    assert [(prompt.row, prompt.text, prompt.answer) for prompt in loaded.prompts] == [
        (0, "four", "1"),
        (5, "last", "0"),
    ]
    assert loaded.left_out.counts == {"empty": 3, "over-long": 1}
    assert loaded.summary == (
        "2 prompts of 4 to 4 tokens from problems.jsonl; "
        "left out: 3 empty (rows 3, 4, 5), 1 over-long (row 2)"
    )


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([], "has no usable prompt; it has no rows: "),
        ([{"prompt": "x", "answer": ""}], "has no usable prompt; left out: 1 empty (row 1); "),
        (
            [{"prompt": "x" * 101, "answer": "1"}] * 5,
            "left out: 5 over-long (rows 1, 2, 3, …); "
            "over-long means more than data.max_prompt_tokens (100)",
        ),
        (
            [{"prompt": "x", "answer": "1"}, {"gold": "1"}, {"gold": "1"}],
            ", the first of 2 such rows, has no column 'prompt'; set data.prompt_key to",
        ),
        (
            [{"prompt": "x", "answer": "1"}, {"prompt": "y", "gold": "1"}],
            "has no column 'answer'; set data.answer_key to one of prompt, gold",
        ),
        (
            [{"question": "x", "answer": "1"}],
            "has no column 'prompt'; set data.prompt_key to one of question, answer",
        ),
        ([{"prompt": "x", "answer": ["1"]}], "column 'answer' in row 1 of"),
        ([{"prompt": True, "answer": "1"}], "holds a bool; write text or a number"),
        ([{"prompt": "x", "answer": "1"}, "{oops"], "line 2 of"),
        (["[1]"], "holds a list; write one JSON object per line"),
        (
            ['{"prompt": ' + "[" * 100_000],
            "problems.jsonl is not valid JSON (maximum recursion depth exceeded",
        ),
        (
            [{"prompt": "x", "answer": "1"}, '{"prompt": "x", "answer": ' + "9" * 5000 + "}"],
            "line 2 of",
        ),
        (
            ['{"prompt": "x", "answer": ' + "9" * 5000 + "}"],
            "problems.jsonl is not valid JSON (a number of 5000 digits",
        ),
    ],
)
def test_a_mistake_in_the_file_is_one_clear_line(load: Load, rows: list[Any], line: str) -> None:
    with pytest.raises(ValueError, match=re.escape(line)) as error:
        load(*rows)
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_part_of_the_first_row(load: Load) -> None:
    assert [
        prompt.text
        for prompt in load(
            "\ufeff" + '{"prompt": "x", "answer": "1"}', {"prompt": "y", "answer": "2"}
        ).prompts
    ] == ["x", "y"]


def test_a_number_that_is_none_is_empty(load: Load) -> None:
    loaded = load(
        '{"prompt": "x", "answer": NaN}',
        '{"prompt": "y", "answer": 1e999}',
        '{"prompt": NaN, "answer": 1}',
        {"prompt": "z", "answer": "nan"},
    )
    assert [(prompt.row, prompt.answer) for prompt in loaded.prompts] == [(3, "nan")]
    assert loaded.left_out.counts == {"empty": 3}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.jsonl does not exist; give the path"):
        load_prompts(
            tmp_path / "nowhere.jsonl",
            tokenizer=CHARACTERS,
            prompt_key="prompt",
            answer_key="answer",
            template="{problem}",
            max_prompt_tokens=9,
        )


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_hugging_face_tokenizer_encodes_prompts_and_decodes_the_marker(
    tmp_path: Path,
) -> None:
    tokenizer = load_tokenizer(QUICKSTART)
    (tmp_path / "one.jsonl").write_text('{"prompt": "314", "answer": "1"}\n')
    loaded = load_prompts(
        tmp_path / "one.jsonl",
        tokenizer=tokenizer,
        prompt_key="prompt",
        answer_key="answer",
        template="{problem}=",
        max_prompt_tokens=9,
    )
    assert loaded.prompts[0].token_ids.tolist() == [3, 1, 4, 10]
    assert tokenizer.decode([3, 4, 1, 11, 1, 12], skip_special_tokens=True) == "341####1"


def changed_tokenizer(folder: Path, **values: Any) -> Path:
    """The quickstart's tokenizer with further values in its tokenizer_config.json."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(QUICKSTART / name, folder / name)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | values
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("base", ["quickstart", "random"])
def test_a_plain_tokenizer_gives_what_transformers_would_give(base: str) -> None:
    folder = QUICKSTART.with_name(base)
    chosen, own = (
        PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True),
        load_tokenizer(folder),
    )
    assert isinstance(own, PlainTokenizer)
    assert own.get_vocab() == chosen.get_vocab()
    assert (own.bos_token_id, own.eos_token_id) == (chosen.bos_token_id, chosen.eos_token_id)
    texts = ["31#4=", "####", "", "12<eos>3 4", "<eos><eos>", "é ü\n\t🙂  x ."]
    for special in (True, False):
        found = own(texts, add_special_tokens=special)["input_ids"]
        assert found == chosen(texts, add_special_tokens=special)["input_ids"]
        for ids in [*found, [*range(11, 13)], [*range(12, -1, -1)]]:
            assert own.decode(ids, skip_special_tokens=special) == chosen.decode(
                ids, skip_special_tokens=special
            )


@pytest.mark.parametrize(
    "values",
    [{"add_bos_token": True, "bos_token": "0"}, {"bos_token": "<s>"}, {"chat_template": "x"}],
    ids=["adds a token", "names a new token", "has a chat template"],
)
def test_any_other_generic_tokenizer_is_the_one_that_transformers_would_choose(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    folder = changed_tokenizer(tmp_path, **values)
    chosen, own = (
        AutoTokenizer.from_pretrained(folder, local_files_only=True),
        load_tokenizer(folder),
    )
    assert isinstance(own, PreTrainedTokenizerBase)
    classes: list[type] = [type(own), type(chosen)]
    assert classes[0] is classes[1]
    assert own.get_vocab() == chosen.get_vocab()
    assert own(["31#4="]) == chosen(["31#4="])


def test_every_epoch_of_the_stream_is_another_shuffle_of_all_prompts() -> None:
    stream = PromptStream(prompts(7), seed=3)
    epochs = [[stream[7 * epoch + offset].row for offset in range(7)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_position_of_the_stream_has_the_same_prompt_in_any_order_of_access() -> None:
    whole = PromptStream(prompts(7), seed=5)
    rows = [whole[position].row for position in range(30)]
    resumed = PromptStream(prompts(7), seed=5)
    assert [resumed[position].row for position in (15, 3, 16, 29, 0)] == [
        rows[15],
        rows[3],
        rows[16],
        rows[29],
        rows[0],
    ]


def test_another_seed_gives_another_order() -> None:
    first, second = (
        [stream[position].row for position in range(20)]
        for stream in (PromptStream(prompts(20), seed=seed) for seed in (0, 1))
    )
    assert first != second


def test_a_stream_without_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptStream([], seed=0)


def test_importing_data_does_not_import_transformers() -> None:
    code = (
        "import sys, dapo_async.data; "
        "sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_a_single_prompt_repeats_for_ever() -> None:
    stream = PromptStream(prompts(1), seed=0)
    assert [stream[position].row for position in range(5)] == [0] * 5
