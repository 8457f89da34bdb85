"""Chat templates and tokenizers of model folders: a good one is used, a bad one is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paths import CONFIGS
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from dapo_async.data import chat
from dapo_async.data.chat import check_chat_template
from dapo_async.data.templates import Template
from dapo_async.data.tokenizer import (
    check_added_tokens,
    check_tokenizer,
    load_tokenizer,
    special_token_lines,
    usable_tokenizer,
)
from dapo_async.model import ModelConfig, special_tokens

RANDOM = CONFIGS / "base" / "random"
TURNS = "{% for m in messages %}<u>{{ m['content'] }}{% endfor %}"
EOS = 256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RANDOM, tmp_path / "model"))


def change(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**values, **changes}))


def check(folder: Path, template: Any, *, system: str | None = None) -> None:
    change(folder / "tokenizer_config.json", chat_template=template)
    tokenizer = usable_tokenizer(folder)
    check_chat_template(tokenizer, system=system, stop_token_ids=[EOS])


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        TURNS,
        TURNS + "<a><think>\n",  # an open thinking block
        TURNS + "<a><think>\n\n</think>\n\n",
        "{{ messages[0]['content'] | trim }}",
        "[{'{{ messages[-1].content }}'}]",
        "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}<a>",
        "{% if add_generation_prompt %}<a>{% endif %}" + TURNS,
        "{% generation %}{% endgeneration %}" + TURNS,
        [{"name": "default", "template": TURNS}, {"name": "tool_use", "template": "{{ 1/0 }}"}],
        TURNS + "{{ strftime_now('%d %b %Y') }}",
        "You are a helpful assistant. {{ tools }}{{ undefined }}" + TURNS,
    ],
    ids=str,
)
def test_templates_that_work_are_accepted(template: Any, folder: Path) -> None:
    check(folder, template)


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ raise_exception('no, thanks') }}", "fails: no, thanks; correct the template"),
        ("{% for m in messages %}", "fails: "),
        ("{{ messages[0", "fails: "),
        ("{% include 'x' %}", "fails: "),
        ("{% unknown %}", "fails: "),
        ("{{ messages | no_such_filter }}", "fails: "),
        ("{{ 1 / 0 }}", "fails: division by zero"),
        ("{{ messages[7]['content'] }}" + TURNS, "fails: "),
        ("{{ messages.__class__.__mro__ }}{{ ''.__class__.x }}", "fails: "),
        ("{{ messages.append(1) }}", "fails: "),
        ("{% for i in range(10**9) %}x{% endfor %}", "fails: "),
        (
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "fails: maximum recursion depth exceeded",
        ),
        ("{{ raise_exception('two\nlines') }}", "fails: two lines; "),
        ("{{ '' }}", "leaves out the user's turn"),
        ("   ", "leaves out the user's turn"),
        ("<u>{{ messages[0]['role'] }}<a>", "leaves out the user's turn"),
        ("{{ messages[0]['content'][:5] }}", "leaves out the user's turn"),
        ("{{ messages[0]['content'] | upper }}", "leaves out the user's turn"),
        ("{{ messages[0]['content'][0]['text'] }}", "leaves out the user's turn"),
        (TURNS + "{{ eos_token }}", "ends the prompt with the stop token '<eos>'"),
        (TURNS + "{{ eos_token }}\n", "ends the prompt with the stop token '<eos>'"),
        (TURNS + "{{ range(1000000) | random }}", "fails: "),
        (
            TURNS + "{{ range(99999) | random }}{{ range(99999) | random }}",
            "another text each time",
        ),
        (TURNS + "{{ [1, 2, 3, 4, 5, 6, 7, 8] | random }}", "another text each time"),
        ("\ufeff" + TURNS, "begins with a byte order mark, which would be in every prompt; save"),
        (TURNS + "{{ 'x' * 2000000 }}", "makes 2000017 characters of a problem of 14"),
        ({"rag": TURNS}, "has no template named default (it has rag)"),
        ([{"name": "rag", "template": TURNS}], "has no template named default (it has rag)"),
    ],
    ids=str,
)
def test_templates_that_do_not_work_are_one_line(template: Any, what: str, folder: Path) -> None:
    line = refusal(lambda: check(folder, template))
    assert what in line
    if isinstance(template, str):
        assert line.startswith(f"the chat template in {folder / 'tokenizer_config.json'} ")
        assert line.count("data.template=boxed") == ("byte order mark" not in line)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set x = 'x' * 10**9 %}{% set y = x * 100 %}" + TURNS,
    ],
)
def test_a_template_that_does_not_end_is_stopped(
    template: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "TRIAL_S", 0.5)
    assert "did not end within 0.5 s and 2 GiB; correct" in refusal(lambda: check(folder, template))


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (
            "{% if messages[0]['role'] == 'system' %}"
            "{{ raise_exception('System role not supported') }}{% endif %}" + TURNS,
            "fails: System role not supported; without a system turn it works: "
            "set data.system=null",
        ),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
            "leaves out the system turn; set data.system=null",
        ),
        ("{{ messages[-1]['content'] }}", "leaves out the system turn; set data.system=null"),
        ("{{ messages[0]['content'] }}", "leaves out the user's turn"),
        (
            "{% if messages[0]['role'] == 'system' %}{% for a in range(99999) %}"
            "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}" + TURNS,
            "without a system turn it works: set data.system=null",
        ),
    ],
)
def test_a_template_without_system_turns_says_so(
    template: str, what: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "TRIAL_S", 0.5)
    assert what in refusal(lambda: check(folder, template, system="Be brief."))
    check(folder, TURNS, system="Be brief.")


def test_an_unknown_character_is_no_stop_token(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CONFIGS / "base" / "quickstart", tmp_path / "quickstart"))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    tokenizer = usable_tokenizer(folder)  # it reads "?" as <eos>
    check_chat_template(tokenizer, system=None, stop_token_ids=[12])
    check_added_tokens(tokenizer, "?")


def test_a_bad_template_is_one_line_for_every_problem_too(folder: Path) -> None:
    template = "{% if 'x' in messages[0].content %}{{ raise_exception('an x') }}{% endif %}" + TURNS
    check(folder, template)
    tokenizer = load_tokenizer(folder)
    texts, _ = Template("chat").tokenised(["1 + 1", "2"], tokenizer)
    assert texts == ["<u>1 + 1", "<u>2"]
    line = refusal(lambda: Template("chat").tokenised(["1", "x = 2"], tokenizer))
    assert "fails: an x; " in line


def test_the_file_of_the_template_is_that_of_transformers(folder: Path) -> None:
    change(folder / "tokenizer_config.json", chat_template="{{ 1/0 }}")
    (folder / "chat_template.jinja").write_text("jinja" + TURNS)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag" + TURNS)
    tokenizer = usable_tokenizer(folder)
    check_chat_template(tokenizer, system=None, stop_token_ids=[EOS])
    assert Template("chat").tokenised(["1"], tokenizer)[0] == ["jinja<u>1"]
    (folder / "chat_template.jinja").write_text("{{ 1/0 }}")
    tokenizer = usable_tokenizer(folder)
    line = refusal(lambda: check_chat_template(tokenizer, system=None, stop_token_ids=[EOS]))
    assert line.startswith(f"the chat template in {folder / 'chat_template.jinja'} fails: division")


def test_named_templates_without_a_default_say_which_file_is_missing(folder: Path) -> None:
    change(folder / "tokenizer_config.json", chat_template=TURNS)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag" + TURNS)
    tokenizer = usable_tokenizer(folder)  # as in transformers, TURNS does not count then
    assert refusal(lambda: check_chat_template(tokenizer, system=None, stop_token_ids=[EOS])) == (
        f"the chat template in {folder / 'additional_chat_templates'} has no template named "
        "default (it has rag); copy chat_template.jinja of the base model into the folder, or use "
        "another template (data.template=boxed)"
    )


@pytest.mark.parametrize("template", [[1, 2], [{"template": TURNS}], [{"name": "default"}]])
def test_a_list_of_templates_in_another_form_is_named(template: Any, folder: Path) -> None:
    change(folder / "tokenizer_config.json", chat_template=template)
    assert (
        f"chat_template in {folder / 'tokenizer_config.json'} is neither a text nor a list of "
        "{name, template}; copy the tokenizer files"
    ) in refusal(lambda: usable_tokenizer(folder))


def test_the_date_in_a_prompt_does_not_change(folder: Path) -> None:
    change(folder / "tokenizer_config.json", chat_template="{{ strftime_now('%d %b %Y') }}" + TURNS)
    texts, _ = Template("chat").tokenised(["1"], usable_tokenizer(folder))
    assert texts == ["26 Jul 2024<u>1"]


def add_special_tokens(folder: Path, *, pair: str) -> None:
    """Lets the tokenizer add `<bos>` or `<eos>` to a text."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, bos_token="<bos>")
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=pair, special_tokens=[("<bos>", 257), ("<eos>", 256)]
    )
    tokenizer.save_pretrained(folder)


