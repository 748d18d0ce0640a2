"""One replica: vLLM's AsyncLLM, and vLLM's own ASGI app, in one process.

A request goes from the proxy into vLLM's routes without another hop, so every route, parser and error is vLLM's.
The class knows nothing of Serve but the hook `__serve_build_asgi_app__`, which Ray Serve 2.60 calls after the
constructor (`serve.ingress` documents it); app.py deploys it.
"""

import asyncio
import os
import re
import types
from argparse import Namespace
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn

import psutil

from raylm.config.serving import ServeArgs
from raylm.errors import ServingError
from raylm.models.folder import as_folder
from raylm.serving.access_log import stop_writing, write_beside_the_replica_log
from raylm.serving.adapter_routes import close_vllm_adapter_routes, serve_adapters
from raylm.serving.api_key import KEY_VARIABLE, ONLY_KEY, ApiKey, digest
from raylm.serving.asked_name import answer_as_asked, each_request_anew
from raylm.serving.deathwatch import deathwatch
from raylm.serving.engine_args import command_line, model_name
from raylm.serving.guard import GuardSettings, guarded
from raylm.serving.lost_engine import LostEngine
from raylm.serving.metrics import OneMetricsPage, Phases, ServePage, own_metrics, replica_id
from raylm.serving.model_counts import ModelCounts
from raylm.serving.request_checks import check_requests
from raylm.serving.unserved import refuse_what_the_model_cannot
from raylm.serving.usage import Metered, watch

_ENGINE_ERROR = re.compile(r"^\((?:EngineCore|Worker)[^)]*\) ERROR [^\]]*\] ([\w.]*(?:Error|Exception)\b.*)$", re.M)

_OPERATORS = ("/scale_elastic_ep", "/is_scaling_elastic_ep")


class Replica:
    """Holds the engine for the life of a Serve replica.

    guard: what stands before vLLM's routes; None where a gateway has it.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: ServeArgs, guard: GuardSettings | None
    ) -> None:
        """Starts the engine. Raises ServingError with vLLM's reason when it does not start."""
        node_key = os.environ.pop(KEY_VARIABLE, None)  # vLLM would guard /v1 with it; the guard guards all
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_gib
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        self._guard = guard.or_key(ApiKey(ONLY_KEY, digest(node_key))) if guard and node_key else guard
        self._exit_stack = AsyncExitStack()
        die_with_us = self._exit_stack.enter_context(deathwatch())  # left last: by then the engine has ended
        self._args, self._phases = args, Phases()
        with self._phases.timed("import"):
            from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client

            self._namespace = _parse(args, as_folder(args.model))
        try:
            with self._phases.timed("engine"):
                client = build_async_engine_client(self._namespace)
                others = set(psutil.Process().children(recursive=True))
                self._engine = await self._exit_stack.enter_async_context(client)
                die_with_us(set(psutil.Process().children(recursive=True)) - others)
            with self._phases.timed("first answer"):
                await self._answer_once()
        except Exception as error:
            # vLLM raises whatever its layers raise; the reason may stand in the log of the engine's own process.
            raise ServingError(args.model, f"the engine did not start: {_reason(error)}") from error

    async def __serve_build_asgi_app__(self) -> Any:
        """vLLM's FastAPI app with our guard around it; the engine ends when the app's lifespan does."""
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        with self._phases.timed("routes"):
            tasks = await self._engine.get_supported_tasks()
            close_vllm_adapter_routes(self._args)
            app = build_app(self._namespace, tasks, self._engine.model_config)
            close_operators_routes(app)
            await init_app_state(self._engine, app.state, self._namespace, tasks)
            await serve_adapters(app, self._engine, self._args, self._exit_stack)
        refuse_what_the_model_cannot(app, model_name(self._args))
        check_requests(app, self._guard.limits if self._guard is not None else None)
        if len(self._namespace.served_model_name) > 1:
            answer_as_asked(app.state.openai_serving_models)
        watch(self._engine)
        app.state.server = types.SimpleNamespace()  # vLLM's error handler tells its uvicorn server to stop through it
        # `add_middleware` comes too late: vLLM's build_app has assembled the stack already.
        stack: Any = app.middleware_stack or app.build_middleware_stack()
        own = own_metrics(model_name(self._args), self._args.model, self._phases.seconds)
        counts = ModelCounts(model_name(self._args))
        page = OneMetricsPage(each_request_anew(stack), replica_id(), lambda: own + counts.page(), ServePage())
        metered = Metered(page, self._engine, along=self._guard is None, counts=counts)
        app.middleware_stack = lost = LostEngine(metered, self._engine, hands_over=self._guard is None)
        if self._guard is not None:
            if self._guard.access_log:
                write_beside_the_replica_log()
                self._exit_stack.callback(stop_writing)
            app.middleware_stack = guarded(app.middleware_stack, self._guard, echo_request_id=False)
        vllm_lifespan = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(app: Any) -> Any:
            async with self._exit_stack, vllm_lifespan(app) as state:
                yield state

        app.router.lifespan_context = lifespan
        ending = asyncio.create_task(lost.end_with_engine())
        self._exit_stack.callback(ending.cancel)  # before the engine ends as it should
        return app

    async def _answer_once(self) -> None:
        """One token before any client asks: what fails only in a forward pass fails here."""
        from vllm import SamplingParams

        if "generate" in await self._engine.get_supported_tasks():
            prompt = {"prompt_token_ids": [0]}
            async for _ in self._engine.generate(prompt, SamplingParams(max_tokens=1), request_id="raylm-start"):
                pass

    async def check_health(self) -> None:
        """Raises when the engine is dead: Serve then replaces the replica."""
        await self._engine.check_health()


def close_operators_routes(app: Any) -> None:
    """Takes vLLM's routes away that change the engine's processes: here that is Ray Serve's to do, not a client's."""
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") not in _OPERATORS]


def _parse(args: ServeArgs, folder: str) -> Namespace:
    """vLLM's namespace for our arguments. Raises ServingError where vLLM's parser refuses one."""
    import torch
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from raylm.models.processor import has_native_bf16

    parser = make_arg_parser(FlexibleArgumentParser())

    def refuse(message: str) -> NoReturn:
        raise ServingError("engine", message, "`engine` takes vLLM's own argument names.")

    parser.error = refuse
    native_bf16 = has_native_bf16(torch.device("cpu"))
    words = command_line(args, folder, on_cpu=current_platform.is_cpu(), native_bf16=native_bf16)
    namespace = parser.parse_args(words)
    try:
        validate_parsed_serve_args(namespace)
    except (TypeError, ValueError, KeyError) as error:
        refuse(str(error))
    return namespace


def _reason(error: Exception) -> str:
    """The first error that the engine's processes logged, else the exception itself, in one line."""
    log = Path(os.readlink("/proc/self/fd/1")) if Path("/proc/self/fd/1").exists() else Path()
    text = log.read_text(errors="replace") if log.is_file() else ""
    logged = _ENGINE_ERROR.search(text)
    return logged[1].strip() if logged else " ".join(str(error).split()) or repr(error)
