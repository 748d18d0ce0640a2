import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from raylm.training.losses import IGNORE_INDEX, next_token_loss


@pytest.mark.parametrize("chunk", [1, 3, 1024])
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradients_equal_plain_cross_entropy(chunk: int, with_bias: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(16, dtype=torch.float64, requires_grad=True) if with_bias else None
    labels = torch.tensor([3, IGNORE_INDEX, 0, 15, IGNORE_INDEX, 7, 7, 2, IGNORE_INDEX, 1])
    wanted = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    reference = cross_entropy(linear(hidden, weight, bias), labels, reduction="sum")
    expected = torch.autograd.grad(reference * 0.5, wanted)
    loss = next_token_loss(hidden, weight, bias, labels, chunk_tokens=chunk)
    got = torch.autograd.grad(loss * 0.5, wanted)
    torch.testing.assert_close(loss, reference.float(), rtol=1e-6, atol=0)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.1, 0.0), (0.0, 1e-2), (0.3, 1e-1)])
@pytest.mark.parametrize("chunk", [3, 1024])
def test_smoothing_and_z_loss_equal_their_formulas(smoothing: float, z_loss: float, chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(16, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([3, IGNORE_INDEX, 0, 15, 7, 2, IGNORE_INDEX])
    logits = linear(hidden, weight, bias)
    reference = cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    reference = reference + z_loss * torch.logsumexp(logits[labels != IGNORE_INDEX], -1).square().sum()
    expected = torch.autograd.grad(reference, [hidden, weight, bias])
    options = {"chunk_tokens": chunk, "label_smoothing": smoothing, "z_loss": z_loss}
    loss = next_token_loss(hidden, weight, bias, labels, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, reference.float(), rtol=1e-6, atol=0)
    for one, other in zip(torch.autograd.grad(loss, [hidden, weight, bias]), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_nothing_carries_loss() -> None:
    """D09: exactly 0, and gradients that are exactly 0."""
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    loss = next_token_loss(hidden, weight, None, torch.full((4,), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8)
    next_token_loss(hidden, weight, None, torch.tensor([1, 2, 3, 4])).backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_nothing_is_computed_for_gradients_that_nobody_asks_for() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(16, 8, requires_grad=True)
    labels = torch.tensor([1, 2, 3, 4])
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        quiet = next_token_loss(hidden, weight, None, labels)
    assert "aten::addmm_" not in {event.name for event in seen.events()}
    assert quiet.item() == next_token_loss(hidden, weight, None, labels).item()


def test_autocast_computes_in_bf16_close_to_fp32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(32, 64, requires_grad=True), torch.randn(100, 64, requires_grad=True)
    labels = torch.randint(0, 100, (32,))
    exact = next_token_loss(hidden, weight, None, labels)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = next_token_loss(hidden, weight, None, labels)
    assert rounded.dtype == torch.float32
    assert rounded.item() != exact.item()
    torch.testing.assert_close(rounded, exact, rtol=1e-2, atol=0)
    rounded.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32
