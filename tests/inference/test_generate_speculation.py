"""`raylm generate` with speculation gives the answers it gives without."""

import json
from pathlib import Path
from typing import Any

import pytest

import raylm
from raylm.config import GenerateConfig
from raylm.errors import ConfigError, ModelError
from raylm.inference.worker import stage_options
from raylm.models.drafts import WORKER_REPAIR
from tests.tiny import build_tiny_model


def test_a_draft_that_does_not_fit_is_refused_before_ray_starts(tmp_path: Path, tiny_model_dir: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    given = {"model": str(tiny_model_dir), "prompts": ["hello"], "output": str(tmp_path / "out.jsonl")}
    with pytest.raises(ModelError, match="is a LoRA adapter, not a whole model"):
        raylm.generate(given, {"speculation.method": "draft_model", "speculation.model": str(tmp_path)})


def test_the_engine_of_a_stage_is_told_what_drafts(tiny_model_dir: Path) -> None:
    """Answers are the same with and without, so nothing else says that speculation is not ignored."""
    given = {"model": str(tiny_model_dir), "prompts": ["hello"]}
    vllms = {"method": "ngram", "num_speculative_tokens": 2}
    plain, ours, theirs = (
        stage_options(GenerateConfig.model_validate({**given, **more}), str(tiny_model_dir), use_gpu=False)
        for more in (
            {},
            {"speculation": {"method": "ngram", "num_speculative_tokens": 3}},
            {"engine": {"speculative_config": vllms}},
        )
    )
    assert plain == {"worker_extension_cls": WORKER_REPAIR}
    assert ours["speculative_config"]["num_speculative_tokens"] == 3
    assert theirs["speculative_config"] == vllms
    assert ours["worker_extension_cls"] == theirs["worker_extension_cls"] == WORKER_REPAIR


def test_speculation_that_is_set_twice_is_refused_before_ray_starts(tmp_path: Path, tiny_model_dir: Path) -> None:
    given = {"model": str(tiny_model_dir), "prompts": ["hello"], "output": str(tmp_path / "out.jsonl")}
    given |= {"speculation": {"method": "ngram"}, "engine": {"speculative_config": {"method": "ngram"}}}
    with pytest.raises(ConfigError, match="excludes speculation"):
        raylm.generate(given)


@pytest.mark.slow
def test_generation_is_the_same_with_speculation(ray_cluster: Any, tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "model", hidden_size=128)
    draft = build_tiny_model(tmp_path / "draft", hidden_size=128, num_hidden_layers=1)
    given = {"model": str(model), "prompts": [f"say {n} and {n} and {n}" for n in range(6)]}
    given |= {"max_tokens": 16, "dtype": "float32"}
    kinds = {"none": {}, "draft": {"speculation": {"method": "draft_model", "model": str(draft)}}}
    answers = {}
    for name, settings in kinds.items():
        output = tmp_path / f"{name}.jsonl"
        raylm.generate({**given, **settings, "output": str(output)})
        answers[name] = [json.loads(line)["answer"] for line in output.read_text().splitlines()]
    assert len(answers["none"]) == 6
    assert answers["draft"] == answers["none"]
