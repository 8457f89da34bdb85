"""docs/metrics.md: each row names an existing function, and the check of names fails both ways."""

from __future__ import annotations

import ast

import pytest
from tracking_world import PACKAGE, check_documented, documented, summary_names


@pytest.mark.parametrize("file", ["metrics.jsonl", "summary.json"])
def test_every_row_names_an_existing_function(file: str) -> None:
    rows = documented(file)
    assert len(rows) > 30
    for name, (module, function) in rows.items():
        tree = ast.parse((PACKAGE / module).read_text())
        functions = {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert function in functions, f"the row of {name} names {function} of {module}"


def test_check_of_the_names_fails_both_ways() -> None:
    names = ["loss", "rejected.<reason>", "groups.rejected.<reason>"]
    check_documented({"loss", "rejected.all_wrong", "groups.rejected.all_correct"}, names)
    with pytest.raises(AssertionError, match=r"written, but not documented: \['loss_sum'\]"):
        check_documented(
            {"loss", "loss_sum", "rejected.all_wrong", "groups.rejected.all_correct"}, names
        )
    with pytest.raises(
        AssertionError, match=r"documented, but never written: \['rejected.<reason>'\]"
    ):
        check_documented({"loss", "groups.rejected.all_wrong"}, names)


def test_summary_names_are_flat_except_maps_of_actors_and_errors() -> None:
    summary = {
        "steps": 1,
        "groups": {"admitted": 1, "rejected": {"all_wrong": 0}},
        "caught": {"mlflow: late": 1},
        "handshake": {},
    }
    assert summary_names(summary) == {
        "steps",
        "groups.admitted",
        "groups.rejected.all_wrong",
        "caught",
        "handshake",
    }
