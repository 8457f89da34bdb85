"""The source keeps its structure: imports go down only and form no circle.

Each check reads source as text, so the same check is shown a small bad source and must complain.
"""

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath

import pytest
from blocked_imports import run_without
from paths import ROOT

SOURCES = {
    PurePosixPath(path.relative_to(ROOT / "dapo_async").as_posix()): path.read_text(
        encoding="utf-8"
    )
    for path in sorted((ROOT / "dapo_async").rglob("*.py"))
}
LEVELS = (
    {"config", "types", "utils"},
    {"algorithm", "reward", "model", "replay"},
    {"data", "rollout", "learner", "planner"},
    {"weights", "evaluate", "tracking"},
    {"runtime"},
    {"bench"},
    {"cli"},
    {"__main__"},
)
LEVEL_OF = {package: level for level, packages in enumerate(LEVELS) for package in packages}
OWNERS = {
    "ray": {"runtime"},
    "mlflow": {"tracking"},
    "sglang": set(),
    "omegaconf": {"config"},
    "datasets": {"data"},
    "pyarrow": {"data"},
    "huggingface_hub": {"data", "model", "utils"},
}
# What the packages below the runtime must run without.
WITHOUT = ("ray", "sglang", "mlflow", "omegaconf", "datasets", "pyarrow", "matplotlib")
LIGHT_PACKAGES = (
    "algorithm",
    "reward",
    "model",
    "replay",
    "learner",
    "rollout",
    "rollout.worker",
    "planner",
    "evaluate",
    "weights",
)
# An update of the learner's weights does not import torch's compiler, which takes over a second.
# Loading a model does not import sympy, which takes 0.4 s.
UPDATE = """
import sys
import torch
from dapo_async.learner.optimizer import ShardedAdamW
from dapo_async.model import load_decoder

model = torch.nn.Linear(2, 2)
optimizer = ShardedAdamW(model, lr=0.1, weight_decay=0.1, betas=(0.9, 0.999))
model.weight.grad, model.bias.grad = torch.ones(2, 2), torch.ones(2)
optimizer.step(lr=0.1)
assert optimizer.updates == 1
load_decoder("configs/base/quickstart")
assert not {"torch._dynamo", "sympy"} & sys.modules.keys()
"""
SMALL_BODY = 6  # statements of a method that needs no docstring
FORBIDDEN = {
    "law 1": "staleness bound",
    "law 2": "conservation",
    "law 3": "on-policy identity",
    "law 4": "token-mean exactness",
    "law 5": "handshake",
    "law 6": "time accounting",
    "law 7": "resume",
    "law 8": "no silent death",
    "behavior": "behaviour",
    "old_log": "behaviour_logprobs or proximal_logprobs",
    "rollout_logprobs": "behaviour_logprobs",
    "inference_logprobs": "behaviour_logprobs",
    "new_logprobs": "current_logprobs",
    "actor_logprobs": "current_logprobs",
    "rollout_is": "behaviour_weight",
}


def package_of(path: PurePosixPath) -> str:
    """`replay/buffer.py` is in the package replay; `types.py` is one of its own."""
    return path.parts[0] if len(path.parts) > 1 else path.stem


def imported(source: str) -> Iterator[str]:
    """Every dotted name that the source imports, also within functions.

    `from a import b` gives a.b.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                "relative imports hide which room is meant; write the whole name"
            )
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_complaints(path: PurePosixPath, source: str) -> Iterator[str]:
    """Imports go down only. Packages of one level never import each other.

    A big library stays with its owner. The mathematics (level 1) never sees a config.
    """
    package = package_of(path)
    for name in imported(source):
        library, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if library in OWNERS and package not in OWNERS[library]:
            owners = sorted(OWNERS[library]) or "nobody"
            yield f"{path} imports {name}; {library} belongs to {owners}"
        if library != "dapo_async" or other == package or package == "__init__":
            continue
        if other not in LEVEL_OF:
            yield f"{path} imports {name}, which is in no package"
        elif LEVEL_OF[other] >= LEVEL_OF[package]:
            yield (f"{path} (level {LEVEL_OF[package]}) imports {name} (level {LEVEL_OF[other]})")
        elif LEVEL_OF[package] == 1 and other == "config":
            yield f"{path} imports {name}: algorithms take floats, never a config"


def module_of(path: PurePosixPath) -> str:
    """`replay/buffer.py` is `replay.buffer`; `replay/__init__.py` is `replay`."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(sources: Mapping[PurePosixPath, str]) -> dict[str, set[str]]:
    """Module -> the modules that it imports, lazily or for types included."""
    modules = {module_of(path) for path in sources}
    graph: dict[str, set[str]] = {}
    for path, source in sources.items():
        edges = graph.setdefault(module_of(path), set())
        for name in imported(source):
            target = name.removeprefix("dapo_async.")
            if target == name:
                continue
            while target and target not in modules:
                target = target.rpartition(".")[0]
            edges.update({target} - {module_of(path), ""})
    return graph


