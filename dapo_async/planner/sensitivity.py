"""How the step time of a plan moves when an assumption is wrong.

In: the best scenario. Out: by what changes, the step time over that before; or why the changed
scenario cannot run. `sweep` calls it, `plan` prints it in the lines `if`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from dapo_async.planner.scenario import Scenario
from dapo_async.planner.shapes import smaller
from dapo_async.planner.simulator import simulate


def sensitivity(
    scenario: Scenario, *, engine_gpus: int, node_gpus: int
) -> Iterator[tuple[str, float | str]]:
    """What changes, and the step time over that before, or one line why it cannot run."""
    before_s = simulate(smaller(scenario)).step_s
    for name, change in _changes(scenario, max(1, node_gpus // engine_gpus)):
        try:
            changed = change()
        except ValueError as error:
            yield name, str(error)
        else:
            yield name, simulate(smaller(changed)).step_s / before_s


def _changes(scenario: Scenario, lost: int) -> Iterator[tuple[str, Callable[[], Scenario]]]:
    """Each makes a scenario. It raises ValueError if that cannot run."""
    lengths, engine = scenario.lengths, scenario.engine
    longer = replace(
        lengths, mean_tokens=2 * lengths.mean_tokens, max_tokens=2 * lengths.max_tokens
    )
    yield (
        f"responses and their limit twice as long ({longer.max_tokens} tokens)",
        lambda: replace(scenario, lengths=longer),
    )
    yield "acceptance 30 %", lambda: replace(scenario, acceptance=(0.3, 0.3))
    yield (
        f"one node lost ({lost} of {scenario.num_engines} engines)",
        lambda: _without(scenario, lost),
    )
    if engine.kv_tokens < float("inf"):
        half = replace(engine, kv_tokens=engine.kv_tokens / 2)
        yield "half of the KV cache", lambda: replace(scenario, engine=half)


def _without(scenario: Scenario, engines: int) -> Scenario:
    if engines >= scenario.num_engines:
        raise ValueError("no engine is left")
    return replace(scenario, num_engines=scenario.num_engines - engines)
