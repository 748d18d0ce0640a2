from pathlib import Path

import pytest

from raylm.errors import ModelError
from raylm.models.folder import ModelLocation, as_folder, locate


def test_hub_ids_and_folders(tiny_model_dir: Path) -> None:
    assert locate("org/name") == ModelLocation("hub", "org/name")
    assert locate(str(tiny_model_dir)) == ModelLocation("folder", str(tiny_model_dir))
    assert as_folder(str(tiny_model_dir)) == str(tiny_model_dir)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("./absent", "there is no such file or folder"),
        ("/no/such/folder", "there is no such file or folder"),
        ("absent.gguf", "there is no such file or folder"),
        ("pkg://no_such_package/x.gguf", "no package 'no_such_package' is installed"),
        ("pkg://raylm/absent.gguf", "package raylm ships no file 'absent.gguf'"),
        ("pkg://raylm/../pyproject.toml", "ships no file"),
    ],
)
def test_paths_that_do_not_exist(path: str, problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        locate(path)


def test_a_run_that_does_not_exist_is_no_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"^runs/nope: there is no such file or folder\."):
        locate("runs/nope")
    (tmp_path / "org").mkdir()
    assert locate("org/name").kind == "hub"


@pytest.mark.parametrize("inside", ["export", "best/export"])
def test_the_folder_of_a_run_names_its_export(inside: str, tmp_path: Path) -> None:
    (tmp_path / inside).mkdir(parents=True)
    (tmp_path / inside / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=rf"has no config\.json.* Its model is {tmp_path}/{inside}\.$"):
        locate(str(tmp_path))


def test_folders_without_weights_or_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        locate(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no weights"):
        locate(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(ModelError, match="pickle format only"):
        locate(str(tmp_path))


def test_a_gguf_file_becomes_a_folder_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tiny GGUF made here; the real one is used by the quickstart."""
    import numpy as np
    from gguf import GGUFWriter

    file = tmp_path / "tiny.gguf"
    writer = GGUFWriter(str(file), "llama")
    for key, value in {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 64,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<unk>", "<s>", "</s>", *(chr(97 + i) for i in range(26))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *([1] * 26)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(tokens), 32),
        "output.weight": (len(tokens), 32),
        "output_norm.weight": (32,),
        "blk.0.attn_norm.weight": (32,),
        "blk.0.ffn_norm.weight": (32,),
        **{f"blk.0.attn_{part}.weight": (32, 32) for part in ("q", "k", "v", "output")},
        "blk.0.ffn_gate.weight": (64, 32),
        "blk.0.ffn_up.weight": (64, 32),
        "blk.0.ffn_down.weight": (32, 64),
    }
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = as_folder(str(file))
    from safetensors.torch import load_file

    weights = load_file(Path(folder) / "model.safetensors")
    np.testing.assert_allclose(
        weights["model.embed_tokens.weight"].float().numpy(), arrays["token_embd.weight"], rtol=1e-2
    )
    assert locate(folder).kind == "folder"
    assert as_folder(str(file)) == folder
