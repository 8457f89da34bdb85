"""SGLang's HTTP API as far as it is used here (0.5.21): each call one method, each answer checked (L2).

Whatever makes a server unusable (refused, silent, an error, an answer that can't be) is an EngineFault that names the server and the call.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
from numpy.typing import NDArray

from dapo_async.rollout.engine import EngineFault

HEALTH_S = 5.0
POLL_S = 0.25
EVENT = b"\n\n"  # between two server-sent events
DONE = b"[DONE]"
SERVER_KEY = "SGLANG_API_KEY"  # of servers that run already, in the environment: never in a config, which is written down
TensorLine = tuple[str, str, tuple[int, ...]]  # name, dtype such as "float32", shape


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some more tokens of one response; the last chunk has the reason of its end, and the versions of all its tokens."""

    token_ids: list[int]
    logprobs: list[float]
    finish: Mapping[str, Any] | None
    versions: Sequence[Mapping[str, Any]]
    weight_version: str  # what the server says that it serves


class SGLangClient:
    """One server's API. Made and used in one event loop."""

    def __init__(self, url: str, *, api_key: str, silence_s: float = 120.0) -> None:
        """`silence_s`: a response without a new token, or a call without an answer, for so long is a fault."""
        self.url, self._silence_s = url, silence_s
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=silence_s)
        self._session = aiohttp.ClientSession(
            headers=headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
        )

    async def close(self) -> None:
        await self._session.close()

    async def healthy(self) -> bool:
        """Whether it answers now."""
        try:
            async with self._session.get(
                f"{self.url}/health", timeout=aiohttp.ClientTimeout(total=HEALTH_S)
            ) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def wait_until_healthy(self, *, timeout_s: float) -> None:
        """Raises EngineFault when it does not answer in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while not await self.healthy():
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            raise EngineFault(
                f"{self.url} has not answered for {timeout_s:g} s; start the server there"
            ) from error

    async def weight_version(self) -> str:
        """The name of the weights that it serves now."""
        info = await self._ask("GET", "/model_info")
        return str(info["weight_version"])

    async def checksum(self) -> str:
        """Of the weights as they lie on the server's GPUs: equal between servers of one layout. SGLang 0.5.21 has none on a CPU."""
        answer = await self._ask("POST", "/weights_checker", {"action": "checksum"})
        self._check(answer, "weights_checker")
        return str(answer["per_engine_checksum"])

    async def stream(self, body: Mapping[str, Any]) -> AsyncIterator[Chunk]:
        """One response, in chunks. Raises ValueError for a request that the server refuses as wrong, EngineFault for everything else."""
        self._check_open()
        try:
            async with self._session.post(
                f"{self.url}/generate", json={**body, "stream": True, "return_logprob": True}
            ) as answer:
                if answer.status == 400:
                    raise ValueError(
                        f"{self.url} refuses the request: {_one_line(await answer.text())}"
                    )
                if answer.status != 200:
                    raise EngineFault(
                        f"{self.url} answers generate with {answer.status}: {_one_line(await answer.text())}"
                    )
                async for event in _events(answer.content):
                    yield self._chunk(event)
        except TimeoutError as error:  # before ClientError: aiohttp's are both
            raise EngineFault(
                f"{self.url} sent nothing for {self._silence_s:g} s while it generated (deadlines.answer_s)"
            ) from error
        except aiohttp.ClientError as error:
            raise EngineFault(f"{self.url} broke off generate: {error!r}") from error
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise EngineFault(
                f"{self.url} sent something else than a piece of a response: {error!r}"
            ) from error

    def _chunk(self, event: Mapping[str, Any]) -> Chunk:
        if "error" in event:
            told = _one_line(str(event["error"]["message"]))
            if event["error"]["code"] == 400:
                raise ValueError(f"{self.url} refuses the request: {told}")
            raise EngineFault(f"{self.url} failed while it generated: {told}")
        meta, token_ids = event["meta_info"], list(event["output_ids"])
        entries = meta.get("output_token_logprobs") or []
        logprobs = [entry[0] for entry in entries]
        if [entry[1] for entry in entries] != token_ids or not all(
            isinstance(each, float) and math.isfinite(each) for each in logprobs
        ):
            raise EngineFault(
                f"{self.url} gave {len(token_ids)} tokens without a finite logprob for each"
            )
        return Chunk(
            token_ids,
            logprobs,
            meta["finish_reason"],
            meta.get("weight_versions") or (),
            str(meta["weight_version"]),
        )

    async def prompt_logprobs(self, token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """log-softmax(logits) of each token after the first, `[P] -> [P - 1]`, by a fresh forward pass: nothing cached is used."""
        body = {
            "input_ids": token_ids.tolist(),
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = await self._ask("POST", "/generate", body)
        values = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
        return np.asarray(
            [math.nan if value is None else value for value in values], dtype=np.float32
        )

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Ends these responses where they are. Unknown ones are ignored."""
        await asyncio.gather(
            *(self._ask("POST", "/abort_request", {"rid": each}, text=True) for each in request_ids)
        )

    async def pause(self, mode: str) -> None:
        """Nothing is generated until `resume`: `in_place` keeps the KV of what runs, `retract` gives it up."""
        await self._ask("POST", "/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        await self._ask("POST", "/continue_generation", {})

    async def update_from_disk(self, folder: str, *, weight_version: str, flush: bool) -> None:
        """The weights in `folder` (safetensors) replace those served."""
        body = {"model_path": folder, "weight_version": weight_version, "flush_cache": flush}
        self._check(
            await self._ask("POST", "/update_weights_from_disk", body), "update_weights_from_disk"
        )

    async def join_group(
        self, address: tuple[str, int], *, name: str, first_rank: int, world_size: int, backend: str
    ) -> None:
        """Joins the weight group: its tensor-parallel ranks get the numbers from `first_rank` on. Returns when every member has joined."""
        host, port = address
        body = {
            "master_address": host,
            "master_port": port,
            "rank_offset": first_rank,
            "world_size": world_size,
            "group_name": name,
        }
        self._check(
            await self._ask("POST", "/init_weights_update_group", {**body, "backend": backend}),
            "init_weights_update_group",
        )

    async def clear(self, group: str) -> None:
        """Undoes what a run that ended in the midst of something may have left: a pause, an update that was begun, its group."""
        await self.resume()
        for path, body in (
            ("/end_weight_update", {}),
            ("/destroy_weights_update_group", {"group_name": group}),
        ):
            with contextlib.suppress(EngineFault):  # nothing to undo
                await self._ask("POST", path, body)

    async def leave_group(self, name: str) -> None:
        await self._ask("POST", "/destroy_weights_update_group", {"group_name": name})

    async def receive(
        self,
        buckets: Sequence[Sequence[TensorLine]],
        *,
        group: str,
        weight_version: str,
        flush: bool,
    ) -> None:
        """Takes part in the broadcast of these buckets, each as bytes; with the last one `weight_version` is what is served."""
        self._check(await self._ask("POST", "/begin_weight_update", {}), "begin_weight_update")
        for bucket in buckets:
            last = bucket is buckets[-1]
            names, dtypes, shapes = zip(*bucket, strict=True)
            body = {
                "names": names,
                "dtypes": dtypes,
                "shapes": shapes,
                "group_name": group,
                "load_format": "flattened_bucket",
                "flush_cache": flush and last,
                "weight_version": weight_version if last else None,
            }
            self._check(
                await self._ask("POST", "/update_weights_from_distributed", body),
                "update_weights_from_distributed",
            )
        self._check(await self._ask("POST", "/end_weight_update", {}), "end_weight_update")

    def _check_open(self) -> None:
        if self._session.closed:
            raise EngineFault(f"{self.url} is not connected any more")

    def _check(self, answer: Mapping[str, Any], what: str) -> None:
        if not answer.get("success"):
            raise EngineFault(
                f"{self.url} failed in {what}: {_one_line(str(answer.get('message')))}"
            )

    async def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, text: bool = False
    ) -> dict[str, Any]:
        self._check_open()
        try:
            async with self._session.request(method, f"{self.url}{path}", json=body) as answer:
                told = await answer.text()
                if answer.status != 200:
                    raise EngineFault(
                        f"{self.url} answers {path} with {answer.status}: {_one_line(told)}"
                    )
                return {} if text else dict(json.loads(told))
        except TimeoutError as error:  # before ClientError: aiohttp's are both
            raise EngineFault(
                f"{self.url} did not answer {path} within {self._silence_s:g} s (deadlines.answer_s)"
            ) from error
        except (aiohttp.ClientError, json.JSONDecodeError) as error:
            raise EngineFault(f"{self.url} can't be asked {path}: {error!r}") from error


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each event. Raises ClientPayloadError when the stream ends before its end was said."""
    waiting = b""
    async for part in content.iter_any():
        *events, waiting = (waiting + part).split(EVENT)
        for event in events:
            data = event.removeprefix(b"data: ").strip()
            if data == DONE:
                return
            yield json.loads(data)
    raise aiohttp.ClientPayloadError("the stream of a response ended before the response did")


def _one_line(text: str, *, most: int = 300) -> str:
    return " ".join(text.split())[:most]
