"""Every knob as text: the listing of the command line and docs/configuration.md."""

import pytest
from paths import CONFIGS, ROOT

from dapo_async import config as knobs
from dapo_async.config.explain import allowed, listing, markdown

PAGE = ROOT / "docs" / "configuration.md"
KNOBS = {knob.name: knob for knob in knobs.knobs()}


def test_the_page_of_the_docs_is_what_the_schema_says() -> None:
    command = "python -m dapo_async.config.explain > docs/configuration.md"
    assert command in markdown()
    assert PAGE.read_text(encoding="utf-8") == markdown(), f"run: {command}"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model.dtype", "float32 | bfloat16"),
        ("data.system", "text | null"),
        ("algorithm.correction_level", "token | sequence | sequence_mean | null"),
        ("learner.recompute", "auto | none | mlp | all"),
        ("learner.offload_optimizer", "true or false"),
        ("learner.lr", "number, at least 0"),
        ("deadlines.work_s", "number, positive, at most 2,592,000"),
        ("rollout.num_slots", "integer, at least 1, at most 100,000 | auto"),
        ("learner.grad_clip", "number, positive"),
        ("algorithm.correction_band", "[number or null, number or null]"),
        ("train.max_wall_s", "number | null"),
    ],
)
def test_types_and_allowed_values_are_named(name: str, text: str) -> None:
    assert allowed(KNOBS[name]) == text


def test_the_listing_has_every_knob_once_in_its_section() -> None:
    lines = list(listing())
    names = [line.split()[0] for line in lines if " = " in line and not line.startswith("    ")]
    assert names == list(KNOBS)
    assert "  algorithm.dual_clip = null  (number | null)" in lines
    assert '  run_dir = ""  (text)' in lines
    assert "  learner.profile = false  (true or false)" in lines
    assert lines[1] == "the run"
    assert "deadlines: how long something may take before the run ends, in seconds" in lines
    assert not [line for line in lines if "None" in line or "False" in line]


def test_the_listing_of_a_config_marks_what_differs() -> None:
    lines = list(listing(knobs.load(CONFIGS / "quickstart.yaml", ["algorithm.dual_clip=3"])))
    marked = [line for line in lines if line.startswith("* ")]
    assert "* learner.lr = 0.0003  (number, at least 0; default 1e-06)" in marked
    assert "* algorithm.dual_clip = 3.0  (number | null; default null)" in marked
    assert "  learner.weight_decay = 0.1  (number, at least 0)" in lines
    assert len(marked) < 25


def test_defaults_keep_the_bounds_of_their_knobs() -> None:
    for knob in KNOBS.values():
        least, above, most = knob.bounds
        if knob.default not in (None, "auto"):
            assert least is None or knob.default >= least.value
            assert above is None or knob.default > above.value
            assert most is None or (knob.default <= most.value and most.why)
