"""What drafts for a model, checked before an engine starts (known fault W11)."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from raylm.config.speculation import SpeculationSection
from raylm.errors import ConfigError, ModelError
from raylm.models.drafts import WORKER_REPAIR, check_set_once, engine_options, portable, speculative_config
from tests.tiny import build_tiny_model


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("target") / "target")


def draft(folder: Path, **settings: Any) -> SpeculationSection:
    build_tiny_model(folder, num_hidden_layers=1, **settings)
    return SpeculationSection(method="draft_model", model=str(folder))


def settings_of(section: SpeculationSection, target: Path, **options: Any) -> dict[str, Any]:
    return speculative_config(section, str(target), **{"use_gpu": False, **options})


def edit(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def test_a_draft_with_the_same_vocabulary_is_passed_on(tmp_path: Path, target: Path) -> None:
    section = draft(tmp_path / "d")
    assert settings_of(section, target, use_gpu=True) == {
        "method": "draft_model",
        "num_speculative_tokens": 4,
        "model": str(tmp_path / "d"),
    }


@pytest.mark.parametrize("rows", [320, 352])
def test_a_padded_vocabulary_is_drafted_from_where_both_have_tokens(tmp_path: Path, target: Path, rows: int) -> None:
    assert settings_of(draft(tmp_path / "d", vocab_size=rows), target)["use_heterogeneous_vocab"] is True


def test_an_extended_target_keeps_the_draft_of_its_base(tmp_path: Path, target: Path) -> None:
    import raylm

    raylm.extend_vocabulary({"model": str(target), "output": str(tmp_path / "t"), "special": ["<|act|>", "<|obs|>"]})
    assert settings_of(draft(tmp_path / "d"), tmp_path / "t")["use_heterogeneous_vocab"] is True


def test_another_vocabulary_is_refused_whatever_its_length(tmp_path: Path, target: Path) -> None:
    section = draft(tmp_path / "d")
    tokenizer = json.loads((tmp_path / "d" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "d" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"d has another vocabulary than .*: 2 ids differ, such as \d+, which is 'b'"):
        settings_of(section, target)


def test_unequal_lengths_without_a_tokenizer_to_compare_are_refused(tmp_path: Path, target: Path) -> None:
    section = draft(tmp_path / "d", vocab_size=320)
    (tmp_path / "d" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has 320 rows and .* 287, and not both have a tokenizer.json"):
        settings_of(section, target)


def test_an_adapter_is_not_a_draft(tmp_path: Path, target: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    section = SpeculationSection(method="draft_model", model=str(tmp_path))
    with pytest.raises(ModelError, match="is a LoRA adapter, not a whole model"):
        settings_of(section, target)


def test_a_draft_that_is_not_there_is_named(tmp_path: Path, target: Path) -> None:
    with pytest.raises(ModelError, match="absent: there is no such file or folder"):
        settings_of(SpeculationSection(method="draft_model", model=str(tmp_path / "absent")), target)


def test_a_draft_with_fewer_positions_is_a_warning(
    tmp_path: Path, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    section = draft(tmp_path / "d", max_position_embeddings=128)
    with caplog.at_level(logging.WARNING):
        settings_of(section, target)
        assert "has 128 positions and requests may have 256 tokens" in caplog.text
        caplog.clear()
        settings_of(section, target, max_model_len=128)
    assert caplog.text == ""


def test_a_head_of_another_width_is_refused(tmp_path: Path, target: Path) -> None:
    build_tiny_model(tmp_path / "head", hidden_size=64)
    section = SpeculationSection(method="eagle", model=str(tmp_path / "head"))
    with pytest.raises(ModelError, match=r"reads hidden states of 64 numbers, and those of .* have 32"):
        settings_of(section, target)
    edit(tmp_path / "head" / "config.json", target_hidden_size=32)
    assert settings_of(section, target)["method"] == "eagle"


def test_an_eagle3_head_needs_a_model_with_three_layers_to_read(tmp_path: Path, target: Path) -> None:
    build_tiny_model(tmp_path / "head")
    section = SpeculationSection(method="eagle3", model=str(tmp_path / "head"))
    with pytest.raises(ModelError, match=r"takes from models of 7 layers and more; .* has 2"):
        settings_of(section, target)
    edit(tmp_path / "head" / "config.json", eagle_aux_hidden_state_layer_ids=[0, 1, 2])
    assert settings_of(section, target)["method"] == "eagle3"
    edit(tmp_path / "head" / "config.json", eagle_aux_hidden_state_layer_ids=None)
    edit(target / "config.json", num_hidden_layers=7)
    assert settings_of(section, target)["method"] == "eagle3"


def test_multi_token_prediction_needs_layers_for_it(tmp_path: Path, target: Path) -> None:
    section = SpeculationSection(method="mtp")
    with pytest.raises(ModelError, match="needs a model with layers for multi-token prediction"):
        settings_of(section, target)
    build_tiny_model(tmp_path / "t")
    edit(tmp_path / "t" / "config.json", num_nextn_predict_layers=1)
    assert settings_of(section, tmp_path / "t", use_gpu=True) == {"method": "mtp", "num_speculative_tokens": 1}


def test_methods_that_cannot_run_here_say_why(target: Path) -> None:
    with pytest.raises(ModelError, match=r"ngram_gpu needs a GPU. Choose one of ngram, "):
        settings_of(SpeculationSection(method="ngram_gpu"), target)
    assert settings_of(SpeculationSection(method="ngram_gpu"), target, use_gpu=True)["method"] == "ngram_gpu"
    with pytest.raises(ModelError, match=r"suffix needs the package arctic-inference. pip install arctic-inference"):
        settings_of(SpeculationSection(method="suffix"), target)


def test_a_relative_draft_is_made_absolute_for_replicas(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft(tmp_path / "d")
    monkeypatch.chdir(tmp_path)
    assert portable(SpeculationSection(method="draft_model", model="./d")).model == str(tmp_path / "d")
    assert portable(SpeculationSection(method="ngram")).model is None


NGRAM = SpeculationSection(method="ngram")
GIVEN = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}


@pytest.mark.parametrize(
    ("section", "engine", "use_gpu", "repaired"),
    [
        (NGRAM, {}, False, True),
        (NGRAM, {}, True, False),
        (None, GIVEN, False, True),
        (None, GIVEN, True, False),
        (None, {}, False, True),
        (None, {}, True, False),
        (None, {"speculative_config": None, "worker_extension_cls": "a.B"}, False, False),
        (None, {**GIVEN, "worker_extension_cls": "a.B"}, True, False),
    ],
)
def test_without_gpu_the_repair_is_there_unless_another_extension_is(
    tiny_model_dir: Path, section: SpeculationSection | None, engine: dict[str, Any], use_gpu: bool, repaired: bool
) -> None:
    found = engine_options(section, str(tiny_model_dir), use_gpu=use_gpu, engine=engine)
    assert found.get("worker_extension_cls") == (WORKER_REPAIR if repaired else None)
    assert ("speculative_config" in found) == (section is not None)


@pytest.mark.parametrize(
    ("section", "engine", "use_gpu", "said"),
    [
        (NGRAM, GIVEN, True, "engine.speculative_config: excludes speculation"),
        (NGRAM, {"worker_extension_cls": "a.B"}, True, "engine.worker_extension_cls: excludes speculation"),
        (None, {**GIVEN, "worker_extension_cls": "a.B"}, False, "needs without GPU"),
    ],
)
def test_speculation_is_set_once(
    section: SpeculationSection | None, engine: dict[str, Any], use_gpu: bool, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_set_once(section, engine, use_gpu=use_gpu)
    with pytest.raises(ConfigError, match=said):
        engine_options(section, "m", use_gpu=use_gpu, engine=engine)
