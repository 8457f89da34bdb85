"""The part of SGLang's HTTP API (0.5.21) that is used here: one method per call.

Each answer is checked. A refused connection, silence, an HTTP error or an answer that makes no
sense raises EngineFault, which names the server and the call.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
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
# A server that cannot read a body, or cannot allocate memory for it, also answers 400. Every body
# sent here is valid, so such an answer is the server's own fault.
BROKEN = re.compile(
    r"json_invalid|not enough memory|out of memory|bad_alloc|MemoryError|n.t allocate", re.I
)
# SGLang's words for a broadcast that failed before anything of this bucket was loaded.
RECEIVE_FAILED = "Failed to receive weights"
TensorHeader = tuple[str, str, tuple[int, ...]]  # name, dtype such as "float32", shape


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of one response."""

    token_ids: list[int]
    logprobs: list[float]
    finish: Mapping[str, Any] | None  # in the last chunk: why the response ended
    versions: Sequence[Mapping[str, Any]]  # in the last chunk: the versions of all its tokens
    weight_version: str  # the version that the server says it serves
    cached_tokens: int = 0  # of the input, whose keys and values the server had
    # How often the request lost its memory so far: to others, or in a pause that drops it.
    retractions: int = 0
    # In the last chunk, if they were asked for: the experts of all tokens but the last one, in all
    # layers, as int32.
    experts: bytes | None = None


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """Requests and memory for keys and values (KV) of a server at one moment."""

    running: int = 0  # requests that decode
    queued: int = 0  # requests that wait for memory, or for their prefill
    used_tokens: int = 0  # with KV; cached prefixes that no request uses are left out
    capacity_tokens: int = 0

    def __add__(self, other: ServerLoad) -> ServerLoad:
        """Two data-parallel ranks of one server."""
        return ServerLoad(
            self.running + other.running,
            self.queued + other.queued,
            self.used_tokens + other.used_tokens,
            self.capacity_tokens + other.capacity_tokens,
        )


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What a server has room for, and how it computes."""

    kv_tokens: int  # with keys and values
    running_requests: int
    float32_logits: bool = True  # it sums its logits in float32


@dataclass(frozen=True, slots=True)
class ServerHashes:
    """What a server says of the weights that it holds."""

    checksum: str  # of all of them, comparable between servers of one layout
    tensors: tuple[Mapping[str, str], ...]  # the hash of each tensor, per tensor-parallel rank


class CallRefused(EngineFault):
    """The server answered that it did not do what it was asked for. It still works."""


class BroadcastLost(CallRefused):
    """The sender or another receiver was lost. Some of the server's weights may be the new ones."""


