"""Adapters inside vLLM's app: which one a request means, the list of models, and the routes that manage them.

All of vLLM's routes share one `OpenAIServingModels`. They ask it three times about a request: is `model` known, if not
`resolve_lora`, then `lora_requests[model]`. vLLM's resolver plugins answer the second once and for all under the name
that was asked, without a version and without a reason for a refusal, so this module answers all three. The version
that was resolved travels with the request in a context variable: a request has one version from its check to its end,
whatever is loaded meanwhile. It counts only in the task that resolved it: the server may start the next request of a
connection in a copy of that context.
"""

import asyncio
import os
import tempfile
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from raylm.config.serving import ServeArgs
from raylm.errors import ModelError, RaylmError, ServingError
from raylm.models.adapter_files import linear_shapes
from raylm.models.folder import as_folder
from raylm.serving.adapter_survey import DEFAULT_RANK, open_adapters
from raylm.serving.adapters import AdapterPool, LoadedAdapter, UnknownAdapterError
from raylm.words import listed

_SWITCH = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


@dataclass(frozen=True, slots=True)
class _Asked:
    """The adapter of the request that runs in this task."""

    model: str
    request: Any
    task: "weakref.ref[asyncio.Task[Any]]"


_ASKED: ContextVar[_Asked | None] = ContextVar("raylm_asked_adapter", default=None)


def _asked() -> _Asked | None:
    asked = _ASKED.get()
    return asked if asked is not None and asked.task() is asyncio.current_task() else None


def close_vllm_adapter_routes(args: ServeArgs) -> None:
    """Before vLLM's `build_app`: its own routes would load any path that a client names."""
    if args.adapter is not None or args.adapters is not None:
        os.environ.pop(_SWITCH, None)


async def serve_adapters(app: Any, engine: Any, args: ServeArgs, exit_stack: AsyncExitStack) -> None:
    """Gives vLLM's app the adapters of the configuration; does nothing when it names none.

    app: after `init_app_state`. A single `adapter` is loaded at once. Raises ServingError when that fails.
    """
    root = open_adapters(args)
    if root is None:
        return
    await _check_workers(engine)
    folder = exit_stack.enter_context(tempfile.TemporaryDirectory(prefix="raylm-adapters-", ignore_cleanup_errors=True))
    linear = await asyncio.to_thread(linear_shapes, as_folder(args.model))
    pool = AdapterPool(
        root, _VllmEngine(engine), Path(folder), linear=linear, max_rank=args.max_adapter_rank or DEFAULT_RANK
    )
    if args.adapter is not None:
        try:
            await pool.get(root.names()[0])
        except RaylmError as error:
            raise ServingError(args.model, f"the engine did not start: {error}") from None
    models = _Models(app.state.openai_serving_models, pool)
    models.take_over()
    app.include_router(_router(models, pool))
    _have_vllm_ask()


async def _check_workers(engine: Any) -> None:
    """Raises ServingError where base requests could be answered with an adapter's weights: see cpu_adapters.py."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    try:
        corrected = all(await engine.collective_rpc("leaves_base_rows_alone"))
    except Exception:  # vLLM sends whatever its layers raise as a plain Exception
        corrected = False
    if not corrected:
        raise ServingError(
            "engine.worker_extension_cls", "takes the place of what adapters need without GPU.", "Drop it."
        )


def _have_vllm_ask() -> None:
    """vLLM asks `resolve_lora` only with this variable; set after `build_app`, it adds no routes."""
    from vllm import envs

    os.environ[_SWITCH] = "1"
    if not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        raise ServingError("adapters", f"vLLM does not heed {_SWITCH} in this process.")


class _VllmEngine:
    """`AdapterEngine` over vLLM's AsyncLLM."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def load(self, adapter: LoadedAdapter) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._client.add_lora(lora_request(adapter))
        except EngineDeadError:
            raise
        except Exception as error:  # vLLM sends whatever its layers raise as a plain Exception with the text
            with suppress(Exception):  # half of it may have been put into place
                await self._client.remove_lora(adapter.engine_id)
            reason = str(error).removeprefix("Call to add_lora method failed: ").strip() or repr(error)
            raise ModelError(
                f"adapter {adapter.name}",
                f"vLLM refuses it: {' '.join(reason.split())[:300]}",
                "Merge it (raylm adapter merge ADAPTER --output MODEL) and serve the result.",
            ) from None

    async def unload(self, adapter: LoadedAdapter) -> None:
        await self._client.remove_lora(adapter.engine_id)

    async def loaded(self) -> set[int]:
        return set(await self._client.list_loras())

    def in_flight(self) -> set[str]:
        states = self._client.output_processor.request_states.values()
        return {state.lora_name for state in states if state.lora_name is not None}


