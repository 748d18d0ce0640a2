"""vLLM's offline engine, in this process, and what each request asks of it."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from raylm.config import GenerateConfig
from raylm.errors import ConfigError, ModelError, nearest
from raylm.models.drafts import engine_options

# Set by a field of GenerateConfig.
RESERVED = {"model": "model", "max_model_len": "max_model_len", "dtype": "dtype", "seed": "seed"}


def engine_environment(kv_cache_gib: float, *, use_gpu: bool) -> dict[str, str]:
    """Variables that vLLM reads when it is imported: set them on the worker that loads the engine."""
    environment = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if not use_gpu:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(kv_cache_gib)))
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return environment


def speculation_options(config: GenerateConfig, folder: str, *, use_gpu: bool) -> dict[str, Any]:
    """Options of `load_engine` for speculation. Raises ModelError for a draft that does not fit the model."""
    return engine_options(
        config.speculation, folder, use_gpu=use_gpu, max_model_len=config.max_model_len, engine=config.engine
    )


def load_engine(
    folder: str,
    *,
    dtype: str,
    max_model_len: int | None,
    seed: int,
    use_gpu: bool,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """A vLLM engine over a hub id or folder; options: further arguments under vLLM's names, which win over ours.

    Raises ConfigError for an unknown option, ModelError for a length above the model's.
    """
    import dataclasses

    import torch
    from vllm import LLM, EngineArgs

    from raylm.models.processor import has_native_bf16

    known = [field.name for field in dataclasses.fields(EngineArgs)]
    for key in options or {}:
        if key not in known:
            raise ConfigError(f"engine.{key}", "is no engine argument of vLLM.", nearest(key, known))
    if not use_gpu and dtype == "auto" and not has_native_bf16(torch.device("cpu")):
        dtype = "float32"
    settings: dict[str, Any] = {
        "model": folder,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "seed": seed,
        "enforce_eager": not use_gpu,
        "disable_log_stats": True,
        **(options or {}),
    }
    try:
        return LLM(**settings)
    except (ValueError, RuntimeError, OSError) as error:
        raise ModelError(folder, f"vLLM cannot load it: {_reason(error)}") from None


def sampling_params(config: GenerateConfig, key: str | int = "", stop_token_ids: Sequence[int] = ()) -> Any:
    """What vLLM is asked for one answer; key: of the row, whose seed it decides; stop_token_ids: end it as well.

    The seed is a function of `config.seed` and the key alone, so a row draws the same whatever runs beside it.
    Raises ConfigError for values that vLLM refuses.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    try:
        return SamplingParams(
            n=config.n,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            presence_penalty=config.presence_penalty,
            frequency_penalty=config.frequency_penalty,
            stop=list(config.stop) or None,
            stop_token_ids=list(stop_token_ids) or None,
            logprobs=config.logprobs,
            seed=row_seed(config.seed, key) if config.temperature > 0 else None,
            structured_outputs=StructuredOutputsParams(**config.structured) if config.structured else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
    except (ValueError, VLLMClientError) as error:
        raise ConfigError("sampling", f"vLLM refuses it: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """The line that says it: pydantic puts a heading before it, and the value behind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = lines[1] if len(lines) > 1 and "validation error" in lines[0] else lines[0]
    return line.removeprefix("Value error, ").partition(" [type=")[0]


def row_seed(seed: int, key: str | int) -> int:
    """A seed in [0, 2**62): vLLM counts up from it for the answers of one prompt."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2
