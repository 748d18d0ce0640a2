"""vLLM's offline engine, in this process."""

from typing import Any

from raylm.config.speculation import SpeculationSection
from raylm.errors import ModelError
from raylm.models.drafts import speculative_config


def engine_environment(kv_cache_gib: float, *, use_gpu: bool) -> dict[str, str]:
    """Variables that vLLM reads when it is imported: set them on the worker that loads the engine."""
    environment = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if not use_gpu:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(kv_cache_gib)))
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return environment


def load_engine(
    folder: str,
    *,
    dtype: str,
    max_model_len: int | None,
    seed: int,
    use_gpu: bool,
    speculation: SpeculationSection | None = None,
    count: bool = False,
) -> Any:
    """A vLLM engine over a hub id or folder. count: keep vLLM's metrics, for `get_metrics`.

    Raises ModelError for a length above the model's, and for a draft that does not fit it.
    """
    import torch
    from vllm import LLM

    from raylm.models.processor import has_native_bf16

    if not use_gpu and dtype == "auto" and not has_native_bf16(torch.device("cpu")):
        dtype = "float32"
    settings = None
    if speculation is not None:
        settings = speculative_config(speculation, folder, use_gpu=use_gpu, max_model_len=max_model_len)
    try:
        return LLM(
            model=folder,
            dtype=dtype,
            max_model_len=max_model_len,
            seed=seed,
            enforce_eager=not use_gpu,
            disable_log_stats=not count,
            speculative_config=settings,
        )
    except ValueError as error:
        raise ModelError(folder, f"vLLM cannot load it: {str(error).splitlines()[0]}") from None
