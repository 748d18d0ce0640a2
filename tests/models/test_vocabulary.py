"""Models with more rows: which change, what the new ones are, and that transformers and vLLM load the folder."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import raylm
from raylm.errors import ConfigError, DataError, ModelError, RaylmError
from raylm.models.vocabulary import extend_rows, new_rows, num_rows_needed
from tests.tiny import build_tiny_model, build_tokenizer

TEXTS = ["the whales sing to other whales, and the smaller whales listen.", "every whale has a song."]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("".join(f"{text}\n" for text in TEXTS * 9))
    return path


def _extend(base: Path, target: Path, **options: Any) -> Any:
    return raylm.extend_vocabulary({"model": str(base), "output": str(target), **options})


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_are_the_mean_of_what_their_text_was_and_all_else_is_the_same(
    tmp_path: Path, corpus: Path, tied: bool, dtype: torch.dtype
) -> None:
    base, output = build_tiny_model(tmp_path / "base", tie_word_embeddings=tied), tmp_path / "out"
    AutoModelForCausalLM.from_pretrained(base).to(dtype).save_pretrained(base)
    result = _extend(base, output, corpus=str(corpus), size=20, special=["<|act|>"], tokens=["blowhole"])
    before, after = _weights(base), _weights(output)
    assert before.keys() == after.keys()
    assert (HEAD in after) is not tied
    rows = before[EMBEDDING].shape[0]
    assert (result.rows_before, result.rows, result.first_new_id) == (rows, rows + 22, rows)
    old, new = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(output)
    assert len(new) == rows + 22
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name][: len(tensor)], tensor), name
        assert name in (EMBEDDING, HEAD) or len(after[name]) == len(tensor)
    checked = 0
    for number in range(rows, rows + 22):
        text = new.decode([number])
        parts = old.encode(text, add_special_tokens=False)  # the same alone as in the corpus, for most
        if new.encode(text, add_special_tokens=False) != [number]:
            continue
        for name in {EMBEDDING, HEAD} & after.keys():
            expected = sum(before[name][part].double() for part in parts) / len(parts)
            torch.testing.assert_close(
                after[name][number].double(), expected, atol=1e-7 if dtype == torch.float32 else 1e-2, rtol=1e-5
            )
        checked += 1
    assert checked >= 15
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == rows + 22
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert new_rows(model.config) == range(rows, rows + 22)


@torch.no_grad()
def test_a_text_without_new_pieces_has_the_same_logits_for_the_old_tokens(tmp_path: Path, corpus: Path) -> None:
    base, output = build_tiny_model(tmp_path / "base"), tmp_path / "out"
    _extend(base, output, corpus=str(corpus), size=10)
    ids = torch.tensor([AutoTokenizer.from_pretrained(output).encode("hello world")])
    old, new = (AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits for folder in (base, output))
    torch.testing.assert_close(new[..., : old.shape[-1]], old, rtol=0, atol=1e-6)


def test_the_bias_of_an_output_layer_is_extended_alike() -> None:
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    model = PhiForCausalLM(
        PhiConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    torch.nn.init.normal_(model.lm_head.bias)
    weight, bias = model.lm_head.weight.clone(), model.lm_head.bias.clone()
    extend_rows(model, {20: (3, 5), 21: (7,)}, num_rows=22)
    assert torch.equal(model.lm_head.weight[:20], weight)
    assert torch.equal(model.lm_head.bias[:20], bias)
    torch.testing.assert_close(model.lm_head.bias[20:], torch.stack([(bias[3] + bias[5]) / 2, bias[7]]))
    torch.testing.assert_close(model.lm_head.weight[20:], torch.stack([(weight[3] + weight[5]) / 2, weight[7]]))


def test_rows_that_a_model_has_to_spare_are_used_first(tmp_path: Path) -> None:
    tokens = len(build_tokenizer())
    base, output = build_tiny_model(tmp_path / "base", vocab_size=tokens + 4), tmp_path / "out"
    result = _extend(base, output, special=["<|act|>", "<|obs|>"])
    assert (result.rows, result.first_new_id) == (tokens + 4, tokens)
    before, after = _weights(base)[EMBEDDING], _weights(output)[EMBEDDING]
    assert torch.equal(after[:tokens], before[:tokens])
    assert torch.equal(after[tokens + 2 :], before[tokens + 2 :])
    parts = AutoTokenizer.from_pretrained(base).encode("<|obs|>")
    torch.testing.assert_close(after[tokens + 1], before[parts].mean(0))


def test_a_multiple_is_filled_with_pieces_so_no_row_is_without_a_token(tmp_path: Path, corpus: Path) -> None:
    base, output = build_tiny_model(tmp_path / "base"), tmp_path / "out"
    rows = len(build_tokenizer())
    asked = {"corpus": str(corpus), "pad_to_multiple_of": 16, "min_frequency": 2, "special": ["<|act|>"]}
    result = _extend(base, output, size=5, **asked)
    assert result.rows == num_rows_needed(rows, rows + 6, 16) == rows + 1 + result.pieces
    assert result.pieces > 5
    tokenizer, model = AutoTokenizer.from_pretrained(output), AutoModelForCausalLM.from_pretrained(output)
    assert len(tokenizer) == model.config.vocab_size == model.lm_head.weight.shape[0] == result.rows
    torch.manual_seed(0)
    sampled = model.generate(
        torch.tensor([[5]]), do_sample=True, temperature=1e4, top_k=0, num_return_sequences=32, max_new_tokens=60
    )
    assert sampled.max() == result.rows - 1  # so hot that any row comes
    assert None not in tokenizer.convert_ids_to_tokens(sampled.flatten().tolist())
    with pytest.raises(
        DataError, match=r"corpus: holds \d+ pieces .*, \d+ are needed for \d+ rows.*or set size=(\d+)"
    ) as found:
        _extend(base, tmp_path / "more", size=500, **asked)
    advised = int(found.value.remedy.rstrip(".").rpartition("=")[2])
    assert _extend(base, tmp_path / "more", **{**asked, "size": advised}).pieces == advised


@torch.no_grad()
def test_no_logit_is_without_a_token(tmp_path: Path, corpus: Path) -> None:
    base, output = build_tiny_model(tmp_path / "base"), tmp_path / "out"
    _extend(base, output, corpus=str(corpus), size=5, pad_to_multiple_of=16, min_frequency=2)
    logits = AutoModelForCausalLM.from_pretrained(output)(input_ids=torch.tensor([[5, 9]])).logits
    assert logits.shape[-1] == len(AutoTokenizer.from_pretrained(output))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({}, ConfigError, "give a corpus to learn pieces from, tokens, or special tokens"),
        ({"size": 3, "tokens": ["x y"]}, ConfigError, "corpus and size go together"),
        ({"tokens": ["ab", "ab"]}, ConfigError, "token 'ab' is given twice"),
        ({"tokens": ["ab "]}, ConfigError, "token 'ab ' is empty, or begins or ends with white space"),
        ({"tokens": [""]}, ConfigError, "token '' is empty"),
        ({"tokens": ["hello"]}, DataError, "is in the vocabulary of .* already"),
        ({"corpus": "absent.txt", "size": 3}, DataError, "absent.txt: there is no such file"),
        ({"corpus": "CORPUS", "size": 3, "min_frequency": 10**6}, DataError, "holds 0 pieces that save 1000000 tokens"),
        ({"special": ["<|a|>"], "pad_to_multiple_of": 1000}, ConfigError, "a row without a token could be sampled"),
        ({"special": ["<|a|>"], "model": "./absent"}, ModelError, "there is no such file or folder"),
        ({"special": ["<|a|>"], "output": "OCCUPIED"}, ModelError, "exists and is not an empty folder"),
    ],
)
def test_faults_are_found_before_weights_load(
    tiny_model_dir: Path,
    tmp_path: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    kind: type[RaylmError],
    message: str,
) -> None:
    monkeypatch.setattr("raylm.vocabulary.load_as_stored", lambda section: pytest.fail("weights were loaded"))
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "file").touch()
    places = {"CORPUS": str(corpus), "OCCUPIED": str(tmp_path / "occupied")}
    given = {key: places.get(value, value) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(kind, match=message):
        _extend(tiny_model_dir, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_an_adapter_and_a_quantised_model_are_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    base = build_tiny_model(tmp_path / "base")
    tree = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**tree, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ModelError, match="is quantised"):
        _extend(base, tmp_path / "out", special=["<|a|>"])
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter"):
        _extend(base, tmp_path / "out", special=["<|a|>"])


def test_the_folder_is_whole_or_absent_and_keeps_what_lay_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, output = build_tiny_model(tmp_path / "base"), tmp_path / "out"
    (base / "LICENSE.txt").write_text("free")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "max_length": 77}))
    output.mkdir()  # an empty folder may be there
    with monkeypatch.context() as patched:
        patched.setattr("raylm.data.vocabulary.load_tokenizer", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _extend(base, output, special=["<|act|>"])
    assert list(output.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}
    _extend(base, output, special=["<|act|>"])
    assert (output / "LICENSE.txt").read_text() == "free"
    assert json.loads((output / "generation_config.json").read_text())["max_length"] == 77
    assert AutoTokenizer.from_pretrained(output).chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert not list(output.glob("*.bin"))


def test_a_second_extension_adds_to_the_new_rows(tmp_path: Path, corpus: Path) -> None:
    base = build_tiny_model(tmp_path / "base")
    one = _extend(base, tmp_path / "one", special=["<|act|>"])
    two = _extend(tmp_path / "one", tmp_path / "two", corpus=str(corpus), size=8)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "two").config
    assert new_rows(config) == range(one.first_new_id, two.rows)


def test_the_command_line(tmp_path: Path, corpus: Path) -> None:
    base, listed = build_tiny_model(tmp_path / "base"), tmp_path / "tokens.txt"
    listed.write_text("blowhole\ndeep sea\n")
    command = [sys.executable, "-m", "raylm.cli", "vocab", "extend", str(base), "--json", "--output"]
    options = ["--corpus", str(corpus), "--size", "7", "--min-frequency", "3", "--tokens", str(listed)]
    done = subprocess.run(
        [*command, str(tmp_path / "out"), *options, "--special", "<|act|>", "<|obs|>"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["tokens"], result["pieces"], result["rows"] - result["rows_before"]) == (4, 7, 11)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens(list(range(result["first_new_id"], result["first_new_id"] + 4))) == [
        "<|act|>",
        "<|obs|>",
        "blowhole",
        "deep sea",
    ]
    again = subprocess.run([*command, str(tmp_path / "out"), "--special", "<|x|>"], capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'out'}: exists and is not an empty folder.")


def test_vllm_loads_the_folder_and_samples_tokens_only(tmp_path: Path, corpus: Path) -> None:
    base, output = build_tiny_model(tmp_path / "base", hidden_size=128), tmp_path / "out"
    _extend(base, output, corpus=str(corpus), size=20, special=["<|act|>"])
    code = f"""
import json
from vllm import LLM, SamplingParams
engine = LLM(model={str(output)!r}, dtype="float32", max_model_len=128, enforce_eager=True, disable_log_stats=True)
hot = SamplingParams(max_tokens=100, temperature=2.0, seed=0, ignore_eos=True, n=8)
best = SamplingParams(max_tokens=8, temperature=0.0)
sampled = [list(o.token_ids) for o in engine.generate([{TEXTS[0]!r}], hot, use_tqdm=False)[0].outputs]
greedy = engine.generate([{TEXTS[0]!r}], best, use_tqdm=False)[0]
print("RESULT" + json.dumps([sampled, greedy.prompt_token_ids, list(greedy.outputs[0].token_ids)]))
"""
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    assert line is not None, done.stderr[-3000:]
    sampled, prompt, greedy = json.loads(line.removeprefix("RESULT"))
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert prompt == tokenizer.encode(TEXTS[0])
    flat = [number for ids in sampled for number in ids]
    assert max(flat) >= len(build_tokenizer())
    assert max(flat) < len(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(output)
    expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)[0, len(prompt) :].tolist()
    assert greedy[: len(expected)] == expected
