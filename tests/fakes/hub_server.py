"""A server with the answers of the Hugging Face hub, for tests of downloads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "a" * 40
# Names of repositories with what the hub answers for them: status and headers.
REFUSALS = {
    "gated": (403, {"X-Error-Code": "GatedRepo"}),
    "unknown": (401, {"X-Error-Code": "RepoNotFound"}),
    "removed": (404, {"X-Error-Code": "RepoNotFound"}),
    "revision": (404, {"X-Error-Code": "RevisionNotFound"}),
    "disabled": (403, {"X-Error-Message": "Access to this resource is disabled."}),
    "token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "forbidden": (403, {"X-Error-Message": "Forbidden"}),
    "nowhere": (404, {}),
    "busy": (429, {}),
    "broken": (501, {}),  # unlike 500 to 504 the library does not try it again
}


@contextmanager
def hub_server(files: Mapping[str, bytes]) -> Iterator[str]:
    """A hub whose repository `me/here` has these files; its URL."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, content = _answer(self.path, files)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            """Prints nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def _answer(path: str, files: Mapping[str, bytes]) -> tuple[int, Mapping[str, str], bytes]:
    for name, (status, headers) in REFUSALS.items():
        if f"/me/{name}" in path:
            return status, headers, b""
    if "/me/here/resolve/" in path:
        name = path.split("/resolve/")[1].partition("/")[2]
        etag = f'"{sha1(name.encode()).hexdigest()}"'
        return 200, {"ETag": etag, "X-Repo-Commit": COMMIT}, files[name]
    values: object = {"id": "me/here", "sha": COMMIT, "tags": [], "private": False}
    if "/tree/" in path:
        values = [
            {"type": "file", "path": name, "size": len(content), "oid": "1" * 40}
            for name, content in files.items()
        ]
    return 200, {"Content-Type": "application/json"}, json.dumps(values).encode()
