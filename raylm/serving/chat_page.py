"""The chat page as a Serve application of its own: one replica, at /chat of the address that the API has.

The page talks to the API over HTTP with the key its user typed in, so it opens nothing that the API keeps closed.
"""

import importlib.util
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

from raylm.config.serving import ChatPageArgs
from raylm.errors import ServingError

PAGE_NAME = "raylm-chat"
ROUTE_PREFIX = "/chat"
# A tab holds a connection for as long as it is open.
MAX_ONGOING_REQUESTS = 100_000
_POLL_S = 0.25
_TIMEOUT_S = 5.0
_ENVIRONMENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": "1000000000",  # statistics that nobody reads, by pandas after every event
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
}


def check_gradio() -> None:
    """Raises ServingError where Gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise ServingError("chat_page", "needs Gradio, which is not installed.", "Run: pip install 'raylm[chat]'")


def build_page_app(args: ChatPageArgs) -> Any:
    """The application, for `serve.run` and as the import path of a Serve YAML. Raises ServingError without Gradio.

    One replica, because Gradio keeps the connections of a session in its process. It runs on the head node, where
    Serve's proxy listens, and asks for no CPU: it hardly uses any.
    """
    from ray import serve

    check_gradio()
    deployment = serve.deployment(
        serve.ingress()(ChatPage),
        name="chat-page",
        num_replicas=1,
        ray_actor_options={
            "num_cpus": 0,
            "resources": {"node:__internal_head__": 0.001},
            "runtime_env": {"env_vars": _ENVIRONMENT},
        },
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_constructor_retry_count=1,
        logging_config={"enable_access_log": False},
    )
    return deployment.bind(args)


class PageStart:
    """A chat page that Serve was asked to start, or none. url: of the server it stands beside."""

    def __init__(self, url: str | None) -> None:
        self._url = url

    def wait_until_ready(self, timeout_s: float) -> str | None:
        """Its address, once it answers; None where there is no page.

        Raises ServingError when Serve gives up on it, or after `timeout_s`.
        """
        if self._url is None:
            return None
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            page = _application()
            if page is not None and page.status == "DEPLOY_FAILED":
                parts = [page.message, *(deployment.message for deployment in page.deployments.values())]
                lines = [line.strip() for line in "\n".join(parts).splitlines() if line.strip()]
                raise ServingError("chat_page", f"did not start: {lines[-1] if lines else 'no reason is given.'}")
            if page is not None and page.status == "RUNNING" and _answers(f"{self._url}{ROUTE_PREFIX}/"):
                return f"{self._url}{ROUTE_PREFIX}/"  # without the slash it is answered 307
            time.sleep(_POLL_S)
        raise ServingError("chat_page", f"did not answer within {timeout_s:g} s.")


@contextmanager
def chat_page_beside(url: str, *, wanted: bool = True) -> Iterator[PageStart]:
    """Starts the page beside a server, without waiting for it, and deletes it at the end of the block.

    url: the server's, on loopback. Raises ServingError when Serve runs a page already.
    """
    from ray import serve

    if not wanted:
        yield PageStart(None)
        return
    if _application() is not None:
        problem = f"runs an application {PAGE_NAME!r} already."
        raise ServingError("cluster", problem, f"Delete it first: serve.delete({PAGE_NAME!r})")
    target = serve.RunTarget(build_page_app(ChatPageArgs(base_url=url)), name=PAGE_NAME, route_prefix=ROUTE_PREFIX)
    try:
        serve.run_many([target], wait_for_applications_running=False)
        yield PageStart(url)
    finally:
        serve.delete(PAGE_NAME)


def _application() -> Any:
    """Serve's view of the page, or None when there is none."""
    from ray import serve

    return serve.status().applications.get(PAGE_NAME)


def _answers(url: str) -> bool:
    import httpx

    try:
        return httpx.get(url, trust_env=False, verify=False, timeout=_TIMEOUT_S).status_code == 200
    except httpx.HTTPError:
        return False


class ChatPage:
    """Holds Gradio's app for the life of a Serve replica."""

    def __init__(self, args: ChatPageArgs) -> None:
        self._args = args

    async def __serve_build_asgi_app__(self) -> Any:
        """Gradio's app behind the guard; Serve calls this after the constructor."""
        return build_page(self._args)


def build_page(args: ChatPageArgs) -> Any:
    """The page as an ASGI app, whatever serves it."""
    from fastapi import FastAPI

    from raylm.serving.page.client import ServerClient
    from raylm.serving.page.guard import PageGuard
    from raylm.serving.page.layout import mount, script

    @asynccontextmanager
    async def lifespan(_: Any) -> Any:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(client.close)
            yield

    client = ServerClient(args.base_url)
    app = FastAPI(lifespan=lifespan, openapi_url=None)
    mount(app, client, args.title)
    app.add_middleware(PageGuard, script=script())
    return app
