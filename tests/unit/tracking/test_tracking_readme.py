"""The tables of metrics: each row names a function that is there, and the check of the names fails both ways."""

from __future__ import annotations

import ast

import pytest
from tracking_world import ROOM, check_documented, documented, summary_names


@pytest.mark.parametrize("file", ["metrics.jsonl", "summary.json"])
def test_every_row_names_a_function_that_is_there(file: str) -> None:
    rows = documented(file)
    assert len(rows) > 30
    for name, (module, function) in rows.items():
        tree = ast.parse((ROOM / module).read_text())
        there = {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert function in there, f"{name} is said to be computed by {function} of {module}"


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


def test_names_of_a_summary_are_flat_but_for_maps_of_actors_and_errors() -> None:
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
