"""`dapo-async launch`: files for the resources of a config, and the files of cluster/."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from kuberay import complaints, ray_start_options
from paths import QUICKSTART, ROOT
from snippets import PAGES, snippets

from dapo_async.cli.main import main
from dapo_async.config import load
from dapo_async.runtime.cluster.placement import planned_gangs

LARGE = "configs/dapo_qwen2.5_32b.yaml"
CPUS = ["--gpus-per-node", "0", "--cpus-per-node", "2", "--memory-per-node", "4Gi"]
SCRIPTS = [
    *sorted((ROOT / "cluster").rglob("*.sh")),
    *(ROOT / ".ci" / name for name in ("check", "fast", "full", "run", "update")),
]


def launched(folder: Path, *words: str) -> dict[str, str]:
    """The files that a command writes, by name."""
    assert main(["launch", *words, "--out", str(folder)]) == 0
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["launch", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_files_of_the_cluster_folder_are_what_launch_writes(tmp_path: Path) -> None:
    script = launched(tmp_path / "slurm", "slurm", LARGE)
    manifests = launched(tmp_path / "kuberay", "kuberay", LARGE)
    written = {f"slurm/{name}": text for name, text in script.items()}
    written |= {f"kuberay/{name}": text for name, text in manifests.items()}
    there = {
        str(path.relative_to(ROOT / "cluster")): path.read_text()
        for folder in ("slurm", "kuberay")
        for path in (ROOT / "cluster" / folder).iterdir()
    }
    command = f"dapo-async launch (slurm|kuberay) {LARGE} --out cluster/(slurm|kuberay)"
    assert written == there, f"remove the old files, then run {command}"


def test_slurm_script_asks_for_the_fewest_nodes_on_which_the_run_fits(tmp_path: Path) -> None:
    (script,) = launched(tmp_path / "large", "slurm", LARGE).values()
    assert "#SBATCH --nodes=16\n" in script
    assert "#SBATCH --gpus-per-node=8\n" in script
    # Of 9 GPUs per node one is left over on the node of each group of 8 ranks, and of two engines.
    (odd,) = launched(tmp_path / "odd", "slurm", LARGE, "--gpus-per-node", "9").values()
    assert "#SBATCH --nodes=16\n" in odd
    four = ["learner.tensor_parallel=4", "learner.data_parallel=1", "--gpus-per-node=4"]
    (small,) = launched(tmp_path / "small", "slurm", LARGE, *four).values()
    assert "#SBATCH --nodes=17\n" in small
    (on_cpus,) = launched(tmp_path / "cpus", "slurm", str(QUICKSTART), *CPUS).values()
    assert "#SBATCH --nodes=1\n" in on_cpus
    assert "#SBATCH --gpus" not in on_cpus


def test_slurm_script_carries_overrides_quoted_and_a_fixed_run_directory(tmp_path: Path) -> None:
    words = ["tracking.mlflow=sqlite:////a b.db", "run_dir=my_run", "--shared", "/lustre/us"]
    (item,) = launched(tmp_path, "slurm", str(QUICKSTART), *words, *CPUS).items()
    name, script = item
    assert name == "my-run.slurm.sh"
    assert "\nrun_dir=${RUN_DIR:-/lustre/us/runs/my_run}\n" in script
    (line,) = [line for line in script.splitlines() if line.startswith("dapo-async train ")]
    assert shlex.split(line.rstrip("\\")) == [
        "dapo-async",
        "train",
        str(QUICKSTART),
        "tracking.mlflow=sqlite:////a b.db",
        "--supervise",
    ]
    assert "#SBATCH --no-kill\n" in script
    assert 'srun --overlap --no-kill --cpus-per-task="$SLURM_CPUS_PER_TASK"' in script


def test_kuberay_manifests_have_a_group_of_pods_for_each_side(tmp_path: Path) -> None:
    for text in launched(tmp_path, "kuberay", LARGE).values():
        manifest = yaml.safe_load(text)
        assert list(complaints(manifest)) == []
        spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
        assert spec["rayVersion"] == ray.__version__
        sizes = {group["groupName"]: group["replicas"] for group in spec["workerGroupSpecs"]}
        assert sizes == {"learner": 8, "rollout": 8}
        container = spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"


def test_entrypoint_of_a_job_is_a_command_that_can_be_repeated(tmp_path: Path) -> None:
    files = launched(tmp_path, "kuberay", "configs/quickstart.yaml", "rollout.num_workers=3", *CPUS)
    job = yaml.safe_load(files["quickstart.rayjob.yaml"])
    assert list(complaints(job)) == []
    # KubeRay puts it into a shell command: one command without operators.
    entrypoint = job["spec"]["entrypoint"]
    program, verb, config_file, *overrides = shlex.split(entrypoint)
    assert shlex.join([program, verb, config_file, *overrides]) == entrypoint
    assert (program, verb) == ("dapo-async", "train")
    assert config_file == "/opt/dapo_async/configs/quickstart.yaml"
    config = load(ROOT / "configs" / "quickstart.yaml", overrides)
    assert config.run_dir == "/shared/runs/quickstart"
    assert (config.train.resume, config.ray.wait_for_nodes_s) == ("auto", 1800)
    assert [gang.bundle for gang in planned_gangs(config)] == [
        {"CPU": 1.0, "learner": 0.001},
        *[{"CPU": 1.0, "rollout": 0.001}] * 3,
    ]


def test_check_of_manifests_notices_what_kubernetes_would_refuse() -> None:
    path = ROOT / "cluster" / "kuberay" / "dapo-qwen2-5-32b.rayjob.yaml"
    good = yaml.safe_load(path.read_text())
    assert list(complaints(good)) == []

    def broken(*keys: str | int, value: Any) -> list[str]:
        manifest = copy.deepcopy(good)
        spec = manifest["spec"]
        for key in keys[:-1]:
            spec = spec[key]
        spec[keys[-1]] = value
        return list(complaints(manifest))

    cluster = "rayClusterSpec"
    group = (cluster, "workerGroupSpecs", 0)
    pod = (*group, "template", "spec")
    assert "'entryPoint' was unexpected" in "".join(broken("entryPoint", value="true"))
    assert broken("backoffLimit", value="3")
    assert broken("backoffLimit", value=-1)
    assert broken("shutdownAfterJobFinishes", value=False)
    assert broken(cluster, "rayVersion", value="2.51.0")
    assert broken(cluster, "authOptions", "mode", value="disabled")
    assert broken(cluster, "authOptions", "mode", value="tokens")
    assert broken(cluster, "authOptions", "secret", value="mine")
    assert broken(*group, "groupName", value="rollout")
    assert broken(*group, "replicas", value=9)
    assert broken(*group, "minReplica", value=1)
    assert broken(*group, "rayStartParams", "resources", value='"{\\"other\\": 1}"')
    assert broken(*group, "rayStartParams", "num-cpu", value="1")
    assert broken(*group, "rayStartParams", "num-cpus", value=1)
    assert broken(*pod, "volumes", value=[])
    assert broken(*pod, "volumes", 0, "persistentVolumeClaim", value={"claim": "mine"})
    assert broken(*pod, "gracePeriodSeconds", value=120)
    container = (*pod, "containers", 0)
    assert broken(*container, "volumeMounts", 0, "name", value="other")
    assert broken(*container, "env", 0, value={"name": "HF_HOME", "value": 1})
    assert broken(*container, "env", 0, value={"name": "HF_HOME"})
    limits = (*container, "resources", "limits")
    assert broken(*limits, value={"cpu": "64", "memory": "256 GB", "nvidia.com/gpu": "8"})
    assert broken(*limits, value={"cpu": "64", "memory": "256Gi"})


def test_schema_of_manifests_allows_what_users_add() -> None:
    path = ROOT / "cluster" / "kuberay" / "dapo-qwen2-5-32b.raycluster.yaml"
    manifest = yaml.safe_load(path.read_text())
    spec = manifest["spec"]
    spec["enableInTreeAutoscaling"] = True
    spec["autoscalerOptions"] = {"version": "v2", "idleTimeoutSeconds": 600}
    group = spec["workerGroupSpecs"][1]
    group["maxReplicas"] = 16
    pod = group["template"]["spec"]
    pod["nodeSelector"] = {"pool": "gpu"}
    pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    secret = {"name": "wandb", "key": "api-key"}
    pod["containers"][0]["env"].append(
        {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": secret}}
    )
    assert list(complaints(manifest)) == []


def test_launch_refuses_what_cannot_work_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path)]
    assert "a node has 4 GPUs and 64 CPUs; give --gpus-per-node" in refused(
        capsys, "slurm", LARGE, "--gpus-per-node", "4", *out
    )
    shared = ["model.device=cuda", "model.placement=shared", "weights.transport=disk"]
    assert "set model.placement=separate, or write slurm files" in refused(
        capsys, "kuberay", str(QUICKSTART), *shared, *out
    )
    assert "the nodes of a Slurm job are all alike" in refused(
        capsys, "slurm", str(QUICKSTART), "learner.node_resource=big", *out
    )
    assert list(tmp_path.iterdir()) == []
    launched(tmp_path, "slurm", str(QUICKSTART))
    assert "exists; remove it, or give another --out FOLDER" in refused(
        capsys, "slurm", str(QUICKSTART), *out
    )


def test_every_script_passes_shellcheck() -> None:
    if (shellcheck := shutil.which("shellcheck")) is None:
        pytest.skip("shellcheck is not installed: pip install -e '.[dev]'")
    checked = subprocess.run(
        [shellcheck, "--severity=warning", *map(str, SCRIPTS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout


def test_file_of_the_cluster_launcher_follows_the_schema_of_ray() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    file = yaml.safe_load((ROOT / "cluster" / "ray_up.yaml").read_text())
    jsonschema.validate(file, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**file, "max_worker": 1}, schema)
    kinds = file["available_node_types"]
    marks = {name: {*each["resources"]} - {"CPU", "GPU"} for name, each in kinds.items()}
    assert marks == {"head": set(), "learner": {"learner"}, "rollout": {"rollout"}}


def test_every_option_that_is_given_to_ray_start_exists() -> None:
    texts = {each.where: each.code for page in PAGES for each in snippets(page)}
    files = [*(ROOT / "cluster").rglob("*.sh"), ROOT / "cluster" / "ray_up.yaml"]
    texts |= {path.name: path.read_text() for path in files}
    found = 0
    for where, text in texts.items():
        whole = re.sub(r"\\\n|\n +--", " --", text)
        for line in re.findall(r"(?m)(?:ray start|^(?:ports|limits)=)([^\n;&|#]*)", whole):
            for option in re.findall(r"--[a-z][a-z-]*", line):
                found += 1
                assert option in ray_start_options(), f"{where}: ray start {option}"
    assert found > 20


def test_image_copies_files_and_installs_extras_that_exist() -> None:
    text = (ROOT / "cluster" / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"(?m)^COPY (.*) \S+$", text) for name in line.split()]
    assert {"pyproject.toml", "dapo_async", "configs"} <= set(copied)
    assert [name for name in copied if not (ROOT / name).exists()] == []
    (extras,) = re.findall(r"-e '\.\[([a-z0-9,]+)\]'", text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    assert "sglang" in extras
