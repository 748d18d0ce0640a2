"""The gateway: the deployment that clients reach where a request must be told apart or spread before an engine.

It reads the body once, finds `model`, and passes the request on by a Serve handle (relay.py); the answer is the
engine's own. The price is a hop through a second process, so a single model without routing goes without (app.py).
"""

import asyncio
import json
import logging
import os
import re
import time
from collections.abc import Coroutine, Mapping
from contextvars import Context
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware

from raylm.config.limits import LimitsSection
from raylm.serving.access_log import stop_writing, write_beside_the_replica_log
from raylm.serving.amount import excess
from raylm.serving.api_key import KEY_VARIABLE, ONLY_KEY, ApiKey, digest
from raylm.serving.asgi import App, Message, Receive, Send, is_preflight
from raylm.serving.exposition import merged
from raylm.serving.guard import GuardSettings, guarded
from raylm.serving.relay import copied, relay, request_of
from raylm.serving.routing import conversation_key
from raylm.words import listed

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_SHORT_S = 10.0
_LIST_S = 1.0
_USAGE_S = 5.0
_UP = ("HEALTHY", "UNHEALTHY", "UPSCALING", "DOWNSCALING")
_KEPT = {"GET": re.compile(r"/v1/responses/[^/]+"), "POST": re.compile(r"/v1/responses/[^/]+/cancel")}
_FORM_MODEL = re.compile(rb'name="model"\r\n\r\n(.*?)\r\n')


@dataclass(frozen=True, slots=True)
class Route:
    """One model as the gateway knows it."""

    deployment: str
    names: tuple[str, ...]
    """What clients send, the name proper first."""
    by_prefix: bool
    """Whether calls carry the key of their conversation."""
    may_sleep: bool
    """Whether no replica at all is no fault."""
    several: bool = False
    """Whether another replica may answer what one has lost."""


class Gateway:
    """Holds the handles of the engines for the life of a Serve replica.

    guard: what every request passes first. Its limits hold over all engines: there is one gateway. cors: see
    `GatewayApp`.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, routes: list[Route], engines: Mapping[str, Any], guard: GuardSettings, cors: Mapping[str, Any]
    ) -> None:
        """Returns when every engine answers: until then an older gateway, if there is one, keeps the door."""
        node_key = os.environ.get(KEY_VARIABLE)
        self._guard = guard.or_key(ApiKey(ONLY_KEY, digest(node_key))) if node_key else guard
        self._routes, self._engines, self._cors = routes, engines, cors
        while waiting := await asyncio.to_thread(_not_up, [route.deployment for route in routes]):
            logger.debug("waiting for %s", ", ".join(waiting))
            await asyncio.sleep(_POLL_S)

    async def __serve_build_asgi_app__(self) -> App:
        """The gateway's app with the guard around it."""
        engines = [(route, self._engines[route.deployment]) for route in self._routes]
        app: App = GatewayApp(engines, self._guard.limits, self._cors)
        if self._guard.access_log:
            write_beside_the_replica_log()
        return guarded(app, self._guard, echo_request_id=False)


def _not_up(deployments: list[str]) -> list[str]:
    """Those whose replicas of the newest version have not all answered yet. Blocks for a call to Serve's controller."""
    from ray import serve

    application = serve.get_replica_context().app_name
    known = serve.status().applications[application].deployments
    return [name for name in deployments if name not in known or known[name].status not in _UP]


