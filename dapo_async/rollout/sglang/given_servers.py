"""Running servers that the user names: what their answer says before a run is started.

`runtime/preflight.py` asks each server once. A server that does not answer may still be starting:
the rollout workers wait for it.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException

from dapo_async.rollout.sglang import SERVER_KEY

ASK_S = 3.0
UNKNOWN_HOST = ("name or service not known", "nodename nor servname", "no address associated")


def server_fault(url: str, *, api_key: str, architectures: Sequence[str]) -> str | None:
    """One line with the remedy for an answer that time does not change; else None.

    `architectures`: of the config.json of the model that the run trains; empty: not compared.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(f"{url}/model_info", headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # aiohttp uses none
    told = f"rollout.servers: {url}"
    try:
        with opener.open(request, timeout=ASK_S) as answer:
            info = json.load(answer)
        served = list(info.get("architectures") or ())
        if "weight_version" not in info:
            raise ValueError("no answer of SGLang")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return (
                f"{told} refuses the API key ({error.code}); set {SERVER_KEY} to the key that the "
                "server was started with"
            )
        if error.code == 404:
            return f"{told} is no SGLang server of version 0.5.21 (404); correct the URL"
        return None
    except (ValueError, AttributeError, TypeError):
        return f"{told} gives no answer of SGLang 0.5.21; correct the URL"
    except (OSError, HTTPException) as error:
        if any(known in str(error).lower() for known in UNKNOWN_HOST):
            return f"{told} has an unknown host name; correct the URL"
        return None
    if architectures and served and set(served).isdisjoint(architectures):
        return (
            f"{told} serves {', '.join(served)}, and the run trains {', '.join(architectures)}; "
            "start the server with --model-path of the same model"
        )
    return None
