"""What is repaired in vLLM's CPU engine: a request's temperature, top_k and top_p reach the check of its guesses."""

import subprocess
import sys

import pytest
import torch

CODE = """
import torch
from vllm.platforms import current_platform
current_platform.import_kernels()
current_platform.register_triton_kernel_overrides()
import vllm.v1.sample.rejection_sampler as sampler
import raylm.models.vllm_cpu
for values in ([0.5, 0.0, 1.5], [7, 0, 9]):
    kind = torch.float32 if isinstance(values[0], float) else torch.int32
    expanded = sampler.expand_batch_to_tokens(torch.tensor(values, dtype=kind), torch.tensor([2, 3, 6]), 6, 0, 1)
    assert expanded.dtype == kind
    print(expanded.tolist())
"""


AMX = """
import ctypes, sys
libc = ctypes.CDLL(None)
def allowed():
    found = ctypes.c_ulong()
    assert libc.syscall(158, 0x1022, ctypes.byref(found)) == 0  # arch_prctl(ARCH_GET_XCOMP_PERM)
    return bool(found.value >> 18 & 1)  # the tiles' data
before = allowed()
import raylm.models.vllm_cpu
print(before, allowed())
"""


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="the processor has no AMX")
def test_a_process_that_loads_the_repair_may_use_the_matrix_unit() -> None:
    done = subprocess.run([sys.executable, "-c", AMX], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "False True"


REFUSED = """
import torch
torch.cpu._is_amx_tile_supported, torch.cpu._init_amx = (lambda: True), (lambda: False)
import raylm.models.vllm_cpu
"""


def test_a_system_that_lends_no_matrix_unit_is_named_with_the_remedy() -> None:
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True)
    assert done.returncode == 1
    assert "does not lend this processor's AMX registers: set dtype=float32" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is that of the CPU engine")
def test_settings_of_a_request_are_repeated_for_each_of_its_tokens() -> None:
    """W10: the answers are sampled at the temperature that was asked for."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-2:] == ["[0.5, 0.5, 1.0, 1.5, 1.5, 1.5]", "[7, 7, 1, 9, 9, 9]"]
