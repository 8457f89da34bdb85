"""An evaluation on a rollout worker's engine, which is leased for that long. Plain ports, no Ray.

In this order, for the version v whose publish has just begun:

1. The worker asks for no more groups, and the replay room grants it none, not even for a request that is on its way. What it was granted before
   was granted under v at most, and runs to its end; so no group is ever admitted under a newer version than the engine has (law 1).
2. The publisher passes the engine over from the publish of v + 1 on, and that of v is waited for: the engine serves v and has proved it. By broadcast
   it stages what is published, by disk it reads nothing. Versions count as served, and their credits return, without it.
3. What the worker has in hand is generated, scored and offered, and nothing new begins.
4. All held-out prompts are answered: nothing changes the weights meanwhile, so the evaluation is of one version.
5. In turn with the publishes the engine gets the newest published version and proves it (law 5; wrong weights are quarantined and reloaded as ever).
   From here on it takes part in every publish again.
6. Only then the replay room grants the worker credits again, and it asks for them.

An engine that is lost (an SGLang server) in any of these steps is the publisher's no longer: what is left of the lease is given up, and whoever
starts the engine anew brings it to the newest version and has the room grant it credits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from dapo_async.evaluate import Evaluation
from dapo_async.weights.publisher import Publisher, Receiver


class LeasedWorker(Receiver, Protocol):
    """A rollout worker whose engine can be leased."""

    async def lease(self, on: bool) -> None: ...

    async def drained(self) -> None: ...  # nothing is in hand any more

    async def evaluate(
        self,
    ) -> Evaluation | None: ...  # on all held-out prompts; None: its engine was lost over it


class Room(Protocol):
    """The replay room, which grants credits."""

    async def lease(self, worker: str, on: bool) -> None: ...


async def evaluate_on_lease(
    worker: LeasedWorker, *, replay: Room, publisher: Publisher, enter: Callable[[str, str], None]
) -> Evaluation | None:
    """See the module's order of events. `enter(state, whom)` is told what is being waited for. A failure ends the run: nothing is undone here.

    None when the engine was lost before all was answered.
    """
    enter("drain", worker.name)
    await worker.lease(True)
    await replay.lease(worker.name, True)
    await publisher.lend(worker)
    await worker.drained()
    evaluation = None
    if publisher.is_lent(worker):
        enter("evaluate", worker.name)
        evaluation = await worker.evaluate()
        if evaluation is None:
            publisher.lose(worker)
    enter("take back", worker.name)
    if await publisher.take_back(worker):
        await replay.lease(worker.name, False)
    await worker.lease(False)
    return evaluation
