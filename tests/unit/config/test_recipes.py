"""Recipes pass --dry-run and have the published values; each rung changes one knob."""

import re
from typing import Any

import pytest
import yaml
from paths import CONFIGS, ROOT
from recipe_estimate import SIZES, estimate

from dapo_async import config as knobs
from dapo_async.cli.main import main
from dapo_async.config import load, parse_contamination, schema
from dapo_async.learner.options import loss_options

RECIPES = (
    "dapo_qwen2.5_32b",
    "dapo_qwen2.5_7b_math",
    "dapo_qwen2.5_1.5b",
    "dapo_qwen3_30b_a3b",
)
LADDER = (
    "1_grpo",
    "2_overlong_filtering",
    "3_clip_higher",
    "4_soft_overlong",
    "5_token_level_loss",
    "6_dynamic_sampling",
)
DAPO = [f"{name}.yaml" for name in RECIPES] + [f"ladder/{name}.yaml" for name in LADDER]

GIB = 2**30
GSM8K = ["gsm8k_0.5b_1gpu.yaml", "gsm8k_1.5b_2gpu.yaml"]
GRPO = ["grpo_qwen2_7b.yaml"]
LONG = ["dapo_qwen2.5_7b_20k.yaml", "dapo_qwen2.5_7b_28k.yaml"]
FILES = DAPO + GSM8K + GRPO + LONG


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The knobs that a file sets, by their dotted names."""
    return {
        name: value
        for key, values in tree.items()
        for name, value in (
            flat(values, f"{prefix}{key}.") if isinstance(values, dict) else {prefix + key: values}
        ).items()
    }


def values_of(file: str) -> dict[str, Any]:
    return flat(yaml.safe_load((CONFIGS / file).read_text()))


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    assert one.keys() == other.keys()
    return {name: (one[name], other[name]) for name in one if one[name] != other[name]}


def rungs() -> list[dict[str, Any]]:
    return [values_of(f"ladder/{name}.yaml") for name in LADDER]


def test_each_rung_of_the_ladder_differs_from_the_one_before_by_the_one_thing() -> None:
    steps = [differences(below, above) for below, above in zip(rungs(), rungs()[1:], strict=False)]
    assert steps == [
        {"algorithm.overlong_filtering": (False, True)},
        {"algorithm.clip_high": (0.2, 0.28)},
        {"reward.overlong_cache_tokens": (None, 4096)},
        {"algorithm.loss_mean": ("sequence", "token")},
        {"replay.dynamic_sampling": (False, True)},
    ]


def test_the_lowest_rung_is_grpo_and_the_highest_the_recipe_with_filtering() -> None:
    lowest, highest = rungs()[0], rungs()[-1]
    assert (lowest["algorithm.clip_low"], lowest["algorithm.clip_high"]) == (0.2, 0.2)
    assert differences(highest, values_of("dapo_qwen2.5_32b.yaml")) == {
        "algorithm.overlong_filtering": (True, False)
    }


def test_a_second_difference_between_rungs_would_be_seen() -> None:
    one, two = rungs()[:2]
    assert len(differences(one, two | {"learner.lr": 2e-6})) == 2
    with pytest.raises(AssertionError):
        differences(one, {name: value for name, value in two.items() if name != "learner.lr"})


def test_the_recipe_of_the_paper_has_its_values() -> None:
    values = values_of("dapo_qwen2.5_32b.yaml")
    paper = {
        "algorithm.clip_low": 0.2,
        "algorithm.clip_high": 0.28,
        "algorithm.loss_mean": "token",
        "reward.overlong_cache_tokens": 4096,
        "rollout.max_response_tokens": 20480,
        "data.max_prompt_tokens": 2048,
        "rollout.temperature": 1.0,
        "replay.groups_per_step": 512,
        "replay.group_size": 16,
        "replay.dynamic_sampling": True,
        "learner.lr": 1e-6,
        "learner.warmup_steps": 20,
        "learner.weight_decay": 0.1,
        "learner.grad_clip": 1.0,
        "learner.num_minibatches": 16,
        "data.template": "dapo",
        "data.train": "hub:dapo_math_17k",
    }
    assert {name: values[name] for name in paper} == paper
    config = knobs.load(CONFIGS / "dapo_qwen2.5_32b.yaml")
    assert (
        config.replay.groups_per_step * config.replay.group_size // config.learner.num_minibatches
        == 512
    )  # responses per update
    assert (
        config.algorithm.objective,
        config.algorithm.entropy_bonus,
        config.algorithm.normalize_std,
    ) == ("dapo", 0.0, True)


@pytest.mark.parametrize("file", [name for name in DAPO if "1.5b" not in name])
def test_the_recipes_on_aime_evaluate_as_the_paper(file: str) -> None:
    config = knobs.load(CONFIGS / file)
    assert (config.data.heldout, config.evaluation.num_prompts) == ("hub:aime24", 30)
    assert config.evaluation.how == "avg@32 at temperature 1, top-p 0.7"


def test_the_recipe_of_grpo_has_the_published_values() -> None:
    values = values_of("grpo_qwen2_7b.yaml")
    verl = {
        "algorithm.clip_low": 0.2,
        "algorithm.clip_high": 0.2,
        "algorithm.kl_coef": 0.001,
        "algorithm.kl_estimator": "k3",
        "rollout.max_response_tokens": 1024,
        "data.max_prompt_tokens": 512,
        "replay.groups_per_step": 1024,
        "replay.group_size": 5,
        "replay.dynamic_sampling": False,
        "learner.lr": 1e-6,
        "learner.num_minibatches": 4,
    }
    assert {name: values[name] for name in verl} == verl


@pytest.mark.parametrize("file", FILES)
def test_every_recipe_passes_a_dry_run_that_names_what_it_would_download(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(CONFIGS / file), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    config = knobs.load(CONFIGS / file)
    assert (
        f"would download the model {config.model.path} (safetensors, config and tokenizer)"
        in printed
    )
    published = "openai/gsm8k/main" if file in GSM8K + GRPO else "BytedTsinghua-SIA/DAPO-Math-17k"
    assert f"would load the data set hub:{published}:train from the Hugging Face hub\n" in printed
    assert f"would train {config.train.num_steps} steps of " in printed
    assert printed.count(f" {config.gpus_per_rank:g} GPU ") >= config.learner.num_ranks


@pytest.mark.parametrize("file", FILES)
def test_every_recipe_derives_its_layout_and_says_that_it_was_not_run(file: str) -> None:
    text = (CONFIGS / file).read_text()
    head = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    config = knobs.load(CONFIGS / file)
    rollout, learner = config.rollout, config.learner
    of_learner = learner.num_ranks * config.gpus_per_rank
    num_gpus = int(rollout.num_workers * config.gpus_per_worker + of_learner)
    assert re.search(rf"\b{num_gpus} GPUs? of \d+ GB", head)
    assert re.search(rf"\b{rollout.num_workers} engines? x {config.gpus_per_worker:g} GPU", head)
    slices = f"{learner.context_parallel} x " if learner.context_parallel > 1 else ""
    assert f"{learner.data_parallel} x {slices}{learner.tensor_parallel} ranks" in head
    assert f"num_slots {rollout.num_slots}" in head
    assert re.search(r"Not run( on a GPU)?\. Derived:", head)
    assert file in GSM8K or "verl" in head or "AReaL" in head
    # The longest sequence fits one pass, and rollouts of two steps at most are in flight at a time.
    assert (
        learner.fixed_microbatch_tokens
        >= config.data.max_prompt_tokens + rollout.max_response_tokens
    )
    assert parse_contamination(config.data.contamination)[0] == "drop"


STEP = re.compile(
    r"step +estimated by the planner's cost model on (\w+), with responses of ([\d,]+) tokens and "
    r"every group kept: the learner takes (\d+) s \(MFU (0\.\d\d)\), the engines (\d+) s, a step "
    r"(\d+) s\."
)


@pytest.mark.parametrize("file", FILES)
def test_every_recipe_states_what_the_cost_model_expects_of_it(file: str) -> None:
    """The form of the learner, its memory, and the times, as they are computed here."""
    lines = (CONFIGS / file).read_text().splitlines()
    head = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    stated = STEP.search(head)
    assert stated is not None
    gpu, responses, *numbers = stated.groups()
    memory = re.search(r"GPUs? of (\d+) GB", head)
    assert memory is not None
    config = knobs.load(CONFIGS / file)
    tokens = int(responses.replace(",", ""))
    found = estimate(config, gpu=gpu, memory_gb=float(memory[1]), response_tokens=tokens)
    assert tokens < config.rollout.max_response_tokens
    assert [float(number) for number in numbers] == [
        round(found.train_s),
        round(found.mfu, 2),
        round(found.generate_s),
        round(found.step_s),
    ]
    assert f"{found.choice.memory.on_device / GIB:.1f} GiB" in head
    assert found.choice.memory.on_device <= found.choice.budget


@pytest.mark.parametrize("file", ["dapo_qwen2.5_7b_math.yaml", "dapo_qwen2.5_7b_28k.yaml"])
def test_the_recipes_of_the_math_model_need_more_positions_than_it_has(file: str) -> None:
    config = knobs.load(CONFIGS / file)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    assert config.model.max_positions is not None
    assert SIZES[config.model.path.removeprefix("hub:")].max_positions < longest
    assert longest <= config.model.max_positions == 32_768


def test_recipes_of_long_responses_have_the_published_lengths() -> None:
    lengths = {
        file: values_of(file)["rollout.max_response_tokens"]
        for file in ("dapo_qwen2.5_7b_math.yaml", *LONG)
    }
    assert lengths == {
        "dapo_qwen2.5_7b_math.yaml": 8192,
        "dapo_qwen2.5_7b_20k.yaml": 20_480,
        "dapo_qwen2.5_7b_28k.yaml": 28_672,
    }


@pytest.mark.parametrize("file", GSM8K)
def test_every_value_of_the_small_recipes_has_its_comment(file: str) -> None:
    lines = (CONFIGS / file).read_text().splitlines()
    assert not [line for line in lines if re.match(r"  \w+: [^#]+$", line)]


def test_the_readme_of_the_folder_names_every_config() -> None:
    readme = (CONFIGS / "README.md").read_text()
    rungs = {path.name for path in (CONFIGS / "ladder").glob("*.yaml")}
    assert all(f"`{path.name}`" in readme for path in CONFIGS.glob("*.yaml"))
    assert (f"`ladder/{min(rungs)}`", f"`{max(rungs)}`") == (
        "`ladder/1_grpo.yaml`",
        "`6_dynamic_sampling.yaml`",
    )


def published_algorithms() -> dict[str, list[str]]:
    """The rows of the table of docs/algorithms.md: name to overrides."""
    page = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    rows = page.partition("| algorithm | source |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {name: [] if of == "none" else of.strip("`").split() for name, _, of in cells}


@pytest.mark.parametrize("name", published_algorithms())
def test_every_published_algorithm_is_a_valid_config_and_a_valid_loss(name: str) -> None:
    config = load(CONFIGS / "quickstart.yaml", published_algorithms()[name])
    loss_options(config.algorithm)


def test_every_knob_has_a_page_and_a_test() -> None:
    pages = [page for page in (ROOT / "docs").glob("*.md") if page.name != "configuration.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    names = [knob.name for knob in schema.knobs()]
    assert [name for name in names if f"`{name}" not in text and name not in text] == []
    leaves = {name: name.rpartition(".")[2] for name in names}
    assert [name for name, leaf in leaves.items() if not re.search(rf"\b{leaf}\b", tests)] == []
