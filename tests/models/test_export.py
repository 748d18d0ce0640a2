import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from raylm.config.sections import ModelSection
from raylm.config.training import LoraSection
from raylm.data.tokenizer import load_tokenizer
from raylm.errors import ModelError
from raylm.models.adapters import add_lora, merged
from raylm.models.export import export_adapter, export_model
from raylm.models.load import check_max_seq_len, load_config, load_model
from tests.tiny import build_tiny_model

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 200, 31, 7]])


def _load(path: Path) -> Any:
    return load_model(ModelSection(path=str(path)), CPU)


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits.float()


def _reload(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_reloaded_export_equals_the_live_model(tmp_path: Path, tied: bool) -> None:
    """E01, E05."""
    source = build_tiny_model(tmp_path / "source", tie_word_embeddings=tied)
    model = _load(source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    export_model(model, load_tokenizer(str(source)), tmp_path / "out", dtype=torch.float32, end_token="<|im_end|>")
    again = _reload(tmp_path / "out")
    torch.testing.assert_close(_logits(again), _logits(model), rtol=0, atol=0)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.float32}
    assert ("lm_head.weight" in names) is not tied
    assert (again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()) is tied


def test_saving_does_not_import_deepspeed(tiny_model_dir: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from tests.models.test_export import _load, load_tokenizer, export_model, torch
model, tokenizer = _load(Path({str(tiny_model_dir)!r})), load_tokenizer({str(tiny_model_dir)!r})
export_model(model, tokenizer, Path({str(tmp_path / "out")!r}), dtype=torch.float32, end_token="<|im_end|>")
print("deepspeed" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == ["False"]


def test_the_end_token_is_among_those_that_stop_generation(tiny_model_dir: Path, tmp_path: Path) -> None:
    """D04."""
    tokenizer = load_tokenizer(str(tiny_model_dir))
    export_model(_load(tiny_model_dir), tokenizer, tmp_path / "out", dtype=torch.bfloat16, end_token="<|im_end|>")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert generation["eos_token_id"] == ends
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config.get("use_cache", True) is True
    assert load_tokenizer(str(tmp_path / "out")).chat_template == tokenizer.chat_template


def test_a_cast_that_overflows_is_refused_and_leaves_no_folder(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = _load(tiny_model_dir)
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    with pytest.raises(ModelError, match=r"norm\.weight: holds values that torch\.float16 cannot"):
        export_model(model, load_tokenizer(str(tiny_model_dir)), tmp_path / "out", dtype=torch.float16, end_token=None)
    assert list(tmp_path.iterdir()) == []


def test_lora_merged_equals_the_adapter_on_its_base(tiny_model_dir: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    peft_model = add_lora(_load(tiny_model_dir), LoraSection(rank=4), seed=0)
    trainable = [name for name, p in peft_model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 7 * 2
    assert not any("lm_head" in name or "embed" in name for name in trainable)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    live = _logits(peft_model)
    export_adapter(peft_model, load_tokenizer(str(tiny_model_dir)), tmp_path / "adapter")
    torch.testing.assert_close(_logits(merged(peft_model)), live, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(_logits(peft_model), live, rtol=0, atol=0)  # merging worked on a copy
    again = PeftModel.from_pretrained(_reload(tiny_model_dir), tmp_path / "adapter")
    torch.testing.assert_close(_logits(again), live, rtol=1e-5, atol=1e-5)


def test_lora_targets_that_match_nothing_are_named(tiny_model_dir: Path) -> None:
    """A10."""
    with pytest.raises(ModelError, match="W_pack match no linear module of the model"):
        add_lora(_load(tiny_model_dir), LoraSection(target_modules=("q_proj", "W_pack")), seed=0)
    with pytest.raises(ModelError, match="lm_head is the output layer"):  # it would stay untrained without a word
        add_lora(_load(tiny_model_dir), LoraSection(target_modules=("q_proj", "lm_head")), seed=0)


def test_rows_longer_than_the_model_are_refused(tiny_model_dir: Path) -> None:
    section = ModelSection(path=str(tiny_model_dir))
    config = load_config(section)
    check_max_seq_len(section, config, 256)
    with pytest.raises(ModelError, match="257 is above the 256 positions"):
        check_max_seq_len(section, config, 257)