def circles(sources: Mapping[PurePosixPath, str]) -> list[list[str]]:
    """Every group of modules that import each other in a circle, as sorted lists."""
    graph = import_graph(sources)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        pending = [start]
        while pending:
            for target in graph.get(pending.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    pending.append(target)
        return seen

    reach = {module: reached(module) for module in graph}
    groups = {
        tuple(sorted(other for other in reach[module] if module in reach[other]))
        for module in graph
        if module in reach[module]
    }
    return sorted(list(group) for group in groups)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def docstring_complaints(path: PurePosixPath, source: str) -> Iterator[str]:
    """Modules, public functions and classes have docstrings.

    Exempt are dataclasses and enumerations, torch modules, `forward`, and small methods.
    """
    tree = ast.parse(source)
    if not ast.get_docstring(tree):
        yield f"{path} has no module docstring"
    for node in tree.body:
        if not isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        ) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node) and not (
            isinstance(node, ast.ClassDef) and speaks_by_itself(node)
        ):
            yield f"{path}: {node.name} has no docstring"
        for method in functions(node) if isinstance(node, ast.ClassDef) else ():
            statements = sum(isinstance(part, ast.stmt) for part in ast.walk(method)) - 1
            if (
                method.name != "forward"
                and not method.name.startswith("_")
                and not ast.get_docstring(method)
                and statements > SMALL_BODY
            ):
                name = f"{node.name}.{method.name}"
                yield f"{path}: {name} has {statements} statements and no docstring"


def speaks_by_itself(node: ast.ClassDef) -> bool:
    """Dataclasses and enumerations explain their fields; a torch module has its forward."""
    marks = " ".join(ast.unparse(mark) for mark in (*node.decorator_list, *node.bases))
    return re.search(r"\bdataclass\b|Enum\b|NamedTuple\b|nn\.Module\b", marks) is not None


def word_complaints(path: PurePosixPath, source: str) -> Iterator[str]:
    for number, line in enumerate(source.splitlines(), start=1):
        yield from (
            f"{path}:{number} says {word!r}; say {good}"
            for word, good in FORBIDDEN.items()
            if word in line.lower()
        )


Check = Callable[[PurePosixPath, str], Iterator[str]]
CHECKS: tuple[Check, ...] = (import_complaints, docstring_complaints, word_complaints)


def test_every_package_has_a_level() -> None:
    packages = {package_of(path) for path in SOURCES} - {"__init__"}
    assert packages <= LEVEL_OF.keys()
    assert {"algorithm", "replay", "learner", "rollout", "runtime", "cli"} <= packages


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(SOURCES) == []


def test_a_circle_is_found_through_packages_lazy_imports_and_type_checking() -> None:
    sources = {
        PurePosixPath("a/__init__.py"): "from dapo_async.a.one import f",
        PurePosixPath("a/one.py"): "def f():\n    from dapo_async.b import g",
        PurePosixPath("b.py"): "if TYPE_CHECKING:\n    from dapo_async.a import f",
        PurePosixPath("c.py"): "import dapo_async.a.one",
    }
    assert circles(sources) == [["a", "a.one", "b"]]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_source_keeps_every_rule(check: Check) -> None:
    assert [
        complaint for path, source in SOURCES.items() for complaint in check(path, source)
    ] == []


