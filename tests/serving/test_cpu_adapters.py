"""vLLM's kernels for processors, with rows of several adapters in one batch."""

import subprocess
import sys

import pytest

MIXED = """
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

torch.manual_seed(0)
wrapper = PunicaWrapperCPU(64, max_batches=8, device="cpu")
x, a, b = torch.randn(6, 16), torch.randn(2, 1, 4, 16), torch.randn(2, 1, 16, 4)
rows = (0, 0, 7, 7, 9, 0)  # the adapters 7 and 9 lie in the slots 0 and 1; 0 is the base
wanted = torch.zeros(6, 16)
for row, slot in ((2, 0), (3, 0), (4, 1)):
    wanted[row] = x[row] @ a[slot, 0].T @ b[slot, 0].T

def is_right(is_prefill):
    wrapper.update_metadata(LoRAMapping(rows, rows, is_prefill=is_prefill), [7, 9], 3, 320)
    y = torch.zeros(6, 16)
    wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (16,))
    return torch.allclose(y, wanted, atol=1e-4)

print([is_right(True), is_right(False)])
import raylm.serving.cpu_adapters
print([is_right(True), is_right(False)])
"""


@pytest.fixture(scope="module")
def mixed_batch() -> list[str]:
    """Whether vLLM's own kernels for processors keep base rows apart: as they come, and corrected."""
    done = subprocess.run([sys.executable, "-c", MIXED], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-2:]


def test_base_rows_of_a_mixed_batch_get_no_adapter(mixed_batch: list[str]) -> None:
    assert mixed_batch[1] == "[True, True]"


def test_vllm_still_needs_the_correction(mixed_batch: list[str]) -> None:
    """When this fails, drop raylm/serving/cpu_adapters.py."""
    assert mixed_batch[0] == "[False, False]"
