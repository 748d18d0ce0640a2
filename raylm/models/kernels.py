"""Fused GPU kernels for norms, rotations and gated MLPs (Liger, arXiv:2410.10989), in place of PyTorch's products.

The loss is never Liger's: raylm's own one (training/losses.py) keeps no logits either, and sums as the loop wants it.
"""

import importlib.util
import logging
from typing import Any

from raylm.errors import ModelError

SETTING = "model.kernels=liger"
OUR_LOSS = {"cross_entropy": False, "fused_linear_cross_entropy": False}

logger = logging.getLogger(__name__)


def check_liger(model_type: str) -> None:
    """Raises ModelError when the package is not installed or does not know the architecture. model_type: as in the
    model's configuration."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise ModelError(
            SETTING,
            "needs the package liger-kernel.",
            "Install it: pip install 'raylm[liger]', or set model.kernels=torch.",
        )
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ModelError(
            SETTING,
            f"Liger has nothing for the architecture {model_type}, only for "
            f"{', '.join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))}.",
            "Set model.kernels=torch.",
        )


def check_kernels(kernels: str, *, on_gpu: bool) -> None:
    """Raises ModelError for Liger's kernels without a GPU."""
    if kernels == "liger" and not on_gpu:
        raise ModelError(SETTING, "needs a CUDA device: its kernels are for GPUs.", "Set model.kernels=torch.")


def use_liger(model: Any) -> Any:
    """Puts Liger's modules into a model on a GPU, in place; also into what transformers makes of its class later in
    this process. Check first (check_kernels). Returns the model."""
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model, **OUR_LOSS)
    logger.info("kernels: liger")
    return model
