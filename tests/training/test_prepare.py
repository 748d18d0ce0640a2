"""What a block is run through: checkpointing and compilation change no numbers."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raylm.config.sections import ModelSection
from raylm.errors import ConfigError
from raylm.models.blocks import decoder_blocks
from raylm.models.load import load_model
from raylm.training.batch import Batch, batch_of
from raylm.training.module import LossModule
from raylm.training.prepare import check_compiler, compile_blocks, prepared
from tests.tiny import build_tiny_model
from tests.training.ranks import Ranks, ranks, train_rank
from tests.training.support import Rows, make_config, run_in_process

CPU = torch.device("cpu")
ROWS = Rows()


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five blocks."""
    return build_tiny_model(tmp_path_factory.mktemp("deep") / "deep", num_hidden_layers=5)


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    with ranks(2) as found:
        yield found


def _batch(*lengths: int) -> Batch:
    rng = np.random.default_rng(sum(lengths))
    return batch_of([rng.integers(3, 200, n).astype(np.int32) for n in lengths], [np.ones(n, bool) for n in lengths])


@pytest.mark.parametrize(
    ("setting", "twice"), [("false", []), ("true", [0, 1, 2, 3, 4]), ("2", [0, 2, 4]), ("3", [0, 3])]
)
def test_every_nth_block_is_computed_again(deep_model: Path, tmp_path: Path, setting: str, twice: list[int]) -> None:
    config = make_config(deep_model, tmp_path, f"training.gradient_checkpointing={setting}")
    module = LossModule(prepared(load_model(config.model, CPU), config)).train()
    plain = LossModule(load_model(config.model, CPU)).train()
    calls: Counter[int] = Counter()
    for number, block in enumerate(decoder_blocks(module.model)):
        block.input_layernorm.register_forward_hook(lambda *_, number=number: calls.update([number]))
    for each in (module, plain):
        each(_batch(5, 9, 3)).backward()
    assert [number for number in range(5) if calls[number] == 2] == twice
    assert all(calls[number] == 1 for number in range(5) if number not in twice)
    for (_, one), (_, other) in zip(module.trainable(), plain.trainable(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_and_serve_all_lengths(deep_model: Path) -> None:
    from torch._dynamo.utils import counters

    section = ModelSection(path=str(deep_model))
    module, plain = (LossModule(load_model(section, CPU)).train() for _ in range(2))
    compile_blocks(module.model)
    counters.clear()
    graphs = []
    for lengths in [(5, 9), (20,), (3, 4, 50, 7), (30, 31, 2), (2,), (64,), (6, 6, 6, 6, 6, 6)]:
        batch = _batch(*lengths)
        losses: list[Any] = [each(batch) for each in (module, plain)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [4] * len(graphs), "compiled once for five blocks and all numbers of tokens and sequences"
    for (_, one), (_, other) in zip(module.trainable(), plain.trainable(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["training.method=full", "training.gradient_checkpointing=2"],
        ["training.method=lora"],
        ["training.method=lisa", "lisa.num_active_layers=1", "lisa.interval_steps=2"],
    ],
    ids=lambda options: options[0].rpartition("=")[2],
)
def test_a_compiled_run_is_the_run(tiny_model_dir: Path, tmp_path: Path, options: list[str]) -> None:
    curves = []
    for setting in ("false", "true"):
        config = make_config(tiny_model_dir, tmp_path / setting, f"training.compile={setting}", *options)
        curves.append([(line["train/loss"], line["train/grad_norm"]) for line in run_in_process(config, ROWS)])
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_run_compiled_blocks(pool: Ranks, tiny_model_dir: Path, tmp_path: Path, strategy: str) -> None:
    curves = []
    for number, setting in enumerate(("false", "true")):
        settings = [f"training.strategy={strategy}", "cluster.num_workers=2", f"training.compile={setting}"]
        lines = pool.run(2, train_rank, make_config(tiny_model_dir, tmp_path / str(number), *settings), ROWS)[0]
        curves.append([(line["train/loss"], line["train/grad_norm"]) for line in lines])
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)


def test_compilation_is_refused_where_it_cannot_be(tiny_model_dir: Path, tmp_path: Path) -> None:
    check_compiler()
    message = r"training.compile: no C\+\+ compiler.*Install g\+\+"
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(ConfigError, match=message):
        check_compiler()
    for setting in ("training.strategy=deepspeed", "training.method=qlora"):
        with pytest.raises(ConfigError, match=f"training.compile=true excludes {setting}"):
            make_config(tiny_model_dir, tmp_path, "training.compile=true", setting)
