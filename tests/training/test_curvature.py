"""Sophia's estimate of the curvature: the draws, the estimate, and when the loop asks for it."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raylm.config.sections import ModelSection
from raylm.config.training import LossSection, OptimizerSection
from raylm.errors import ConfigError
from raylm.models.load import load_model
from raylm.optim.build import build_optimizer
from raylm.optim.checks import check_optimizer_use
from raylm.training.batch import batch_of
from raylm.training.checkpoint import list_checkpoints
from raylm.training.curvature import estimate_hessian
from raylm.training.losses import IGNORE_INDEX, drawn_labels
from raylm.training.module import LossModule
from raylm.training.scaling import LossScaler
from raylm.training.strategies.single import SingleStrategy
from tests.training.support import Rows, make_config, read_checkpoint, run_in_process

CPU = torch.device("cpu")
ROWS = Rows()


def test_labels_are_drawn_from_the_softmax() -> None:
    """20,000 draws over five words: shares to within four standard deviations, in chunks as at once."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.tensor([[1.0, -0.5, 2.0]]).expand(20_000, 3)
    weight, bias = torch.randn(5, 3, generator=generator), torch.randn(5, generator=generator)
    uniforms, labels = torch.rand(20_000, generator=generator), torch.zeros(20_000, dtype=torch.int64)
    drawn = drawn_labels(hidden, weight, bias, labels, uniforms, chunk_tokens=999)
    assert torch.equal(drawn, drawn_labels(hidden, weight, bias, labels, uniforms, chunk_tokens=10**6))
    chances = (weight @ hidden[0] + bias).softmax(0).numpy()
    shares = np.bincount(drawn.numpy(), minlength=5) / 20_000
    assert np.all(np.abs(shares - chances) < 4 * np.sqrt(chances * (1 - chances) / 20_000))


def test_only_labels_are_drawn_and_the_ends_of_the_range_are_words() -> None:
    labels = torch.tensor([3, IGNORE_INDEX, 3, 3])
    uniforms = torch.tensor([0.0, 0.5, 1.0, 1.0 - 1e-7])
    drawn = drawn_labels(torch.zeros(4, 2), torch.zeros(7, 2), None, labels, uniforms)
    assert drawn.tolist() == [0, IGNORE_INDEX, 6, 6]


def _strategy(model_dir: Path, extras: LossSection | None = None, **options: Any) -> SingleStrategy:
    module = LossModule(load_model(ModelSection(path=str(model_dir)), CPU), extras).train()
    section = OptimizerSection(name="sophia", options=options)
    return SingleStrategy(module, lambda named: build_optimizer(named, section), CPU)


def _hessians(strategy: SingleStrategy) -> dict[str, torch.Tensor]:
    return {name: strategy.optimizer.state[p]["hessian"] for name, p in strategy.module.trainable()}


def test_an_estimate_is_labels_times_the_squared_gradient(tiny_model_dir: Path) -> None:
    """Against the plain cross-entropy of the labels that were drawn, one sequence at a time, over two micro-batches;
    what the loss has besides is not in it."""
    strategy = _strategy(tiny_model_dir, LossSection(label_smoothing=0.3, z_loss=0.1), betas=(0.9, 0.75))
    rows = [(ROWS.ids[number], ROWS.masks[number]) for number in range(4)]
    batches = [batch_of(*map(list, zip(*rows[:3], strict=True))), batch_of([rows[3][0]], [rows[3][1]])]
    drawn: list[torch.Tensor] = []
    for ids, mask in rows:
        single = batch_of([ids], [mask])
        with torch.no_grad(), strategy.module.drawing_labels(5):
            from raylm.models.adapters import base_of, output_layer
            from raylm.training.module import _uniforms

            causal = base_of(strategy.module.model)
            hidden = strategy.module.hidden(causal, single)
            drawn.append(drawn_labels(hidden, *output_layer(causal), single.labels, _uniforms(single, 5)))
    number = sum(int((labels != IGNORE_INDEX).sum()) for labels in drawn)
    total = torch.zeros(())
    for (ids, _), labels in zip(rows, drawn, strict=True):
        logits = strategy.module.model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    named = strategy.module.trainable()
    gradients = torch.autograd.grad(total / number, [parameter for _, parameter in named])
    estimate_hessian(strategy, batches, precision="fp32", seed=5)
    assert all(parameter.grad is None for _, parameter in named)
    for (name, _), gradient in zip(named, gradients, strict=True):
        expected = 0.25 * number * gradient**2
        torch.testing.assert_close(_hessians(strategy)[name], expected, rtol=1e-3, atol=float(expected.max()) * 1e-5)


