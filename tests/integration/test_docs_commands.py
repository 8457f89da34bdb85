"""The commands of README.md and docs/ run as they stand."""

from pathlib import Path

import pytest
from fresh_machine import fresh_machine, trains
from run_support import Finished
from snippets import PAGES, Snippet, run, snippets, workplace, write_file

pytestmark = pytest.mark.timeout(600)
ALL = [snippet for page in PAGES for snippet in snippets(page)]
CLUSTER = [snippet for snippet in ALL if snippet.how == "cluster"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_that_needs_no_ray_runs_as_it_stands(page: Path, tmp_path: Path) -> None:
    folder = workplace(tmp_path / "checkout")
    for snippet in snippets(page):
        if snippet.file:
            write_file(snippet, folder)
        elif snippet.how in ("run", "dry-run"):
            run(snippet, folder)


@pytest.mark.ray
@pytest.mark.parametrize(
    "page",
    sorted({snippet.page for snippet in ALL if snippet.how == "ray"}),
    ids=lambda page: page.name,
)
def test_every_block_that_needs_ray_or_a_run_runs(
    page: Path, tmp_path: Path, quickstart: Finished
) -> None:
    folder = workplace(tmp_path / "checkout")
    (folder / "runs" / "quickstart").symlink_to(quickstart.root)
    for snippet in snippets(page):
        if snippet.file:
            write_file(snippet, folder)
        elif snippet.how == "ray":
            run(snippet, folder)


@pytest.mark.ray
@pytest.mark.parametrize("snippet", CLUSTER, ids=lambda snippet: snippet.where)
def test_cluster_commands_work_on_a_fresh_machine(snippet: Snippet) -> None:
    with fresh_machine() as machine:
        trains(snippet, machine)
