"""Bad input is one clear line: rule, values, remedy."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import CONFIGS

from dapo_async import config as knobs
from dapo_async.config.replaced import REPLACED, REPLACED_VALUES


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "train.jsonl").write_text("{}")
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {path: model}\ndata: {train: train.jsonl, heldout: train.jsonl}\n"
        "learner: {lr: 1e-4}\n"
    )
    return path


def test_paths_of_a_file_are_relative_to_it_and_overrides_to_the_current_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    config = knobs.load(file, ["data.heldout=etc/passwd"])
    assert config.model.path == str(tmp_path / "model")
    assert config.data.heldout == "/etc/passwd"
    assert config.learner.lr == 1e-4


def test_the_resolved_config_reads_back_equal(file: Path, tmp_path: Path) -> None:
    config = knobs.load(
        file,
        ["replay.max_staleness=1", "algorithm.dual_clip=3", "algorithm.correction_band=[0.5,5]"],
    )
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
            "replay.groups_per_step (16) must be a multiple of learner.num_minibatches (3)",
        ),
        (
            "learner.data_parallel=257",
            "learner.data_parallel (257) must be at most the rollouts of a minibatch, ",
        ),
        ("learner.tensor_parallel=0", "learner.tensor_parallel (0) must be at least 1"),
        ("rollout.temperature=0", "rollout.temperature (0.0) must be positive"),
        ("data.train=/nowhere.jsonl", "data.train (/nowhere.jsonl) does not exist"),
        ("rollout.num_slots=4", "rollout.num_slots (4) must be at least replay.group_size (16)"),
        ("learner.lr", "override 'learner.lr' is not of the form key=value"),
        ("learner.num_minibatches=0", "learner.num_minibatches (0) must be at least 1"),
        *(
            (
                f"algorithm.correction_band={value}",
                f"correction_band ({shown}) must be a list of two",
            )
            for value, shown in (
                ("2", "2"),
                ("null", "None"),
                ("[1,2,3]", "[1, 2, 3]"),
                ("[a,2]", "['a', 2]"),
            )
        ),
        *(
            (
                f"algorithm.correction_band={value}",
                f"correction_band ({shown}) must be [FLOOR, CAP]",
            )
            for value, shown in (
                ("[3,2]", "[3.0, 2.0]"),
                ("[-1,null]", "[-1.0, null]"),
                ("[null,0]", "[null, 0.0]"),
            )
        ),
        ("algorithm.correction_band=[.nan,2]", "correction_band (nan) must be a finite number"),
        ("algorithm.sequence_band=[1.1,2]", "sequence_band ([1.1, 2.0]) must be [FLOOR, CAP] with"),
        ("algorithm.sequence_band=[null,0.9]", "sequence_band ([null, 0.9]) must be [FLOOR, CAP]"),
        ("algorithm.sequence_band=2", "sequence_band (2) must be a list of two"),
        (
            "data.contamination=keep",
            "data.contamination (keep) must begin with drop, warn, off; write for example drop or",
        ),
        ("learner.grad_clip=-1", "learner.grad_clip (-1.0) must be positive"),
        ("seed=-1", "seed (-1) must be at least 0"),
        (
            "seed=9223372036854775808",
            "seed (9223372036854775808) must be a finite number, below 2^63",
        ),
        ("model.num_cpus=-1", "model.num_cpus (-1.0) must be at least 0"),
        ("model.num_cpus=0.00001", "model.num_cpus (1e-05) must be 0 or at least 0.0001"),
        ("model.device=gpu", "model.device: Invalid value 'gpu', expected one of"),
        (
            "replay=3",
            "replay (3) is a section of knobs and has no value; set one of its knobs, such as "
            "replay.groups_per_step",
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
        ("model.path=~no_such_user/base", "model.path ('~no_such_user/base') can't be a path: "),
        ("deadlines.work_s=0", "deadlines.work_s (0.0) must be positive"),
        ("data.template=solve", "must contain {problem}"),
        ("clip_low=0.1", "unknown key clip_low; did you mean algorithm.clip_low?"),
        ("learner.clip_low=0.1", "unknown key learner.clip_low; did you mean algorithm.clip_low?"),
        (
            "tensor_parallel=2",
            "did you mean rollout.tensor_parallel or learner.tensor_parallel?",
        ),
        ("rollout.num_slots=many", "rollout.num_slots: Value 'many' of type 'str' is incompatible"),
        (
            "replay.group_size=65",
            "rollout.num_slots (64) must be at least replay.group_size (65), so that all rollouts",
        ),
        (
            "rollout.num_slots=1000000000",
            "rollout.num_slots (1000000000) must be at most 100,000: the KV cache of each slot",
        ),
        (
            "rollout.num_workers=1000000",
            "rollout.num_workers (1000000) must be at most 10,000: each one is a process",
        ),
        *(
            (
                f"network.ports={ports}",
                f"network.ports ({ports}) must be FIRST-LAST within 1024-65535; set a range such",
            )
            for ports in ("20000", "20000-70000", "20010-20000", "80-90")
        ),
        (
            "network.ports=20000-20001",
            "network.ports (20000-20001) has 2 ports, this run may need 3 on one node; set "
            "20000-20002 or a larger range",
        ),
        ("network.interface=eth0,eth1", "(eth0,eth1) must be the name of one network interface"),
        ("deadlines.work_s=1e9", "(1000000000.0) must be at most 2,592,000: a longer wait is no"),
    ],
)
def test_bad_input_is_one_line_with_rule_values_and_remedy(
    file: Path, override: str, line: str
) -> None:
    with pytest.raises(ValueError) as error:
        knobs.load(file, [override])
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_and_a_broken_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing.yaml does not exist"):
        knobs.load(tmp_path / "nothing.yaml")
    with pytest.raises(ValueError, match=rf"config file {tmp_path} is a folder; give a YAML file"):
        knobs.load(tmp_path)
    (tmp_path / "broken.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(ValueError, match="not valid YAML"):
        knobs.load(tmp_path / "broken.yaml")


def test_every_knob_has_its_line() -> None:
    assert all(knob.line for knob in knobs.knobs())
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
            ["rollout.engine=sglang", "rollout.servers='http://a:1, http://b:1/'"],
            "names 2 servers for rollout.num_workers=1",
        ),
        (["rollout.engine=sglang", "rollout.servers=a:1"], "rollout.servers (a:1) must be URLs"),
        (
            ["rollout.engine=sglang", "replay.admission=lockstep", "replay.max_staleness=0"],
            "replay.admission=lockstep needs rollout.engine=torch",
        ),
    ],
)
def test_what_does_not_fit_the_engine_is_one_clear_line(
    file: Path, overrides: list[str], line: str
) -> None:
    with pytest.raises(ValueError) as error:
        knobs.load(file, overrides)
    assert line in str(error.value)


SERVERS = ["rollout.engine=sglang", "rollout.num_workers=2", "rollout.tensor_parallel=4"]
SHARED = ["model.device=cuda", "model.placement=shared", "weights.transport=disk"]


def test_urls_of_servers_are_read_from_one_text(file: Path) -> None:
    config = knobs.load(file, [*SERVERS, "rollout.servers='http://a:1/,http://b:2'"])
    assert config.rollout.server_urls == ("http://a:1", "http://b:2")


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        ([], (0.0, 0.0, 0.0)),
        (["model.device=cuda"], (1.0, 1.0, 0.0)),
        (["model.device=cuda", *SERVERS], (1.0, 4.0, 0.0)),
        (["model.device=cuda", *SERVERS, "rollout.servers='http://a,http://b'"], (1.0, 0.0, 0.0)),
        (["model.device=cuda", "evaluation.engine=dedicated"], (1.0, 1.0, 1.0)),
        (["model.device=cuda", "evaluation.engine=dedicated", *SERVERS], (1.0, 4.0, 4.0)),
        (["evaluation.engine=dedicated"], (0.0, 0.0, 0.0)),
        (SHARED, (0.5, 0.5, 0.0)),
    ],
)
def test_gpus_of_rank_worker_and_evaluator_follow_from_the_device(
    file: Path, overrides: list[str], gpus: tuple[float, float, float]
) -> None:
    config = knobs.load(file, overrides)
    assert (config.gpus_per_rank, config.gpus_per_worker, config.gpus_of_evaluator) == gpus
    assert config.model.torch_device == ("cuda" if gpus[0] else "cpu")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "learner.data_parallel=2",
            "model.placement=shared needs rollout.num_workers=2 (it is 1): each learner rank",
        ),
        ("rollout.num_workers=3", "model.placement=shared needs rollout.num_workers=1 (it is 3)"),
        (
            "weights.transport=broadcast",
            "needs weights.transport=disk (it is broadcast): NCCL refuses two processes on one GPU",
        ),
        ("evaluation.engine=dedicated", "needs evaluation.engine=snapshot (it is dedicated)"),
    ],
)
def test_a_shared_device_takes_one_rank_and_one_engine(
    file: Path, override: str, line: str
) -> None:
    with pytest.raises(ValueError) as error:
        knobs.load(file, [*SHARED, override])
    assert line in str(error.value)


def test_tolerance_of_the_probe_follows_from_the_dtype(file: Path) -> None:
    assert knobs.load(file).model.probe_tolerance == 1e-3
    assert knobs.load(file, ["model.dtype=bfloat16"]).model.probe_tolerance == 0.5


@pytest.mark.parametrize("name", REPLACED)
def test_every_old_knob_is_one_line_that_names_what_replaced_it(file: Path, name: str) -> None:
    for value in ("1", "null", "text"):
        with pytest.raises(
            ValueError, match=rf"^{re.escape(name)} (was replaced|was removed)"
        ) as error:
            knobs.load(file, [f"{name}={value}"])
        assert "\n" not in str(error.value)
    section, _, key = name.partition(".")
    file.write_text(file.read_text().replace(f"{section}: {{", f"{section}: {{{key}: 1, "))
    if section not in ("data", "learner"):
        file.write_text(file.read_text() + f"{section}:\n  {key}: 1\n")
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} "):
        knobs.load(file)


def test_replacements_name_knobs_that_are_there() -> None:
    """A remedy is no old name, and no old name is a knob again."""
    names = {name for name, *_ in knobs.knobs()}
    assert not names & set(REPLACED)
    for line in [*REPLACED.values(), *REPLACED_VALUES.values()]:
        assert not {old for old in REPLACED if re.search(rf"\b{re.escape(old)}\b", line)}
        if "was replaced" in line and "environment" not in line:
            assert [name for name in names if name in line], line


@pytest.mark.parametrize(
    "name", [name for name, default, *_ in knobs.knobs() if isinstance(default, float)]
)
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999"])
def test_no_knob_takes_what_is_not_a_finite_number(file: Path, name: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} \((nan|inf|-inf)\) must be a finite number"):
        knobs.load(file, [f"{name}={value}"])


@pytest.mark.parametrize(
    "content", ["replay: 3", "replay:", "5", "[a]", "1: 2", "seed: [1", "seed: 1\nseed: 2", "a: *b"]
)
def test_a_file_that_is_no_tree_of_knobs_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "odd.yaml").write_text(content)
    with pytest.raises(ValueError) as error:
        knobs.load(tmp_path / "odd.yaml")
    assert "\n" not in str(error.value)
    assert "Config" not in str(error.value)  # no name of a class of the library
    if content in ("5", "[a]"):
        assert "must hold sections of knobs, not a single value or a list" in str(error.value)


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("run_dir: Schlüssel".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.yaml is not valid YAML"):
        knobs.load(tmp_path / "latin.yaml")


def test_a_literal_dollar_brace_in_a_file_is_escaped_and_reads_back(
    file: Path, tmp_path: Path
) -> None:
    file.write_text(
        file.read_text().replace("heldout:", r"template: 'for \${x} {problem}', heldout:")
    )
    config = knobs.load(file)
    assert config.data.template == "for ${x} {problem}"
    (tmp_path / "saved.yaml").write_text(knobs.to_yaml(config))
    assert knobs.load(tmp_path / "saved.yaml") == config


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    text=st.text(
        st.sampled_from("\\${}x: '\"#\n1e-")
        | st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]),
        max_size=12,
    )
)
def test_every_template_and_path_reads_back_as_it_was(
    file: Path, tmp_path: Path, text: str
) -> None:
    config = knobs.load(file)
    config = replace(
        config, run_dir="/runs/${a}", data=replace(config.data, template=text + "{problem}")
    )
    (tmp_path / "saved.yaml").write_text(knobs.to_yaml(config), encoding="utf-8")
    assert knobs.load(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(("name", "value"), REPLACED_VALUES)
def test_every_old_value_is_one_line_that_names_what_replaced_it(
    file: Path, name: str, value: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{name}={value} was replaced: set \w+\.\w+="):
        knobs.load(file, [f"{name}={value}"])


def test_a_run_ends_after_32_batches_of_rejected_groups(file: Path) -> None:
    assert knobs.load(file).replay.max_rejected_in_a_row == 512
    config = knobs.load(file, ["replay.groups_per_step=3"])
    assert config.replay.max_rejected_in_a_row == 96


@pytest.mark.parametrize("text", ["off", "'off'"])
def test_the_mode_off_needs_no_quotes(file: Path, text: str) -> None:
    """YAML reads a plain `off` as false."""
    overridden = knobs.load(file, [f"data.contamination={text}"])
    file.write_text(file.read_text().replace("data: {", f"data: {{contamination: {text}, "))
    for config in (overridden, knobs.load(file)):
        assert knobs.parse_contamination(config.data.contamination) == ("off", [])


def test_routing_replay_with_sglang_needs_gpus() -> None:
    with pytest.raises(ValueError, match=r"learner\.routing_replay=true needs GPUs with rollout"):
        knobs.load(CONFIGS / "quickstart_sglang.yaml", ["learner.routing_replay=true"])
