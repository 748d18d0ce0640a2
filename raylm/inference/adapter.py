"""A LoRA adapter in vLLM's offline engine."""

from typing import Any

from raylm.models.adapter_files import check_folder, servable_rank


def adapter_settings(adapter: str | None, model: str) -> dict[str, Any]:
    """vLLM's arguments for an engine of `model`, folder or hub id, with this adapter folder; none without one.

    Raises ModelError for an adapter that vLLM cannot serve beside the model.
    """
    if adapter is None:
        return {}
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": servable_rank(check_folder(adapter, model))}


def adapter_request(adapter: str | None) -> Any:
    """What such an engine is told with each prompt; None without an adapter."""
    if adapter is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest("adapter", 1, adapter)
