"""Which adapters vLLM can serve, and what the others are told (known fault W09)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raylm.config import GenerateConfig
from raylm.config.serving import ServeArgs
from raylm.errors import ModelError
from raylm.inference.generate import run_generation
from raylm.models.adapter_files import check_folder
from raylm.serving.adapter_survey import resolve_adapters
from tests.serving.adapter_support import build_adapter, edit_config, only_pickle


def edit_tensors(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "adapter_model.safetensors")
        edit(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")

    return run


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
FIRST_B = FIRST.replace("lora_A", "lora_B")


def add(name: str, *shape: int) -> Callable[[Path], None]:
    import torch

    return edit_tensors(lambda tensors: tensors.update({name: torch.zeros(shape)}))


def narrow(tensors: dict[str, Any]) -> None:
    """Smaller than the base's: vLLM would copy it into a corner of its buffer."""
    tensors[FIRST] = tensors[FIRST][:, :64]


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


REFUSED = [
    ("dora", edit_config(use_dora=True), "uses DoRA.*raylm adapter merge"),
    ("saved", edit_config(modules_to_save=["lm_head"]), "holds whole modules.*raylm adapter merge"),
    ("rows", edit_config(trainable_token_indices=[320, 321]), "holds rows of new tokens.*raylm adapter merge"),
    ("bias", edit_config(bias="lora_only"), r"has biases \(bias=lora_only\).*raylm adapter merge"),
    ("lora-bias", edit_config(lora_bias=True), r"has biases \(lora_bias\)"),
    ("pissa", edit_config(init_lora_weights="pissa"), "init_lora_weights=pissa changed the base's weights"),
    ("kind", edit_config(peft_type="LOHA"), "is of PEFT type LOHA"),
    ("embedding", add("base_model.model.model.embed_tokens.weight", 320, 128), "holds .*embed_tokens.weight, which"),
    ("head", add("base_model.model.lm_head.lora_A.weight", 4, 128), "one of the two matrices of lm_head"),
    ("deeper", add(FIRST.replace("layers.0", "layers.7"), 4, 128), "one of the two matrices of model.layers.7"),
    ("narrow", edit_tensors(narrow), "was made for a model.layers.0.self_attn.q_proj of 128 x 64, the base's is 128 x"),
    ("empty", add(FIRST, 0), r"shapes \(0,\) and"),
    ("half", edit_tensors(lambda tensors: tensors.pop(FIRST_B)), "has one of the two matrices of model.layers.0"),
    ("rank", edit_config(r=8), "have the ranks 4 and 4, adapter_config.json says 8"),
    ("huge", edit_config(r=1024, rank_pattern={".*": 4}), None),  # the pattern holds for all modules
    ("pickle", only_pickle, "pickle format only.*Save it as safetensors"),
    ("torn", truncate, "is not a whole safetensors file"),
    ("config", lambda folder: (folder / "adapter_config.json").write_text("[]"), "is not a JSON object"),
]


@pytest.mark.parametrize(("edit", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_vllm_cannot_serve_is_refused_with_the_remedy(
    two_versions: Path, served_model_dir: Path, tmp_path: Path, edit: Callable[[Path], None], message: str | None
) -> None:
    folder = shutil.copytree(two_versions / "v1", tmp_path / "a")
    assert check_folder(str(folder), str(served_model_dir)) == 4
    edit(folder)
    if message is None:
        assert check_folder(str(folder), str(served_model_dir)) == 4
        return
    with pytest.raises(ModelError, match=message):
        check_folder(str(folder), str(served_model_dir))
    with pytest.raises(ModelError, match=message):  # the whole server, before anything starts
        resolve_adapters(ServeArgs(model=str(served_model_dir), adapter=str(folder)))
    with pytest.raises(ModelError, match=message):
        run_generation(
            GenerateConfig(
                model=str(served_model_dir), adapter=str(folder), prompts=("x",), output=str(tmp_path / "out.jsonl")
            )
        )


@pytest.mark.parametrize("key", ["use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", "layer_replication"])
def test_vllm_refuses_the_same_features_but_when_it_loads(two_versions: Path, key: str) -> None:
    """Our table stands in for vLLM's check, which needs an engine: when vLLM learns one, this fails."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    config = json.loads((two_versions / "v1" / "adapter_config.json").read_text())
    PEFTHelper.from_dict(config).validate_legal(LoRAConfig(max_lora_rank=16))
    with pytest.raises(ValueError, match="support"):
        PEFTHelper.from_dict({**config, key: [1]}).validate_legal(LoRAConfig(max_lora_rank=16))


def test_an_adapter_of_another_base_is_refused(served_model_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = build_adapter(tmp_path / "small", tiny_model_dir, seed=1)
    with pytest.raises(ModelError, match=f"of 32 x 64, the base's is 128 x 64. .*{tiny_model_dir}"):
        check_folder(str(folder), str(served_model_dir))


def test_an_adapter_of_the_output_layer_is_refused(two_versions: Path, served_model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(two_versions / "v1", tmp_path / "head")
    add("base_model.model.lm_head.lora_A.weight", 4, 128)(folder)
    add("base_model.model.lm_head.lora_B.weight", 320, 4)(folder)
    with pytest.raises(ModelError, match="adapts lm_head, which is no linear module of the base, or its output layer"):
        check_folder(str(folder), str(served_model_dir))


def test_ranks_and_patterns_of_peft_are_understood(served_model_dir: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"layers.0.mlp.up_proj": 3}}
    folder = build_adapter(tmp_path / "p", served_model_dir, seed=1, use_rslora=True, **options)
    assert check_folder(str(folder), str(served_model_dir)) == 9
