"""Bad input is one clear line: rule, values, remedy."""

from pathlib import Path

import pytest

from dapo_async import config as knobs


@pytest.fixture
def file(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "train.jsonl").write_text("{}")
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: model}\ndata: {train: train.jsonl, heldout: train.jsonl}\nlearner: {lr: 1e-4}\n")
    return path


def test_paths_in_a_file_resolve_against_its_folder_and_overrides_against_the_current_one(file, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    config = knobs.load(file, ["run_dir=somewhere"])
    assert config.model.path == str(tmp_path / "model")
    assert config.run_dir == "/somewhere"
    assert config.learner.lr == 1e-4


def test_the_resolved_config_reads_back_equal(file, tmp_path):
    config = knobs.load(file, ["replay.max_staleness=1", "algorithm.dual_clip=3"])
    (tmp_path / "saved.yaml").write_text(knobs.to_yaml(config))
    assert knobs.load(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("learner.lerning_rate=1", "unknown key learner.lerning_rate; did you mean learner."),
        ("replay.max_stalenes=1", "unknown key replay.max_stalenes; did you mean replay.max_staleness?"),
        ("learner.lr=fast", "learner.lr: Value 'fast' of type 'str' could not be converted to Float"),
        ("algorithm.objective=ppo", "algorithm.objective: Invalid value 'ppo', expected one of"),
        ("replay.group_size=1", "replay.group_size (1) must be at least 2"),
        ("learner.num_minibatches=3", "(16 x 16 = 256) must be a multiple of learner.num_minibatches (3)"),
        ("rollout.temperature=0", "rollout.temperature (0.0) must be positive"),
        ("data.train=/nowhere.jsonl", "data.train (/nowhere.jsonl) does not exist"),
        ("rollout.num_slots=4", "rollout.num_slots (4) must be at least replay.group_size (16)"),
        ("learner.lr", "override 'learner.lr' is not of the form key=value"),
        ("deadlines.take_s=0", "deadlines.take_s (0.0) must be positive"),
        ("data.template=solve", "must contain {problem}"),
    ],
)
def test_bad_input_is_one_line_with_rule_values_and_remedy(file, override, line):
    with pytest.raises(ValueError) as error:
        knobs.load(file, [override])
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_and_a_broken_file_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing.yaml does not exist"):
        knobs.load(tmp_path / "nothing.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(ValueError, match="not valid YAML"):
        knobs.load(tmp_path / "broken.yaml")


def test_every_knob_has_its_line():
    assert all(line for _, _, line, _ in knobs.knobs())
    assert len({name for name, *_ in knobs.knobs()}) == len(list(knobs.knobs()))


def test_every_config_in_the_repository_loads():
    for path in (Path(__file__).parents[1] / "configs").glob("*.yaml"):
        knobs.load(path)