class SGLangClient:
    """One server's API. Make and use it in one event loop."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str,
        silence_s: float = 120.0,
        why_ended: Callable[[], Awaitable[str]] | None = None,
    ) -> None:
        """`silence_s`: longest time without a new token of a response, or without an answer.
        `why_ended`: why a server of this process has ended, for the messages of faults.
        """
        self.url, self._silence_s, self._why_ended = url, silence_s, why_ended
        self._sleeping = False  # it sends no tokens meanwhile
        self._limits: set[asyncio.Timeout] = set()  # of the responses that are being streamed
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=silence_s)
        # Each request has a connection of its own: a busy server may close an idle one while the
        # next request is sent on it.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector)

    async def close(self) -> None:
        await self._session.close()

    async def healthy(self) -> bool:
        """Whether the server answers now."""
        timeout = aiohttp.ClientTimeout(total=HEALTH_S)
        try:
            async with self._session.get(f"{self.url}/health", timeout=timeout) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def wait_until_healthy(self, *, timeout_s: float) -> None:
        """Raises EngineFault when the server does not answer in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while not await self.healthy():
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            raise EngineFault(
                f"{self.url} did not answer within {timeout_s:g} s; start a server there"
            ) from error

    async def weight_version(self) -> str:
        """The name of the weights that the server serves now."""
        info = await self._ask("GET", "/model_info")
        return str(info["weight_version"])

    async def load(self) -> ServerLoad:
        """What the server does now; it counts at each prefill and every 15 decode steps."""
        answer = await self._ask("GET", "/v1/loads?include=core")
        try:
            loads = [
                ServerLoad(
                    running=int(rank["num_running_reqs"]),
                    queued=int(rank["num_waiting_reqs"]),
                    used_tokens=int(rank["num_used_tokens"]),
                    capacity_tokens=int(rank["max_total_num_tokens"]),
                )
                for rank in answer["loads"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise EngineFault(f"{self.url} sent a malformed load: {error!r}") from error
        return sum(loads, start=ServerLoad())

    async def limits(self) -> ServerLimits:
        """What the server has room for, and how it computes."""
        answer = await self._ask("GET", "/server_info")
        try:
            (state, *_), tokens = answer["internal_states"], int(answer["max_total_num_tokens"])
            running = int(state["effective_max_running_requests_per_dp"])
            exact = (
                bool(answer.get("enable_fp32_lm_head", True)) or answer.get("dtype") == "float32"
            )
            return ServerLimits(tokens, running, exact)
        except (KeyError, TypeError, ValueError) as error:
            raise EngineFault(f"{self.url} does not tell its capacity: {error!r}") from error

    async def hashes(self) -> ServerHashes | None:
        """Of the weights that the server holds; None: it can't compute them.

        SGLang 0.5.21 computes them on a CPU only with the stand-in of `cluster/sglang_cpu`.
        """
        try:
            answer = await self._ask_checked("weights_checker", {"action": "checksum"})
            ranks = sorted(
                answer["ranks"], key=lambda each: int(each["parallelism_info"][0]["tp_rank"])
            )
            tensors = tuple(dict(each["checksums"]) for each in ranks)
            return ServerHashes(str(answer["per_engine_checksum"]), tensors)
        except CallRefused:
            return None
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise EngineFault(f"{self.url} sent malformed checksums: {error!r}") from error

    async def stream(self, body: Mapping[str, Any]) -> AsyncIterator[Chunk]:
        """One response, in chunks.

        Raises ValueError for a request that the server refuses as wrong, else EngineFault.
        """
        self._check_open()
        url, body = f"{self.url}/generate", {**body, "stream": True, "return_logprob": True}
        no_limit = aiohttp.ClientTimeout(total=None, sock_connect=10.0)  # `_silence_limit` has it
        try:
            async with (
                self._silence_limit() as limit,
                self._session.post(url, json=body, timeout=no_limit) as answer,
            ):
                if answer.status != 200:
                    text = _one_line(await answer.text())
                    if _refuses(answer.status, text):
                        raise ValueError(f"{self.url} refuses the request: {text}")
                    raise EngineFault(f"{self.url} answers /generate with {answer.status}: {text}")
                async for event in _events(answer.content):
                    self._wait_anew(limit)
                    yield self._chunk(event)
        except TimeoutError as error:  # before ClientError: aiohttp's timeouts are both
            raise EngineFault(
                f"{self.url} sent no token for {self._silence_s:g} s (deadlines.answer_s)"
            ) from error
        except aiohttp.ClientError as error:
            raise await self._disconnected(f"broke off /generate: {error!r}") from error
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise EngineFault(f"{self.url} sent a malformed event: {error!r}") from error

    @asynccontextmanager
    async def _silence_limit(self) -> AsyncIterator[asyncio.Timeout]:
        """Raises TimeoutError in the body when nothing has come for `silence_s`; there is no limit
        while the server sleeps."""
        async with asyncio.timeout(None) as limit:
            self._limits.add(limit)
            self._wait_anew(limit)
            try:
                yield limit
            finally:
                self._limits.discard(limit)

    def _wait_anew(self, limit: asyncio.Timeout) -> None:
        now_s = asyncio.get_running_loop().time()
        limit.reschedule(None if self._sleeping else now_s + self._silence_s)

    def _chunk(self, event: Mapping[str, Any]) -> Chunk:
        if "error" in event:
            text = _one_line(str(event["error"]["message"]))
            if _refuses(event["error"]["code"], text):
                raise ValueError(f"{self.url} refuses the request: {text}")
            raise EngineFault(f"{self.url} failed while it generated: {text}")
        meta, token_ids = event["meta_info"], list(event["output_ids"])
        entries = meta.get("output_token_logprobs") or []
        logprobs = [entry[0] for entry in entries]
        finite = all(isinstance(each, float) and math.isfinite(each) for each in logprobs)
        if not finite or [entry[1] for entry in entries] != token_ids:
            raise EngineFault(
                f"{self.url} gave {len(token_ids)} tokens without a finite logprob for each"
            )
        return Chunk(
            token_ids,
            logprobs,
            meta["finish_reason"],
            meta.get("weight_versions") or (),
            str(meta["weight_version"]),
            int(meta.get("cached_tokens") or 0),
            int(meta.get("num_retractions") or 0),
            self._experts(meta.get("routed_experts")),
        )

    def _experts(self, encoded: object) -> bytes | None:
        if encoded is None:
            return None
        try:
            return base64.b64decode(str(encoded), validate=True)
        except binascii.Error as error:
            raise EngineFault(f"{self.url} sent malformed experts: {error}") from error

    async def prompt_logprobs(self, token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """log-softmax(logits) of each token after the first, `[P] → [P - 1]`.

        By a fresh forward pass that uses no cache.
        """
        body = {
            "input_ids": token_ids.tolist(),
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = await self._ask("POST", "/generate", body)
        entries = answer["meta_info"]["input_token_logprobs"][1:]
        values = [math.nan if entry[0] is None else entry[0] for entry in entries]
        return np.asarray(values, dtype=np.float32)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Ends these requests. Unknown ids are ignored."""
        await asyncio.gather(
            *(self._ask("POST", "/abort_request", {"rid": each}, text=True) for each in request_ids)
        )

    async def pause(self, mode: str) -> None:
        """Pauses generation until `resume`.

        Mode `in_place` keeps the KV of running requests, `retract` drops it.
        """
        await self._ask("POST", "/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        await self._ask("POST", "/continue_generation", {})

    async def release_memory(self) -> None:
        """The paused server gives its KV memory and its weights back to the device.

        Its prefix cache is empty then. It needs --enable-memory-saver; without it, as on a CPU, the
        server only empties its cache. Until `resume_memory` its responses are not missed.
        """
        self._sleep(True)
        await self._ask("POST", "/release_memory_occupation", {}, text=True)

    async def resume_memory(self) -> None:
        """The server has its memory again; the weights that it had, if it was started with
        --enable-weights-cpu-backup."""
        await self._ask("POST", "/resume_memory_occupation", {}, text=True)
        self._sleep(False)

    def _sleep(self, on: bool) -> None:
        self._sleeping = on
        for limit in self._limits:
            self._wait_anew(limit)

    async def update_from_disk(self, folder: str, *, weight_version: str, flush: bool) -> None:
        """Loads the weights in `folder` (safetensors)."""
        body = {"model_path": folder, "weight_version": weight_version, "flush_cache": flush}
        await self._ask_checked("update_weights_from_disk", body)

    async def join_group(
        self, address: tuple[str, int], *, name: str, first_rank: int, world_size: int, backend: str
    ) -> None:
        """Joins the weight group; returns when every member has joined.

        Raises CallRefused when the group was not formed; the server is in no group then.

        The server's tensor-parallel ranks get the ranks from `first_rank` on.
        """
        host, port = address
        body = {
            "master_address": host,
            "master_port": port,
            "rank_offset": first_rank,
            "world_size": world_size,
            "group_name": name,
            "backend": backend,
        }
        await self._ask_checked("init_weights_update_group", body)

    async def clear(self, groups: Sequence[str]) -> None:
        """Removes what an interrupted run may have left: a pause, a begun update, its groups."""
        await self.resume()
        with contextlib.suppress(CallRefused):  # no update was begun
            await self._ask("POST", "/end_weight_update", {})
        for group in groups:
            await self.leave_group(group)

    async def leave_group(self, name: str) -> None:
        """Leaves the weight group. A server that is not in it refuses; that is no fault."""
        with contextlib.suppress(CallRefused):
            await self._ask("POST", "/destroy_weights_update_group", {"group_name": name})

    async def receive(
        self,
        buckets: Sequence[tuple[str, Sequence[TensorHeader]]],
        *,
        weight_version: str,
        flush: bool,
    ) -> None:
        """Takes part in the broadcast of these buckets, each sent as bytes in the named group.

        After the last one the server serves `weight_version`. Raises BroadcastLost, with the update
        ended, so that the server can read the weights from disk.
        """
        await self._ask_checked("begin_weight_update", {})
        for number, (group, headers) in enumerate(buckets, start=1):
            last = number == len(buckets)
            names, dtypes, shapes = zip(*headers, strict=True)
            body = {
                "names": names,
                "dtypes": dtypes,
                "shapes": shapes,
                "group_name": group,
                "load_format": "flattened_bucket",
                "flush_cache": flush and last,
                "weight_version": weight_version if last else None,
            }
            try:
                await self._ask_checked("update_weights_from_distributed", body)
            except CallRefused as refusal:
                if RECEIVE_FAILED not in str(refusal):
                    raise
                await self._ask_checked("end_weight_update", {})
                raise BroadcastLost(str(refusal)) from None
        await self._ask_checked("end_weight_update", {})

    def _check_open(self) -> None:
        if self._session.closed:
            raise EngineFault(f"{self.url} is not connected any more")

    async def _ask_checked(self, call: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """A POST whose answer says whether the call succeeded."""
        answer = await self._ask("POST", f"/{call}", body)
        if not answer.get("success"):
            message = _one_line(str(answer.get("message")))
            fault = CallRefused if _refuses(400, message) else EngineFault
            raise fault(f"{self.url} failed in {call}: {message}")
        return answer

    async def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, text: bool = False
    ) -> dict[str, Any]:
        self._check_open()
        try:
            async with self._session.request(method, f"{self.url}{path}", json=body) as answer:
                content = await answer.text()
                if answer.status != 200:
                    why = _one_line(content)
                    fault = CallRefused if _refuses(answer.status, why) else EngineFault
                    raise fault(f"{self.url} answers {path} with {answer.status}: {why}")
                return {} if text else dict(json.loads(content))
        except TimeoutError as error:  # before ClientError: aiohttp's timeouts are both
            raise EngineFault(
                f"{self.url} did not answer {path} within {self._silence_s:g} s "
                "(deadlines.answer_s)"
            ) from error
        except aiohttp.ClientError as error:
            raise await self._disconnected(f"failed to answer {path}: {error!r}") from error
        except json.JSONDecodeError as error:
            raise EngineFault(f"{self.url} failed to answer {path}: {error!r}") from error

    async def _disconnected(self, what: str) -> EngineFault:
        """A fault of the connection, with the reason where the server has ended."""
        why = await self._why_ended() if self._why_ended is not None else ""
        return EngineFault(f"{self.url} {what}{why}")


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each event. Raises ClientPayloadError when the stream ends without DONE."""
    waiting = b""
    async for part in content.iter_any():
        *events, waiting = (waiting + part).split(EVENT)
        for event in events:
            data = event.removeprefix(b"data: ").strip()
            if data == DONE:
                return
            yield json.loads(data)
    raise aiohttp.ClientPayloadError("the stream of a response ended before the response did")


def _refuses(status: int, text: str) -> bool:
    """Whether the server works and finds the request wrong."""
    return status == 400 and not BROKEN.search(text)


def _one_line(text: str, *, most: int = 300) -> str:
    return " ".join(text.split())[:most]
