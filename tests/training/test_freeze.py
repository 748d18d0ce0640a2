"""Frozen parameters: every bit stays, nothing is kept for them, and the others learn as if all did."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from raylm.config.sections import ModelSection
from raylm.errors import ConfigError, ModelError
from raylm.models.load import load_model, structure_of
from raylm.training.checkpoint import newest_checkpoint
from raylm.training.prepare import freeze
from tests.training.support import Rows, make_config, read_checkpoint, run_in_process

ROWS = Rows()


def _state(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(run_dir / "checkpoints")
    assert newest is not None
    return read_checkpoint(newest)


@pytest.mark.parametrize("method", ["full", "lisa"])
def test_what_is_frozen_keeps_every_bit_and_has_no_state(
    tiny_model_dir: Path, tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    patterns = "training.freeze=[embed_tokens, layers.0.*norm]"
    settings = [patterns, "export.enabled=true", "export.dtype=fp32", f"training.method={method}"]
    with caplog.at_level("INFO", logger="raylm"):
        run_in_process(make_config(tiny_model_dir, tmp_path, *settings), ROWS)
    base = load_model(ModelSection(path=str(tiny_model_dir)), torch.device("cpu"))
    frozen = {n for n, _ in base.named_parameters() if "embed_tokens" in n or ("layers.0." in n and "norm" in n)}
    assert len(frozen) == 3
    count = sum(base.get_parameter(name).numel() for name in frozen)
    assert f"training.freeze keeps {count:,} of" in caplog.text
    state, exported = _state(tmp_path), load_file(tmp_path / "export" / "model.safetensors")
    for name, parameter in base.named_parameters():
        held = [key for key in state if key.startswith((f"model/{name}", f"optimizer/{name}/"))]
        assert torch.equal(exported[name], parameter) == (name in frozen)
        assert bool(held) == (name not in frozen)


def test_the_first_step_of_the_others_is_that_of_all(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Clipped by the norm of what is trained, so without clipping they are alike."""
    settings = ["training.max_steps=1", "optimizer.max_grad_norm=1e9"]
    run_in_process(make_config(tiny_model_dir, tmp_path / "all", *settings), ROWS)
    run_in_process(make_config(tiny_model_dir, tmp_path / "some", *settings, "training.freeze=[embed_tokens]"), ROWS)
    whole, part = _state(tmp_path / "all"), _state(tmp_path / "some")
    assert {name for name in whole if "embed_tokens" not in name} == set(part)
    assert all(torch.allclose(value, whole[name], rtol=1e-5, atol=1e-7) for name, value in part.items())


def test_patterns_that_cannot_be_meant_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    structure = structure_of(ModelSection(path=str(tiny_model_dir)))
    with pytest.raises(ModelError, match=r"training.freeze: no parameter's name holds 'h\.0\.'"):
        freeze(structure, ["norm", "h.0."])
    with pytest.raises(ModelError, match="leaves nothing to train"):
        freeze(structure, ["model."])
    with pytest.raises(ConfigError, match=r"excludes training\.method=lora, which trains none"):
        make_config(tiny_model_dir, tmp_path, "training.freeze=[norm]", "training.method=lora")
