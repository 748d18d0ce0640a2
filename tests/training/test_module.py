"""The wrapped model in training and in evaluation."""

from pathlib import Path

import numpy as np
import torch

from raylm.config.sections import ModelSection
from raylm.config.training import LossSection
from raylm.models.load import load_model
from raylm.training.batch import batch_of
from raylm.training.module import LossModule


def _module(folder: Path, **extras: float) -> LossModule:
    return LossModule(load_model(ModelSection(path=str(folder)), torch.device("cpu")), LossSection(**extras))


def test_noise_is_uniform_within_what_the_paper_says_for_each_packed_sequence(tiny_model_dir: Path) -> None:
    """arXiv:2310.05914, Algorithm 1: alpha / sqrt(L d)."""
    module = _module(tiny_model_dir, neftune_alpha=5.0)
    lengths = [3, 200, 40]
    batch = batch_of([np.zeros(n, np.int32) for n in lengths], [np.ones(n, bool) for n in lengths])
    embedding = module.model.get_input_embeddings()
    plain = embedding.weight[0].detach()
    seen: list[torch.Tensor] = []
    embedding.register_forward_hook(lambda *arguments: seen.append(arguments[-1].detach() - plain))
    module.train()
    module(batch)
    start = 0
    for length in lengths:
        noise = seen[0][0, start : start + length]
        bound = 5.0 / (length * plain.numel()) ** 0.5
        assert noise.abs().max() <= bound * 1.0001
        assert noise.abs().max() > bound * 0.9
        assert abs(noise.mean()) < 4 * bound / (3 * noise.numel()) ** 0.5
        start += length
    module.eval()
    module(batch)
    assert not seen[1].any()


def test_evaluation_is_the_plain_loss(tiny_model_dir: Path) -> None:
    batch = batch_of([np.arange(3, 30, dtype=np.int32)], [np.ones(27, bool)])
    plain = _module(tiny_model_dir).train()(batch)
    other = _module(tiny_model_dir, neftune_alpha=5.0, label_smoothing=0.2, z_loss=0.1)
    torch.testing.assert_close(other.eval()(batch), plain)
    torch.manual_seed(0)
    first = other.train()(batch)
    assert first > plain + 1
    torch.manual_seed(0)
    torch.testing.assert_close(other(batch), first)  # a function of the seed
