"""The commands of README.md and docs/ that need Ray or a finished run."""

from pathlib import Path

import pytest
from run_support import Finished
from snippets import PAGES, run, snippets, workplace, write_file

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
WITH_RAY = [page for page in PAGES if any(snippet.how == "ray" for snippet in snippets(page))]


@pytest.mark.parametrize("page", WITH_RAY, ids=lambda page: page.name)
def test_every_block_that_needs_ray_or_a_run_runs(page: Path, tmp_path: Path, quickstart: Finished):
    folder = workplace(tmp_path / "checkout")
    (folder / "runs" / "quickstart").symlink_to(quickstart.root)
    for snippet in snippets(page):
        if snippet.file:
            write_file(snippet, folder)
        elif snippet.how == "ray":
            run(snippet, folder)
