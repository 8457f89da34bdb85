"""README.md and docs/ are true: every file, test, knob and link that they name exists."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT
from snippets import PAGES, check_syntax, snippets

from dapo_async.cli.arguments import Parser
from dapo_async.cli.main import COMMANDS
from dapo_async.config import knobs

LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
CODE = re.compile(r"`(?P<code>[^`\n]+)`")
SOURCE = re.compile(
    r"^(?:dapo_async|tests|configs|benchmarks|cluster|docs|\.ci)/[\w./-]*\w(?:::(?P<test>\w+))?$"
)
# Programs of others: where a test runs the command, and the words that it has there.
RUN_BY_TESTS = {
    "ray start": ("tests/fakes/ray_cluster.py", 'RAY, "start"'),
    "ray get-auth-token": ("tests/fakes/fresh_machine.py", "ray get-auth-token --generate"),
    "ray status": ("tests/nightly/test_docs_cluster.py", "ray status"),
    "ray job submit": ("tests/integration/test_run_cluster.py", "cluster/runtime_env.yaml"),
    "ray job logs": ("tests/integration/test_run_cluster.py", 'cluster.job("logs"'),
    "ray job stop": ("tests/integration/test_run_cluster.py", 'RAY, "job", "stop"'),
    "tensorboard": ("tests/nightly/test_docs_tools.py", 'line_of("tensorboard")'),
    "mlflow": ("tests/unit/tracking/test_mlflow_store.py", 'command=("ui",)'),
    "mkdocs serve": ("tests/nightly/test_docs_tools.py", '"mkdocs serve"'),
    "sysctl": ("tests/fakes/two_hosts.py", "ip_local_port_range"),
}
NOT_RUN = ("ray up", "ray dashboard", "ray stop", "kubectl", "docker", "sbatch", "scancel", "wandb")
SAYS_SO = re.compile(r"\bnot (?:run|tried)\b|No\s+test\s+runs")
OF_OTHERS = re.compile(
    r"(?:ray|kubectl|docker|sbatch|scancel|squeue|srun|aws|wandb|mlflow|tensorboard|mkdocs|sysctl)"
    r"(?= )[ \w-]*"
)
SECTIONS = {name.partition(".")[0] for name, *_ in knobs() if "." in name}


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """The text of a page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def test_readme_is_at_most_8_kb() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8 * 1024


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_relative_link_has_a_target(page: Path) -> None:
    for match in LINK.finditer(prose(page)):
        target = match["target"].partition("#")[0]
        if target and "://" not in target:
            assert (page.parent / target).exists(), f"{page_id(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_source_file_and_test_that_a_page_names_exists(page: Path) -> None:
    for match in CODE.finditer(prose(page)):
        if not (named := SOURCE.match(match["code"])):
            continue
        path, _, test = match["code"].partition("::")
        assert (ROOT / path).exists(), f"{page_id(page)} names {path}"
        if test:
            assert f"def {named['test']}(" in (ROOT / path).read_text(encoding="utf-8"), test


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_knob_that_a_page_names_exists(page: Path) -> None:
    known = {name for name, *_ in knobs()}
    for match in CODE.finditer(prose(page)):
        if named := re.match(r"(\w+)\.(\w+)(?:=\S*)?$", match["code"]):
            name = f"{named[1]}.{named[2]}"
            if named[1] in SECTIONS and named[2] not in ("py", "json", "yaml", "md", "safetensors"):
                assert name in known, f"{page_id(page)} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_block_can_be_read_in_its_language(page: Path) -> None:
    for snippet in snippets(page):
        check_syntax(snippet)
        assert snippet.how not in ("dry-run", "example") or snippet.detail, snippet.where
        if snippet.how == "covered":
            path, _, test = snippet.detail.partition("::")
            assert (ROOT / path).exists(), f"{snippet.where} is covered by {path}"
            assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), test
            if path.endswith(".py"):
                source = (ROOT / path).read_text(encoding="utf-8")
                if "snippets(" in source:
                    continue  # the test runs what the page says
                lines = re.findall(r"dapo-async (\w[^#\n]*)", snippet.code.replace("\\\n", " "))
                words = re.findall(r"^\w+|(?<=\s)--[a-z][\w-]*", "\n".join(lines), re.MULTILINE)
                missing = [word for word in words if word not in source]
                assert missing == [], f"{snippet.where}: {path} runs no {missing}"


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every whole `dapo-async` command of a page: of its blocks, and in its text."""
    texts = [match["code"] for match in CODE.finditer(prose(page))]
    for snippet in snippets(page):
        if snippet.language == "bash":
            texts += re.split(r"&&|\n", snippet.code.replace("\\\n", " "))
    for text in texts:
        if (match := re.search(r"(?:^|\s)dapo-async (\w.*)", text)) and "…" not in text:
            words = shlex.split(match[1].rpartition(" --json OUT")[0] or match[1], comments=True)
            yield [word for word in words if word not in ("&", "|")]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_command_of_a_page_has_options_and_knobs_that_exist(page: Path) -> None:
    known = {name for name, *_ in knobs()}
    for name, *words in commands(page):
        parser = Parser(prog=name)
        COMMANDS[name].add_arguments(parser)
        options = {option for action in parser._actions for option in action.option_strings}
        for word in words:
            told = f"{page_id(page)}: dapo-async {name} {' '.join(words)}"
            if word.startswith("--"):
                assert word.partition("=")[0] in options, told
            elif override := re.match(r"([a-z_.]+)=", word):
                assert override[1] in known or name not in ("train", "submit", "launch"), told


def of_others(page: Path) -> Iterator[str]:
    """Every command of another program: those of the text, and those of bash blocks."""
    texts = [match["code"] for match in CODE.finditer(prose(page))]
    for snippet in snippets(page):
        if snippet.language == "bash":
            texts += re.split(r"&&|\n", snippet.code)
    yield from (match[0] for text in texts if (match := OF_OTHERS.match(text.strip())))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_command_of_other_programs_is_run_by_a_test_or_said_not_to_be(page: Path) -> None:
    paragraphs = prose(page).split("\n\n")
    for command in of_others(page):
        if name := next((name for name in NOT_RUN if command.startswith(name)), None):
            says_so = any(f"`{name}" in each and SAYS_SO.search(each) for each in paragraphs)
            assert says_so, f"{page_id(page)} does not say that {name} was not run"
            continue
        name = next((name for name in RUN_BY_TESTS if command.startswith(name)), None)
        assert name is not None, f"{page_id(page)}: no test runs {command}"
        path, words = RUN_BY_TESTS[name]
        assert words in (ROOT / path).read_text(encoding="utf-8"), f"{path} does not run {name}"


def test_every_number_to_look_at_when_a_run_is_in_trouble_is_a_metric() -> None:
    page = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")
    metrics = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    _, _, table = page.partition("| symptom | look at | then |")
    looked_at = [row.split(" | ")[1] for row in table.splitlines() if row.startswith("| ")]
    names = [name for cell in looked_at for name in re.findall(r"`([a-z]\w*(?:\.\w+)*)`", cell)]
    others = {"process_lost", "ping"}  # an event, and a command
    assert len(names) > 10
    assert [name for name in names if f"`{name}" not in metrics and name not in others] == []


def test_every_message_that_troubleshooting_quotes_is_in_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    of_others = {"No space left on device"}
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "dapo_async").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))  # joins the lines of one message
    symptoms = [row.split(" | ")[0] for row in page.splitlines() if row.startswith("| ")]
    quotes = [quote for cell in symptoms for quote in CODE.findall(cell) if quote not in of_others]
    assert len(quotes) > 10
    for quote in quotes:
        for part in re.split(r"[…(),:]", quote):
            assert part.strip() in code, f"no message of the code has {part.strip()!r}"
