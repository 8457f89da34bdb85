"""A running server is refused before a run starts where waiting for it can't help."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tracking_world import free_port

from dapo_async.rollout.sglang.given_servers import server_fault

QWEN = {"architectures": ["Qwen2ForCausalLM"], "weight_version": "default"}


@contextmanager
def server(status: int, body: str, *, key: str = "") -> Iterator[str]:
    """Gives this answer to every request that has the key; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = not key or self.headers["Authorization"] == f"Bearer {key}"
            self.send_response(status if known and self.path == "/model_info" else 401)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()


@pytest.mark.parametrize(
    ("status", "body", "key", "remedy"),
    [
        (200, json.dumps(QWEN), "", None),
        (200, json.dumps(QWEN), "right", None),
        (200, json.dumps({**QWEN, "architectures": None}), "", None),
        (200, json.dumps(QWEN), "another", "set SGLANG_API_KEY"),
        (403, "no", "", "set SGLANG_API_KEY"),
        (404, "no", "", "correct the URL"),
        (200, "<html>", "", "correct the URL"),
        (200, "[]", "", "correct the URL"),
        (200, '{"model_path": "a"}', "", "correct the URL"),
        (200, json.dumps({**QWEN, "architectures": ["LlamaForCausalLM"]}), "", "--model-path"),
        (500, "oh", "", None),
        (503, "later", "", None),
    ],
)
def test_answer_of_a_server_decides_whether_a_run_may_wait_for_it(
    status: int, body: str, key: str, remedy: str | None
) -> None:
    with server(status, body, key=key) as url:
        line = server_fault(url, api_key="right", architectures=["Qwen2ForCausalLM"])
    if remedy is None:
        assert line is None
    else:
        assert line is not None
        assert line.startswith(f"rollout.servers: {url} ")
        assert remedy in line
        assert "\n" not in line
        assert "right" not in line


def test_server_that_does_not_answer_may_still_start_but_an_unknown_host_may_not() -> None:
    closed = f"http://127.0.0.1:{free_port()}"
    assert server_fault(closed, api_key="", architectures=[]) is None
    line = server_fault("http://no-such-host.invalid:1", api_key="", architectures=[])
    assert line is None or "unknown host name" in line  # None: no name service answers here