class GatewayApp:
    """The ASGI app: which engine a request is for, and the routes that concern all of them.

    engines: routes with the handle of their deployment. limits: what one request may ask of them. cors: arguments of
    Starlette's CORSMiddleware, for preflights only: to all else the engines answer with their own headers.
    """

    def __init__(
        self, engines: list[tuple[Route, Any]], limits: LimitsSection, cors: Mapping[str, Any] | None = None
    ) -> None:
        self._all, self._limits = engines, limits
        self._by_name = {name: engine for engine in engines for name in engine[0].names}
        self._cards: dict[Route, list[Any]] = {}
        self._listed = -_LIST_S
        self._listing: asyncio.Task[int] | None = None
        self._cors = CORSMiddleware(self, **cors or {})

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "websocket":
            await receive()  # websocket.connect; closing before accepting is answered with 403
            await send({"type": "websocket.close", "code": 1008})
        else:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            scope = copied(scope, path=path, raw_path=path.encode())
            sender = _Sender(send)
            if is_preflight(scope):  # comes without a key, so it learns of no model and reaches no engine
                await self._cors.preflight_response(Headers(scope=scope))(scope, receive, sender)
                return
            of_all = _OF_ALL.get((scope["method"], path))
            if of_all is not None:  # whatever body comes with these is never held: health is open to all
                await _while_connected(of_all(self, scope, sender), receive, sender)
                return
            if scope["method"] in _KEPT and _KEPT[scope["method"]].fullmatch(path):
                await _while_connected(self._kept(scope, sender), receive, sender)
                return
            body = await _whole_body(receive)
            if body is not None:
                await _while_connected(self._answer(scope, body, sender), receive, sender)

    async def _answer(self, scope: Message, body: bytes, send: Send) -> None:
        content = _content(body)
        if found := excess(content, self._limits):
            parameter, message = found
            await _respond(send, 400, _error(message, "BadRequestError", parameter, 400))
            return
        named = content.get("model") if isinstance(content, Mapping) else _form_model(scope, body)
        name = named or _query_model(scope)
        engine = self._engine(name) or await self._lister(name, scope)
        if engine is not None:
            await self._pass_on(engine, scope, body, content, send)
        elif name is None or name == "":
            await self._without_name(scope, body, content, send)
        else:
            message = f"The model `{name}` does not exist. It is one of {listed(self._names())}."
            await _respond(send, 404, _error(message, "NotFoundError", "model", 404))

    def _names(self) -> list[str]:
        """What clients may ask for, as far as it is known: adapters are, once their engine was asked for its list."""
        cards = {route: [card["id"] for card in self._cards.get(route, [])] for route, _ in self._all}
        return list(dict.fromkeys(name for route, _ in self._all for name in (*route.names, *cards[route])))

    def _engine(self, name: Any) -> tuple[Route, Any] | None:
        """The engine that a name leads to. An adapter is `model:adapter`; a lone engine knows what else it has."""
        if not isinstance(name, str) or not name:
            return None
        exact = self._by_name.get(name)
        if exact is not None:
            return exact
        bases = [known for known in self._by_name if name.startswith(f"{known}:")]  # a name may have colons itself
        if bases:
            return self._by_name[max(bases, key=len)]
        return self._all[0] if len(self._all) == 1 else None

    async def _lister(self, name: Any, scope: Message) -> tuple[Route, Any] | None:
        """The engine that lists the name without having been configured with it: the bare name of an adapter.

        The lists are asked for once a second at most, however many unknown names come; who comes meanwhile waits for
        the same answer.
        """
        if not isinstance(name, str) or not name:
            return None
        if self._listing is not None or time.monotonic() - self._listed >= _LIST_S:
            if self._listing is None:  # in a context of its own: Serve cancels what belongs to a cancelled request
                self._listing = asyncio.create_task(self._list(scope), context=Context())
                self._listing.add_done_callback(self._note_listing)
            await asyncio.shield(self._listing)
        return next((e for e in self._all if any(name in _names_of(card) for card in self._cards.get(e[0], []))), None)

    def _note_listing(self, _: asyncio.Task[int]) -> None:
        self._listing, self._listed = None, time.monotonic()

    async def _without_name(self, scope: Message, body: bytes, content: Any, send: Send) -> None:
        """A request that names no model: what only one engine could mean, or what each would answer alike."""
        if len(self._all) > 1 and (isinstance(content, Mapping) or _is_of_adapters(scope)):
            message = f"model is missing; it is one of {listed(self._names())}."
            await _respond(send, 400, _error(message, "BadRequestError", "model", 400))
        else:
            await self._pass_on(self._all[0], scope, body, content, send)

    async def _pass_on(self, engine: tuple[Route, Any], scope: Message, body: bytes, content: Any, send: Send) -> None:
        from ray.exceptions import RayActorError, RayError
        from ray.serve.exceptions import BackPressureError, RayServeException

        route, handle = engine
        options: dict[str, Any] = {"stream": True}
        if route.by_prefix and isinstance(content, Mapping) and (key := conversation_key(content)):
            options["session_id"] = key
        started = False

        async def send_on(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        async def ask() -> None:
            await relay(handle.options(**options), request_of(scope, body), send_on)

        try:
            try:
                await ask()
            except RayActorError:
                if started or not route.several:
                    raise
                logger.warning("a replica of %s was lost; another one is asked", route.deployment)
                await ask()
        except BackPressureError:
            await _respond(
                send, 429, _error("Too many requests are waiting.", "TooManyRequests", None, 429), retry=True
            )
        except (RayError, RayServeException) as error:
            logger.warning("a request to %s failed: %s", route.deployment, type(error).__name__)
            if started:
                raise  # the status is out already: the connection breaks off
            await _respond(send, 503, _error("The engine was lost.", "ServiceUnavailable", None, 503), retry=True)

    async def _kept(self, scope: Message, send: Send) -> None:
        """A response that was made before: the replica that made it keeps it, and only that knows it."""
        found = await self._ask_all(copied(scope, query_string=b""))
        answers = [(engine, answer) for engine, given in zip(self._all, found, strict=True) for answer in given]
        owner = next(((engine, answer) for engine, answer in answers if answer[0] < 500 and answer[0] != 404), None)
        if owner is not None and scope["method"] == "GET" and _asks_for_stream(scope):
            await self._pass_on(owner[0], scope, b"", None, send)
        elif owner is not None:
            await _respond(send, *owner[1])
        elif any(status >= 500 and status != 501 for _, (status, _) in answers):  # 501: makes no responses at all
            await _respond(send, 503, _error("An engine does not answer.", "ServiceUnavailable", None, 503), retry=True)
        else:
            name = scope["path"].split("/")[3]
            message = f"Response with id '{name}' not found."
            await _respond(send, 404, _error(message, "invalid_request_error", "response_id", 404))

    async def _models(self, scope: Message, send: Send) -> None:
        """The cards of all engines as one list; one that sleeps is listed as it was, or by its names."""
        failed = await self._list(scope)
        if failed:
            await _respond(send, failed, _error("An engine does not answer.", "ServiceUnavailable", None, failed))
            return
        cards = []
        for route, _ in self._all:
            cards += self._cards.get(route) or [{"id": name, "object": "model"} for name in route.names]
        await _respond(send, 200, json.dumps({"object": "list", "data": cards}).encode())

    async def _list(self, scope: Message) -> int:
        """Asks the engines that are awake for their cards. Returns the status of one that fails, else 0."""
        request = copied(scope, method="GET", path="/v1/models", raw_path=b"/v1/models", query_string=b"", headers=[])
        failed = 0
        for found, (route, _) in zip(await self._ask_all(request), self._all, strict=True):
            status, body = next(iter(found), (0, b""))
            if status == 200:
                self._cards[route] = json.loads(body)["data"]
            failed = failed or (status if status != 200 else 0)
        return failed

    async def _health(self, scope: Message, send: Send) -> None:
        """200 when every replica of every engine is well. One that may sleep is Serve's to look after: asking it might
        keep it awake."""
        awake = [(route, handle) for route, handle in self._all if not route.may_sleep]
        request = request_of(scope, b"")
        answers = await asyncio.gather(*(_ask(handle, request) for _, handle in awake))
        well = all(found and all(status == 200 for status, _ in found) for found in answers)
        await _respond(send, 200 if well else 503, b"")

    async def _metrics(self, scope: Message, send: Send) -> None:
        """The metrics of every replica, told apart by `model` and `replica`."""
        pages = []
        for found, (route, _) in zip(await self._ask_all(scope), self._all, strict=True):
            for index, (status, body) in enumerate(found):
                if status == 200:
                    labels = {"model": route.names[0]} | ({"replica": str(index)} if len(found) > 1 else {})
                    pages.append((labels, body.decode()))
        await _respond(send, 200, merged(pages).encode(), b"text/plain; version=0.0.4; charset=utf-8")

    async def _ask_all(self, scope: Message) -> list[list[tuple[int, bytes]]]:
        """Status and body of each engine's replicas: none where there is no replica, 503 where one does not answer."""
        request = request_of(scope, b"")
        return list(await asyncio.gather(*(_ask(handle, request) for _, handle in self._all)))


_OF_ALL = {
    ("GET", "/v1/models"): GatewayApp._models,
    ("GET", "/health"): GatewayApp._health,
    ("HEAD", "/health"): GatewayApp._health,
    ("GET", "/metrics"): GatewayApp._metrics,
}


def _names_of(card: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a client may call it: an adapter, whose card names its base as `parent`, by its bare name as well."""
    return (card["id"], card.get("root")) if card.get("parent") else (card["id"],)


class _Sender:
    """Sends on; `ended` once the last of the response is out."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.ended = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.ended = True  # before it is sent: the server says that the client has gone as soon as it is
        await self._send(message)


async def _ask(handle: Any, request: dict[str, Any]) -> list[tuple[int, bytes]]:
    from ray.exceptions import RayError
    from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

    try:
        found = await handle.broadcast("answer", request).results_async(timeout_s=_SHORT_S, return_exceptions=True)
    except DeploymentUnavailableError:
        return []
    except (TimeoutError, RayError, RayServeException):
        return [(503, b"")]
    return [(503, b"") if isinstance(answer, BaseException) else answer for answer in found]


async def _while_connected(work: Coroutine[Any, Any, None], receive: Receive, sender: _Sender) -> None:
    """Awaits the work, or cancels it when the client leaves.

    After the last of a response uvicorn says at once that the client has gone; then what the request has cost is still
    to come from the engine.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and sender.ended:
            await asyncio.wait((task,), timeout=_USAGE_S)
        if task.done():
            task.result()
    finally:
        gone.cancel()
        task.cancel()
        await _ended(task, gone)


async def _ended(*tasks: asyncio.Future[Any]) -> None:
    """Waits for cancelled tasks, which end soon. Serve's Python proxy cancels a request twice: the second time hurries
    nobody, or what the request has cost would not be heard any more."""
    cancelled = False
    waiting: set[asyncio.Future[Any]] = set(tasks)
    while waiting:
        try:
            _, waiting = await asyncio.wait(waiting)
        except asyncio.CancelledError:
            cancelled = True
            waiting = {task for task in waiting if not task.done()}
    for task in tasks:
        if not task.cancelled():
            task.exception()  # is known to the caller, or nobody's any more
    if cancelled:
        raise asyncio.CancelledError


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _whole_body(receive: Receive) -> bytes | None:
    """The request's body, or None when the client has left before it was there."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _content(body: bytes) -> Any:
    """The body's JSON as vLLM's routes read it, or None: what is not JSON the engine refuses itself."""
    from pydantic_core import from_json

    if not body:
        return None
    try:
        return from_json(body)
    except ValueError:  # knows UTF-8 only, and no half characters: those are the slower reader's
        pass
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _query_model(scope: Message) -> str | None:
    """`?model=NAME`, for routes without a body, such as those of adapters."""
    found = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("model")
    return found[0] if found else None


def _asks_for_stream(scope: Message) -> bool:
    found = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("stream")
    return found is not None and found[-1].lower() not in ("", "false", "0", "no", "off", "f", "n")


def _is_of_adapters(scope: Message) -> bool:
    return f"{scope['path']}/".startswith("/v1/adapters/")


def _form_model(scope: Message, body: bytes) -> str | None:
    """`model` of a form with a file, as audio routes take it."""
    if not any(name == b"content-type" and value.startswith(b"multipart/") for name, value in scope["headers"]):
        return None
    found = _FORM_MODEL.search(body)
    return found[1].decode(errors="replace") if found else None


def _error(message: str, kind: str, param: str | None, code: int) -> bytes:
    """An error as vLLM shapes it."""
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


async def _respond(
    send: Send, status: int, body: bytes, content_type: bytes = b"application/json", *, retry: bool = False
) -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    headers += [(b"retry-after", b"1")] if retry else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _live(receive: Receive, send: Send) -> None:
    while (await receive())["type"] != "lifespan.shutdown":
        await send({"type": "lifespan.startup.complete"})
    stop_writing()
    await send({"type": "lifespan.shutdown.complete"})
