"""What the page asks of the server: its models, and streamed answers, over the OpenAI API with the user's own key.

Going through HTTP and not through a Serve handle, a request of the page meets the same key check, limits and log as
any other client's.
"""

import json
import math
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

# A busy engine may queue a request for long; a server that is gone refuses the connection at once.
_READ_TIMEOUT_S = 600.0
_CONNECT_TIMEOUT_S = 10.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class RequestFailed(Exception):
    """A request that got no answer, or not the whole of one. str: what to tell the user.

    status: HTTP status, or None where there was none.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message, status)
        self.message, self.status = message, status

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer."""

    text: str = ""
    reasoning: str = ""


class ServerClient:
    """Requests to one server; the key is an argument of each request and is kept nowhere.

    base_url: `http://HOST:PORT`, without /v1. A certificate is not checked on loopback: it is made for another name.
    """

    def __init__(self, base_url: str) -> None:
        import httpx

        self._url = base_url.rstrip("/")
        verify: bool | ssl.SSLContext = httpx.URL(self._url).host not in _LOOPBACK
        timeout = httpx.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        self._http = httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False, verify=verify)

    async def close(self) -> None:
        await self._http.aclose()

    async def models(self, key: str) -> list[str]:
        """Names of models and adapters. Raises RequestFailed."""
        async with self._answered("GET", "/v1/models", key) as response:
            body = json.loads(await response.aread())
            return [str(card["id"]) for card in body.get("data", [])]

    async def answer(
        self, messages: Sequence[Mapping[str, str]], *, model: str, key: str, options: Mapping[str, Any]
    ) -> AsyncGenerator[Delta, None]:
        """The pieces of a streamed answer. Closing the iterator closes the connection, and the server aborts.

        options: further fields of the request, such as `temperature`. Raises RequestFailed.
        """
        body = {"model": model, "messages": list(messages), "stream": True, **options}
        async with self._answered("POST", "/v1/chat/completions", key, json=body) as response:
            async for line in _lines(response.aiter_bytes()):
                data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
                if data == b"[DONE]":
                    return
                if data:
                    yield _delta(json.loads(data))
        raise RequestFailed("The connection to the server broke off; the answer is not complete.")

    @asynccontextmanager
    async def _answered(self, method: str, path: str, key: str, **options: Any) -> AsyncIterator[Any]:
        """A response with status 200. Everything else is a RequestFailed."""
        import httpx

        if not (key.isascii() and key.isprintable()):
            raise RequestFailed("The API key holds a character that no key has. Enter it again in the settings.")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        try:
            async with self._http.stream(method, self._url + path, headers=headers, **options) as response:
                if response.status_code != 200:
                    body = (await response.aread()).decode(errors="replace")
                    raise RequestFailed(explain(response.status_code, body, response.headers), response.status_code)
                yield response
        except httpx.ConnectError:
            raise RequestFailed("The server does not answer. It may be starting; try again in a moment.") from None
        except httpx.TimeoutException:
            raise RequestFailed("The server took too long to answer. Try again, or a shorter conversation.") from None
        except (httpx.HTTPError, json.JSONDecodeError):
            raise RequestFailed("The connection to the server broke off; the answer is not complete.") from None


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Lines as event streams end them: httpx's `aiter_lines` cuts at U+2028 and the like too, which JSON may hold."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest


def explain(status: int, body: str, headers: Mapping[str, str]) -> str:
    """An error of the server in the words of this page, with the server's own reason where it is one for users."""
    reason = _reason(body)
    if status == 401:
        return "The server asks for a valid API key. Enter it in the settings."
    if status == 403:
        return f"The server does not allow this: {reason}"
    if status == 404:
        return f"The server does not serve this: {reason} Refresh the list of models and choose one."
    if status == 413:
        return "The conversation is longer than the server takes. Start a new one."
    if status == 429:
        wait = headers.get("retry-after", "")
        when = f"in {math.ceil(float(wait))} s" if wait.replace(".", "", 1).isdigit() else "in a moment"
        return f"The server is busy, or the limit of this key is reached. Try again {when}."
    if status < 500:
        return f"The server refused the request: {reason}"
    return f"The server failed (status {status}). Try again; if it stays so, look into its log."


def _reason(body: str) -> str:
    """The message of an OpenAI error, else the body's first line."""
    try:
        error = json.loads(body).get("error")
        text = error["message"] if isinstance(error, Mapping) else str(error or body)
    except (ValueError, AttributeError, KeyError):
        text = body
    line = " ".join(str(text).split())[:500] or "no reason given"
    return line if line.endswith((".", "!", "?")) else f"{line}."


def _delta(chunk: Mapping[str, Any]) -> Delta:
    """The first choice of a chunk; an error in the stream, which vLLM sends with status 200, is raised."""
    if "error" in chunk:
        code = chunk["error"].get("code") if isinstance(chunk["error"], Mapping) else None
        status = code if isinstance(code, int) else 500
        raise RequestFailed(explain(status, json.dumps(chunk), {}), status)
    choices: list[dict[str, Any]] = chunk.get("choices") or [{}]  # a chunk that only counts tokens has none
    delta = choices[0].get("delta") or {}
    return Delta(delta.get("content") or "", delta.get("reasoning") or delta.get("reasoning_content") or "")