def test_scaled_losses_give_the_same_estimate_and_overflows_none(tiny_model_dir: Path) -> None:
    batch = batch_of([ROWS.ids[0]], [ROWS.masks[0]])
    plain, scaled, lost = (_strategy(tiny_model_dir) for _ in range(3))
    estimate_hessian(plain, [batch], precision="fp32", seed=3)
    estimate_hessian(scaled, [batch], precision="fp32", seed=3, scaler=LossScaler(initial=1024.0))
    for name, value in _hessians(plain).items():
        torch.testing.assert_close(_hessians(scaled)[name], value, rtol=1e-4, atol=0)
    estimate_hessian(lost, [batch], precision="fp32", seed=3, scaler=LossScaler(initial=1e39))
    assert not lost.optimizer.state
    assert all(parameter.grad is None for _, parameter in lost.module.trainable())


def test_draws_change_with_the_seed_and_not_with_packing(tiny_model_dir: Path) -> None:
    rows = [(ROWS.ids[number], ROWS.masks[number]) for number in range(3)]
    packed = [batch_of(*map(list, zip(*rows, strict=True)))]
    alone = [batch_of([ids], [mask]) for ids, mask in rows]
    found = []
    for batches, seed in ((packed, 1), (alone, 1), (packed, 2)):
        strategy = _strategy(tiny_model_dir)
        estimate_hessian(strategy, batches, precision="fp32", seed=seed)
        found.append(_hessians(strategy))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-3, atol=float(value.max()) * 1e-5)
    assert any(not torch.allclose(value, found[2][name], rtol=0.1) for name, value in found[0].items())


def test_the_loop_estimates_every_few_steps_and_resumes_bit_for_bit(tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = [
        "optimizer.name=sophia",
        "optimizer.learning_rate=1e-3",
        "optimizer.options={hessian_interval_steps: 2}",
    ]
    settings += ["checkpoint.interval_steps=1", "checkpoint.keep_last=99"]
    config = make_config(tiny_model_dir, tmp_path / "straight", *settings)
    lines = run_in_process(config, ROWS)
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    states = [read_checkpoint(path) for path in list_checkpoints(tmp_path / "straight" / "checkpoints")]
    name = next(key for key in states[0] if key.endswith("/hessian"))
    changes = [not torch.equal(left[name], right[name]) for left, right in itertools.pairwise(states)]
    assert float(states[0][name].max()) > 0
    assert changes == [step % 2 == 0 for step in range(1, len(states))]
    again = make_config(tiny_model_dir, tmp_path / "again", *settings)
    run_in_process(again, ROWS, stop_after=3)
    run_in_process(again, ROWS, start_from=tmp_path / "again" / "checkpoints" / "step-00000003", start=3)
    last = read_checkpoint(list_checkpoints(tmp_path / "again" / "checkpoints")[-1])
    assert last.keys() == states[-1].keys()
    assert all(torch.equal(value, states[-1][key]) for key, value in last.items())


def test_lisa_begins_intervals_with_an_estimate(tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = ["optimizer.name=sophia", "training.method=lisa", "lisa.num_active_layers=1"]
    check_optimizer_use(make_config(tiny_model_dir, tmp_path, *settings, "lisa.interval_steps=20"))
    with pytest.raises(ConfigError, match="25 is not a multiple of sophia's hessian_interval_steps=10"):
        check_optimizer_use(make_config(tiny_model_dir, tmp_path, *settings, "lisa.interval_steps=25"))
