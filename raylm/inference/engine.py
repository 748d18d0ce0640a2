"""vLLM's offline engine, in this process."""

from typing import Any

from raylm.errors import ModelError
from raylm.inference.adapter import adapter_settings


def engine_environment(kv_cache_gib: float, *, use_gpu: bool) -> dict[str, str]:
    """Variables that vLLM reads when it is imported: set them on the worker that loads the engine."""
    environment = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if not use_gpu:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(kv_cache_gib)))
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return environment


def load_engine(
    folder: str, *, dtype: str, max_model_len: int | None, seed: int, use_gpu: bool, adapter: str | None = None
) -> Any:
    """A vLLM engine over a hub id or folder. Raises ModelError for a length above the model's.

    adapter: folder of the LoRA adapter that `adapter_request` will name. Raises ModelError where it is not servable.
    """
    import torch
    from vllm import LLM

    from raylm.models.processor import has_native_bf16

    if not use_gpu and dtype == "auto" and not has_native_bf16(torch.device("cpu")):
        dtype = "float32"
    try:
        return LLM(
            model=folder,
            dtype=dtype,
            max_model_len=max_model_len,
            seed=seed,
            enforce_eager=not use_gpu,
            disable_log_stats=True,
            **adapter_settings(adapter, folder),
        )
    except ValueError as error:
        raise ModelError(folder, f"vLLM cannot load it: {str(error).splitlines()[0]}") from None
