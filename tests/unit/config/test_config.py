"""Bad input is one clear line: rule, values, remedy."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import CONFIGS

from dapo_async import config as knobs


@pytest.fixture
def file(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "train.jsonl").write_text("{}")
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {path: model}\ndata: {train: train.jsonl, heldout: train.jsonl}\nlearner: {lr: 1e-4}\n"
    )
    return path


def test_paths_in_a_file_resolve_against_its_folder_and_overrides_against_the_current_one(
    file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    config = knobs.load(file, ["data.heldout=etc/passwd"])
    assert config.model.path == str(tmp_path / "model")
    assert config.data.heldout == "/etc/passwd"
    assert config.learner.lr == 1e-4


def test_the_resolved_config_reads_back_equal(file, tmp_path: Path) -> None:
    config = knobs.load(file, ["replay.max_staleness=1", "algorithm.dual_clip=3"])
    (tmp_path / "saved.yaml").write_text(knobs.to_yaml(config))
    assert knobs.load(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("learner.lerning_rate=1", "unknown key learner.lerning_rate; did you mean learner."),
        (
            "replay.max_stalenes=1",
            "unknown key replay.max_stalenes; did you mean replay.max_staleness?",
        ),
        (
            "learner.lr=fast",
            "learner.lr: Value 'fast' of type 'str' could not be converted to Float",
        ),
        ("algorithm.proximal=ppo", "algorithm.proximal: Invalid value 'ppo', expected one of"),
        ("replay.group_size=1", "replay.group_size (1) must be at least 2"),
        (
            "learner.num_minibatches=3",
            "(16 x 16 = 256) must be a multiple of learner.num_minibatches (3)",
        ),
        (
            "learner.data_parallel=17",
            "learner.data_parallel (17) must be at most replay.groups_per_step (16): each rank trains whole groups",
        ),
        ("learner.tensor_parallel=0", "learner.tensor_parallel (0) must be at least 1"),
        ("rollout.temperature=0", "rollout.temperature (0.0) must be positive"),
        ("data.train=/nowhere.jsonl", "data.train (/nowhere.jsonl) does not exist"),
        ("rollout.num_slots=4", "rollout.num_slots (4) must be at least replay.group_size (16)"),
        ("learner.lr", "override 'learner.lr' is not of the form key=value"),
        ("learner.num_minibatches=0", "learner.num_minibatches (0) must be at least 1"),
        (
            "algorithm.second_moment=0",
            "algorithm.second_moment (0.0) must be positive; set algorithm.second_moment=1.0 or null (off)",
        ),
        ("learner.grad_clip=-1", "learner.grad_clip (-1.0) must be positive"),
        ("weights.probe_tolerance=-1e-3", "weights.probe_tolerance (-0.001) must be at least 0"),
        ("learner.beta1=2", "learner.beta1 (2.0) must lie in [0, 1)"),
        ("learner.beta2=1", "learner.beta2 (1.0) must lie in [0, 1)"),
        ("learner.beta2=-0.1", "learner.beta2 (-0.1) must be at least 0"),
        ("seed=-1", "seed (-1) must be at least 0"),
        (
            "seed=9223372036854775808",
            "seed (9223372036854775808) must be a finite number, below 2^63",
        ),
        ("rollout.num_cpus=-1", "rollout.num_cpus (-1.0) must be at least 0"),
        ("rollout.num_gpus=-1", "rollout.num_gpus (-1.0) must be at least 0"),
        ("learner.num_cpus=-1", "learner.num_cpus (-1.0) must be at least 0"),
        ("learner.num_gpus=-0.5", "learner.num_gpus (-0.5) must be at least 0"),
        ("learner.num_gpus=0.00001", "learner.num_gpus (1e-05) must be 0 or at least 0.0001"),
        ("ray.num_cpus=0", "ray.num_cpus (0) must be at least 1"),
        (
            "replay=3",
            "replay (3) is a group of knobs and has no value of its own; set one of its knobs, such as replay.groups_per_step",
        ),
        ("=3", "override '=3' is not of the form key=value"),
        ("replay.=3", "override 'replay.=3' is not of the form key=value"),
        ("seed={", "the value of override 'seed={' is not valid YAML; put it into quotes"),
        (
            "data.template={problem}",
            "put a text with : or brackets into quotes, such as data.template='\"...\"'",
        ),
        (
            "data.template=${price} {problem}",
            r"data.template: Interpolation key 'price' not found; write \${ for a literal ${",
        ),
        ("model.path=~no_such_user/base", "model.path ('~no_such_user/base') is no usable path"),
        ("deadlines.take_s=0", "deadlines.take_s (0.0) must be positive"),
        ("data.template=solve", "must contain {problem}"),
    ],
)
def test_bad_input_is_one_line_with_rule_values_and_remedy(file, override, line) -> None:
    with pytest.raises(ValueError) as error:
        knobs.load(file, [override])
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_and_a_broken_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing.yaml does not exist"):
        knobs.load(tmp_path / "nothing.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(ValueError, match="not valid YAML"):
        knobs.load(tmp_path / "broken.yaml")


def test_every_knob_has_its_line() -> None:
    assert all(line for _, _, line, _ in knobs.knobs())
    assert len({name for name, *_ in knobs.knobs()}) == len(list(knobs.knobs()))


def test_every_config_in_the_repository_loads() -> None:
    for path in CONFIGS.rglob("*.yaml"):
        knobs.load(path)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["rollout.server_flags=--tp-size 2"],
            "rollout.server_flags (--tp-size 2) is for SGLang engines",
        ),
        (["rollout.tensor_parallel=2"], "rollout.tensor_parallel (2) is for SGLang engines"),
        (["rollout.servers=http://a:1"], "rollout.servers (http://a:1) is for SGLang engines"),
        (
            ["rollout.engine=sglang", "rollout.server_flags=--port=3"],
            "rollout.server_flags has --port=3, which each worker sets",
        ),
        (
            ["rollout.engine=sglang", "deadlines.silence_s=60"],
            "deadlines.silence_s (60) must be at least deadlines.publish_s (120)",
        ),
        (
            ["rollout.engine=sglang", "rollout.num_gpus=0.5"],
            "rollout.num_gpus (0.5) must be rollout.tensor_parallel (1), or 0 for a server on CPU",
        ),
        (
            ["rollout.engine=sglang", "rollout.servers='http://a:1, http://b:1/'"],
            "names 2 servers for rollout.num_workers=1",
        ),
        (["rollout.engine=sglang", "rollout.servers=a:1"], "rollout.servers (a:1) must be URLs"),
        (
            ["rollout.engine=sglang", "replay.lockstep=true", "replay.max_staleness=0"],
            "replay.lockstep needs rollout.engine=torch",
        ),
        (
            [
                "rollout.engine=sglang",
                "rollout.num_workers=2",
                "evaluation.engine=lease",
                "evaluation.every_steps=20",
            ],
            "evaluation.engine=lease needs weights.transport=disk with SGLang engines",
        ),
    ],
)
def test_what_does_not_fit_the_engine_is_one_clear_line(file, overrides, line) -> None:
    with pytest.raises(ValueError) as error:
        knobs.load(file, overrides)
    assert line in str(error.value)


def test_layout_of_engines_is_derived_from_the_knobs(file) -> None:
    rollout = knobs.load(
        file,
        [
            "rollout.engine=sglang",
            "rollout.num_workers=2",
            "rollout.num_gpus=4",
            "rollout.tensor_parallel=4",
            "rollout.servers='http://a:1/,http://b:2'",
        ],
    ).rollout
    assert rollout.server_urls == ("http://a:1", "http://b:2")


@pytest.mark.parametrize(
    "name", [name for name, default, *_ in knobs.knobs() if isinstance(default, float)]
)
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999"])
def test_no_knob_takes_what_is_not_a_finite_number(file, name, value) -> None:
    with pytest.raises(ValueError, match=rf"{name} \((nan|inf|-inf)\) must be a finite number"):
        knobs.load(file, [f"{name}={value}"])


@pytest.mark.parametrize(
    "content", ["replay: 3", "replay:", "5", "[a]", "1: 2", "seed: [1", "seed: 1\nseed: 2", "a: *b"]
)
def test_a_file_that_is_no_tree_of_knobs_is_one_line(tmp_path: Path, content) -> None:
    (tmp_path / "odd.yaml").write_text(content)
    with pytest.raises(ValueError) as error:
        knobs.load(tmp_path / "odd.yaml")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("run_dir: Schlüssel".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.yaml is not valid YAML"):
        knobs.load(tmp_path / "latin.yaml")


def test_a_literal_dollar_brace_in_a_file_is_escaped_and_reads_back(file, tmp_path: Path) -> None:
    file.write_text(
        file.read_text().replace("heldout:", r"template: 'for \${x} {problem}', heldout:")
    )
    config = knobs.load(file)
    assert config.data.template == "for ${x} {problem}"
    (tmp_path / "saved.yaml").write_text(knobs.to_yaml(config))
    assert knobs.load(tmp_path / "saved.yaml") == config


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    text=st.text(
        st.sampled_from("\\${}x: '\"#\n1e-")
        | st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]),
        max_size=12,
    )
)
def test_every_template_and_path_reads_back_as_it_was(file, tmp_path: Path, text) -> None:
    config = knobs.load(file)
    config = replace(
        config, run_dir="/runs/${a}", data=replace(config.data, template=text + "{problem}")
    )
    (tmp_path / "saved.yaml").write_text(knobs.to_yaml(config), encoding="utf-8")
    assert knobs.load(tmp_path / "saved.yaml") == config