@pytest.mark.parametrize(
    ("check", "path", "source", "complaint"),
    [
        (
            import_complaints,
            "model/decoder.py",
            "from dapo_async.learner import LearnerRank",
            "model/decoder.py (level 1) imports dapo_async.learner",
        ),
        (
            import_complaints,
            "learner/rank.py",
            "import dapo_async.rollout.engine",
            "(level 2) imports dapo_async.rollout.engine (level 2)",
        ),
        (
            import_complaints,
            "types.py",
            "from dapo_async.utils import files",
            "types.py (level 0) imports dapo_async.utils.files (level 0)",
        ),
        (
            import_complaints,
            "replay/buffer.py",
            "def f():\n    from dapo_async.reward import score_group",
            "(level 1) imports dapo_async.reward.score",
        ),
        (
            import_complaints,
            "algorithm/loss.py",
            "from dapo_async.config import Algorithm",
            "algorithms take floats, never a config",
        ),
        (
            import_complaints,
            "data/stream.py",
            "from dapo_async.attic import x",
            "dapo_async.attic.x, which is in no package",
        ),
        (
            import_complaints,
            "config/validate.py",
            "from dapo_async.utils.state_clock import StateClock",
            "(level 0) imports dapo_async.utils.state_clock.StateClock (level 0)",
        ),
        (
            import_complaints,
            "rollout/worker.py",
            "import ray",
            "imports ray; ray belongs to ['runtime']",
        ),
        (
            import_complaints,
            "runtime/loop.py",
            "from mlflow import log_metric",
            "mlflow belongs to ['tracking']",
        ),
        (import_complaints, "runtime/system.py", "import sglang.srt", "sglang belongs to nobody"),
        (
            docstring_complaints,
            "data/x.py",
            "'''Place.'''\nasync def f(): ...",
            "f has no docstring",
        ),
        (
            docstring_complaints,
            "data/x.py",
            "'''Place.'''\nclass Room: ...",
            "Room has no docstring",
        ),
        (
            docstring_complaints,
            "data/x.py",
            "'''Place.'''\n@dataclass\nclass R:\n  def f(self):\n" + "    f()\n" * 7,
            "R.f has 7 statements and no docst",
        ),
        (
            word_complaints,
            "learner/rank.py",
            "old_log_probs = 0",
            "learner/rank.py:1 says 'old_log'; say behaviour_logprobs or proximal_logprobs",
        ),
        (
            word_complaints,
            "learner/rank.py",
            "x = 1\n# Behavior policy",
            "rank.py:2 says 'behavior'; say behaviour",
        ),
        (
            word_complaints,
            "learner/rank.py",
            "rollout_is_weights = cliprange_high",
            "say behaviour_weight",
        ),
    ],
)
def test_each_check_complains_when_its_rule_is_broken(
    check: Check, path: str, source: str, complaint: str
) -> None:
    complaints = list(check(PurePosixPath(path), source))
    assert any(complaint in said for said in complaints), complaints


@pytest.mark.parametrize(
    ("check", "path", "source"),
    [
        (
            import_complaints,
            "runtime/loop.py",
            "import ray\nfrom dapo_async.learner import LearnerRank\n"
            "from dapo_async.runtime import cluster",
        ),
        (
            import_complaints,
            "learner/rank.py",
            "import raytracer\nfrom dapo_async.config import LearnerConfig\n"
            "from dapo_async.learner import batching",
        ),
        (
            docstring_complaints,
            "data/x.py",
            "'''Place.'''\n@dataclass(frozen=True)\nclass R:\n  x: int  # metres\n"
            "def _f(): ...\nclass C(StrEnum): ...",
        ),
        (
            word_complaints,
            "learner/rank.py",
            "# the behaviour logprobs of an older version, a fold of logs, a sample of groups",
        ),
    ],
)
def test_no_check_complains_about_what_is_right(check: Check, path: str, source: str) -> None:
    assert list(check(PurePosixPath(path), source)) == []


def test_packages_below_the_runtime_run_without_ray_and_other_big_libraries() -> None:
    imports = "".join(
        f"import dapo_async.{module}\n" for module in (*LIGHT_PACKAGES, "rollout.native.engine")
    )
    ran = run_without(WITHOUT, imports + UPDATE)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_the_runtime_fails_without_ray_so_the_blocker_works() -> None:
    ran = run_without(["ray"], "import dapo_async.runtime.cluster.connect")
    assert ran.returncode == 1
    assert "ModuleNotFoundError: No module named 'ray'" in ran.stderr


def test_names_of_tests_have_at_most_80_characters() -> None:
    names = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text("utf-8"), re.M)
    }
    assert len(names) > 500
    assert sorted(name for name in names if len(name) > 80) == []