def lora_request(adapter: LoadedAdapter) -> Any:
    """vLLM's request for a version. Its cached blocks are keyed by name and path, its batches by name and id: all
    three are the version's own."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(adapter.engine_name, adapter.engine_id, str(adapter.folder))


class _LoraRequests(Mapping[str, Any]):
    """In the place of vLLM's table of adapters: holds what the running request resolved, and nothing else."""

    def __getitem__(self, model: str) -> Any:
        asked = _asked()
        if asked is None or asked.model != model:
            raise KeyError(model)
        return asked.request

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class _Models:
    """Our part of vLLM's `OpenAIServingModels`."""

    def __init__(self, vllm_models: Any, pool: AdapterPool) -> None:
        self._models, self._pool = vllm_models, pool
        self._name_of_base = vllm_models.model_name
        self.base_names: list[str] = [path.name for path in vllm_models.base_model_paths]

    def take_over(self) -> None:
        """Puts our answers in the place of vLLM's, on the one object that all its routes share."""
        self._models.lora_requests = _LoraRequests()
        self._models.resolve_lora = self.resolve_lora
        self._models.model_name = self.model_name
        self._models.show_available_models = self.show_available_models

    def adapter_in(self, model: str) -> str:
        """The adapter's name in what a client sends: BASE:NAME or NAME."""
        for base in self.base_names:
            if model.startswith(f"{base}:"):
                return model[len(base) + 1 :]
        return model

    async def resolve_lora(self, model: str) -> Any:
        """vLLM's question for a `model` that is not the base: a LoRARequest, or the error to answer."""
        from fastapi import HTTPException
        from vllm.entrypoints.serve import create_error_response
        from vllm.exceptions import VLLMNotFoundError

        try:
            adapter = await self._pool.get(self.adapter_in(model))
        except UnknownAdapterError:
            # Raised: vLLM would drop the message of a 404 that is returned, and name none of the adapters.
            message = f"The model `{model}` does not exist. It is one of {listed(await self._known_names())}."
            raise VLLMNotFoundError(message) from None
        except ModelError as error:
            return create_error_response(str(error), "BadRequestError", HTTPStatus.BAD_REQUEST, "model")
        except ServingError as error:
            raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from None
        request = lora_request(adapter)
        task = asyncio.current_task()
        assert task is not None
        _ASKED.set(_Asked(model, request, weakref.ref(task)))
        return request

    async def _known_names(self) -> list[str]:
        adapters: list[str] = []
        with suppress(ServingError):  # the base is served whatever the root does
            adapters = await self._pool.names()
        return [*self.base_names, *(f"{self.base_names[0]}:{name}" for name in adapters)]

    def model_name(self, lora_request: Any = None) -> str:
        """What a response calls its model: what was asked."""
        asked = _asked()
        if lora_request is None or asked is None:
            return str(self._name_of_base(None))
        return asked.model

    async def show_available_models(self) -> Any:
        """The base's names, and BASE:NAME of each adapter that can be served."""
        from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

        listed = await self._models.registry.show_available_models()
        try:
            rows = await self._pool.rows()
        except ServingError:
            return listed  # the base is served whatever the root does
        base = self.base_names[0]
        for row in rows:
            if row["error"] is None or row["version"] is not None:
                listed.data.append(
                    ModelCard(
                        id=f"{base}:{row['name']}",
                        root=row["name"],
                        parent=base,
                        max_model_len=self._models.model_config.max_model_len,
                        permission=[ModelPermission()],
                        version=row["version"],
                    )
                )
        return listed


def _router(models: _Models, pool: AdapterPool) -> Any:
    """The routes below /v1/adapters."""
    from fastapi import APIRouter, HTTPException

    router = APIRouter(prefix="/v1/adapters", tags=["adapters"])
    replica = uuid.uuid4().hex[:8]

    def shown(row: dict[str, Any]) -> dict[str, Any]:
        return {"id": f"{models.base_names[0]}:{row['name']}", "object": "adapter", **row}

    @contextmanager
    def answered() -> Iterator[None]:
        try:
            yield
        except UnknownAdapterError as error:
            raise HTTPException(HTTPStatus.NOT_FOUND, str(error)) from None
        except ModelError as error:
            raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from None
        except ServingError as error:
            raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from None

    async def one(name: str) -> dict[str, Any]:
        for row in await pool.rows():
            if row["name"] == name:
                return {**shown(row), "replica": replica}
        raise UnknownAdapterError(f"adapter {name}", "does not exist.")

    async def load(name: str, *, force: bool) -> dict[str, Any]:
        began = time.monotonic()
        with answered():
            await pool.load(name, force=force)
            # By then what any replica knows of the files is younger than this request.
            await asyncio.sleep(max(0.0, began + pool.root.fresh_s - time.monotonic()))
            return await one(name)

    @router.get("", summary="List the adapters")
    async def list_adapters() -> dict[str, Any]:
        with answered():
            return {"object": "list", "data": [shown(row) for row in await pool.rows()], "replica": replica}

    @router.get("/{name}", summary="One adapter")
    async def get_adapter(name: str) -> dict[str, Any]:
        with answered():
            return await one(name)

    @router.put("/{name}", summary="Load an adapter before a request asks for it")
    async def load_adapter(name: str) -> dict[str, Any]:
        return await load(name, force=False)

    @router.post("/{name}/reload", summary="Look at an adapter's files now, and try again what was refused")
    async def reload_adapter(name: str) -> dict[str, Any]:
        return await load(name, force=True)

    @router.delete("/{name}", summary="Drop an adapter's weights in the replica that answers")
    async def unload_adapter(name: str) -> dict[str, Any]:
        with answered():
            await pool.unload(name)
            return await one(name)

    return router