def test_a_token_at_the_begin_of_the_text_is_not_doubled(folder: Path) -> None:
    add_special_tokens(folder, pair="<bos> $A")
    line = refusal(lambda: check(folder, "{{ bos_token }}{{ bos_token }}" + TURNS))
    assert "writes '<bos>' twice at the begin of the text; correct the template" in line
    check(folder, "{{ bos_token }}" + TURNS)
    tokenizer = usable_tokenizer(folder)
    _, ids = Template("chat").tokenised(["1"], tokenizer)
    assert ids[0].count(257) == 1  # the tokenizer adds no second one
    check_added_tokens(tokenizer, "Problem: ")
    line = refusal(lambda: check_added_tokens(tokenizer, "<bos>Problem: "))
    assert line.startswith("data.template begins with '<bos>', which the tokenizer adds itself")


def test_a_tokenizer_that_ends_every_prompt_is_refused(folder: Path) -> None:
    add_special_tokens(folder, pair="$A <eos>")
    tokenizer = usable_tokenizer(folder)
    line = refusal(lambda: check_added_tokens(tokenizer, ""))
    assert line.startswith("the tokenizer ends every prompt with '<eos>'")


def test_the_vocabulary_of_the_model_may_be_padded_but_not_too_small(folder: Path) -> None:
    model = ModelConfig.from_folder(folder)
    tokenizer = usable_tokenizer(folder)
    check_tokenizer(tokenizer, model, folder=folder)
    change(folder / "config.json", vocab_size=320)
    check_tokenizer(tokenizer, ModelConfig.from_folder(folder), folder=folder)
    add_special_tokens(folder, pair="<bos> $A")
    tokenizer = usable_tokenizer(folder)
    line = refusal(lambda: check_tokenizer(tokenizer, model, folder=folder))
    assert "has token 257 ('<bos>'), but vocab_size of the model is 257" in line


