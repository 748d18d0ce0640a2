"""Without GPU, vLLM 0.32 computes a request to the base with an adapter when the two share a batch; corrected here.

Its kernels for processors take the adapter of each token by index, and the index of a token without one is -1: the last
slot. So a base request beside an adapter's is answered with the weights in that slot, silently. vLLM imports a worker
extension in each worker before the model is built, so this module corrects the kernels when it is imported there. The
price is that import's side effect; an RPC that patched the running worker would come too late for a compiled model.
Drop it when `test_vllm_still_needs_the_correction` fails.
"""

from collections.abc import Callable
from typing import Any


class CorrectedWorker:
    """What vLLM mixes into its worker class."""

    def leaves_base_rows_alone(self) -> bool:
        """True in a worker whose kernels are corrected."""
        from vllm.lora.punica_wrapper import punica_cpu

        return all(hasattr(getattr(punica_cpu, name), "uncorrected") for name in ("sgmv_shrink", "bgmv_shrink"))


def correct_kernels() -> None:
    """Makes rows without an adapter zero after the first of the two products, and so after both. Once is enough."""
    import torch
    from vllm.lora.punica_wrapper import punica_cpu

    import raylm.models.vllm_cpu  # noqa: F401  (vLLM takes one extension: speculation beside adapters needs both)

    def corrected(kernel: Callable[..., None], indices: Callable[..., torch.Tensor]) -> Callable[..., None]:
        def run(inputs: torch.Tensor, weights: torch.Tensor, output: torch.Tensor, *rest: Any) -> None:
            kernel(inputs, weights, output, *rest)
            output.masked_fill_((indices(*rest) < 0)[:, None], 0)

        run.uncorrected = kernel  # type: ignore[attr-defined]
        return run

    def by_sequence(_starts: Any, lengths: torch.Tensor, adapters: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.repeat_interleave(adapters, lengths)

    def by_token(adapters: torch.Tensor, *_: Any) -> torch.Tensor:
        return adapters

    for name, indices in (("sgmv_shrink", by_sequence), ("bgmv_shrink", by_token)):
        kernel = getattr(punica_cpu, name)
        if not hasattr(kernel, "uncorrected"):
            setattr(punica_cpu, name, corrected(kernel, indices))


correct_kernels()
