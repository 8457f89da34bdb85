"""Paths that a user gives are texts: neither YAML nor URLs nor words of a shell."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from paths import QUICKSTART
from sqlalchemy.engine import make_url

from dapo_async import config as knobs
from dapo_async.cli.arguments import Parser
from dapo_async.cli.arguments import path as path_argument
from dapo_async.runtime.cluster.environment import run_root
from dapo_async.tracking.mlflow_run import store_uri
from dapo_async.utils.paths import check_path, for_shell

NAMES = (
    "plain", "a?b", "a%20b", "a%3Fb", "100%", "a%sb", "a#b", "a #b", "a b", " a ", "ü", "模型",
    "it's", 'a"b', "a:b", "a: b", "a;b", "a\\b", "a&b=c", "a@b", "a+b", "{x}", "[x]", "*x", "&x",
    "!x", "|x", "- x", "$HOME", "~x", "a,b", "`x`", "007", "2024_01", "12:30", "1e3", "yes", "<a>",
    "sqlite:", "file:x", "a=b", "-x",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_taken_as_it_stands(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name / "run"
    for written in (str(folder), name):
        config = knobs.load(QUICKSTART, [f"run_dir={written}"])
        assert config.run_dir == written
        again = tmp_path / "again.yaml"
        again.write_text(knobs.to_yaml(config))
        assert knobs.load(again, files=False).run_dir == written
    assert run_root(str(folder), name="") == folder
    assert shlex.split(f"dapo-async train --resume {for_shell(folder)}")[-1] == str(folder)
    uri, artifacts = store_uri("local", folder)
    assert make_url(uri).database == str(folder / "mlflow.db")
    assert not make_url(uri).query
    assert artifacts == folder / "mlartifacts"
    assert shlex.split(f"mlflow ui --backend-store-uri {for_shell(uri)}")[-1] == uri


def test_quotes_around_a_path_and_null_are_still_yaml() -> None:
    given = {"'a #b'": "a #b", '"a #b"': "a #b", "''": ""}
    for written, expected in given.items():
        assert knobs.load(QUICKSTART, [f"run_dir={written}"]).run_dir == expected
    assert knobs.load(QUICKSTART, ["tracking.sinks=none"]).tracking.names == ()


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\tb", "\x1b[31m", "a\x00b", "\x7f"])
def test_a_path_with_a_control_character_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    for refuse in (
        lambda: check_path("--out", name),
        lambda: run_root(str(tmp_path / name), name="x"),
        lambda: parser().parse_args(["--out", name]),
    ):
        with pytest.raises(ValueError, match="must not have a line break or another") as caught:
            refuse()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "a\x1bb", "a\u2028b", "  "])
def test_yaml_changes_no_character_of_a_path(name: str) -> None:
    assert knobs.load(QUICKSTART, [f"run_dir={name}"]).run_dir == name


def test_a_path_that_is_not_utf8_is_refused_in_one_line(tmp_path: Path) -> None:
    for name in ("a\udce4", "\ud83d"):
        with pytest.raises(ValueError, match="must be UTF-8, because it is written to files"):
            check_path("--out", name)
        with pytest.raises(ValueError, match=r"^the value of override .* is not valid YAML"):
            knobs.load(QUICKSTART, [f"run_dir={name}"])


def parser() -> Parser:
    parser = Parser(prog="dapo-async report")
    parser.add_argument("--out", type=path_argument)
    return parser


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(ValueError, match="--out is empty; give a path"):
        check_path("--out", "")
    with pytest.raises(ValueError, match="--out is empty; give a path"):
        check_path("--out", " \u3000")
    with pytest.raises(ValueError, match="is empty; give a path"):
        parser().parse_args(["--out", ""])