def test_a_tokenizer_without_a_config_is_accepted(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()  # transformers then adds <|endoftext|> as 257
    tokenizer = usable_tokenizer(folder)
    check_tokenizer(tokenizer, ModelConfig.from_folder(folder), folder=folder)


def test_an_eos_token_outside_the_vocabulary_is_refused(folder: Path) -> None:
    change(folder / "tokenizer_config.json", eos_token="<end>")
    tokenizer, model = usable_tokenizer(folder), ModelConfig.from_folder(folder)
    line = refusal(lambda: check_tokenizer(tokenizer, model, folder=folder))
    assert "has token 257 ('<end>'), but vocab_size of the model is 257" in line


def test_a_model_that_never_stops_is_refused(folder: Path) -> None:
    change(folder / "config.json", eos_token_id=None)
    change(folder / "tokenizer_config.json", eos_token=None)
    (folder / "generation_config.json").unlink()
    tokenizer, model = usable_tokenizer(folder), ModelConfig.from_folder(folder)
    line = refusal(lambda: check_tokenizer(tokenizer, model, folder=folder))
    assert "so a response could never stop; add it" in line


def test_special_tokens_are_listed_with_text_and_files(folder: Path) -> None:
    change(folder / "generation_config.json", eos_token_id=[256, 13])
    change(folder / "config.json", bos_token_id=66)
    assert [*special_token_lines(special_tokens(folder), usable_tokenizer(folder))] == [
        "stop tokens 256 '<eos>' (config.json, generation_config.json, tokenizer_config.json), "
        "13 '.' (generation_config.json)",
        "bos        66 'c' (config.json)",
        "pad        256 '<eos>' (tokenizer_config.json)",
    ]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("tokenizer.json", b"", "is not valid JSON"),
        ("tokenizer.json", b"{", "is not valid JSON"),
        ("tokenizer.json", b"[]", "holds a list, not an object"),
        ("tokenizer.json", b"{}", "is no tokenizer"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}', "is no tokenizer"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1", "is not valid JSON"),
        ("tokenizer.json", None, "is missing"),
        ("tokenizer_config.json", b"{", "is not valid JSON"),
        ("tokenizer_config.json", b"\xff", "is not valid JSON"),
        ("tokenizer_config.json", b"[]", "holds a list, not an object"),
        ("special_tokens_map.json", b"{", "is not valid JSON"),
        ("chat_template.jinja", b"\xff", "is not a text in UTF-8"),
    ],
)
def test_a_broken_tokenizer_file_is_named(
    name: str, content: bytes | None, what: str, folder: Path
) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    line = refusal(lambda: usable_tokenizer(folder))
    assert line.startswith(f"the tokenizer of {folder} can't be loaded: {folder / name} {what}")
    assert line.endswith("; copy the tokenizer files of the base model there")


def test_code_of_a_model_folder_is_never_run(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('run')")
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": ["evil.Evil", None]},
    )
    assert usable_tokenizer(folder).eos_token_id == EOS  # from tokenizer.json alone
