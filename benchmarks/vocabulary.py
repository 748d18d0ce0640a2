"""What learnt pieces save: tokens per character of text that was not learnt from, before and after.

    python benchmarks/vocabulary.py [--tokenizers FOLDER …] [--corpus FILE] [--other FILE] [--sizes 500 2000 …]

Every fifth row of the corpus is held out, and measured; the pieces are learnt from the other four. `other` is text of
another language, which should take about as many tokens as before. No special tokens are counted. RAYLM_SHARED, if set,
gives GPT-2's, Llama 2's and Phi-3's tokenizers and the Chinese and English Alpaca demo data of LLaMA-Factory; else a
tiny tokenizer and the example data stand in. The last line of stdout is one JSON object.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SHARED = Path(os.environ.get("RAYLM_SHARED", "/nonexistent"))


def _texts(path: Path) -> tuple[list[str], list[str]]:
    """Texts to learn from, and held-out ones."""
    from raylm.config.data import SourceSection
    from raylm.data.rows import iterate_rows
    from raylm.data.texts import row_texts

    parts: tuple[list[str], list[str]] = ([], [])
    for number, found in enumerate(iterate_rows([SourceSection(path=str(path))], {})):
        assert found.row is not None, found.problem
        parts[number % 5 == 4].extend(row_texts(found.row))
    return parts


def _rate(tokenizer: Any, texts: list[str]) -> float:
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return sum(len(encoding.ids) for encoding in encodings) / sum(map(len, texts))


def measure(folder: Path, corpus: Path, other: Path, size: int) -> dict[str, Any]:
    """One row of the table."""
    from raylm.data.tokenizer import load_tokenizer
    from raylm.data.vocabulary import VocabularyExtension

    learnt_from, held_out = _texts(corpus)
    elsewhere = [text for part in _texts(other) for text in part]
    tokenizer = load_tokenizer(str(folder))
    before, before_elsewhere = _rate(tokenizer, held_out), _rate(tokenizer, elsewhere)
    extension = VocabularyExtension(tokenizer, folder.name)
    started = time.perf_counter()
    extension.learn(learnt_from, min_frequency=5, limit=size)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as scratch:
        extension.save(Path(scratch))
        after_tokenizer = load_tokenizer(scratch)
    after = _rate(after_tokenizer, held_out)
    for text in held_out:
        ids = after_tokenizer.encode(text, add_special_tokens=False)
        assert after_tokenizer.decode(ids, skip_special_tokens=False) == text
    return {
        "tokenizer": folder.name,
        "pieces": extension.num_learnt,
        "before": round(before, 3),
        "after": round(after, 3),
        "ratio": round(after / before, 3),
        "other_ratio": round(_rate(after_tokenizer, elsewhere) / before_elsewhere, 3),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", nargs="+", type=Path)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--sizes", nargs="+", type=int, default=[500, 2000, 4000])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tokenizers, corpus, other = options.tokenizers, options.corpus, options.other
        if SHARED.is_dir():
            tokenizers = tokenizers or [SHARED / "tokenizers" / name for name in ("gpt2", "llama2", "phi3")]
            corpus = corpus or SHARED / "llamafactory-demo" / "alpaca_zh_demo.json"
            other = other or SHARED / "llamafactory-demo" / "alpaca_en_demo.json"
        if not tokenizers:
            from tests.tiny import build_tokenizer

            tokenizers = [Path(scratch) / "tiny"]
            build_tokenizer().save_pretrained(tokenizers[0])
        corpus, other = (path or ROOT / "examples" / "data" / "identity.json" for path in (corpus, other))
        print(f"{'tokenizer':12}{'pieces':>8}{'before':>9}{'after':>8}{'ratio':>8}{'other':>8}{'learning':>10}")
        rows = []
        for folder in tokenizers:
            for size in options.sizes:
                row = measure(folder, corpus, other, size)
                rows.append(row)
                print(
                    f"{row['tokenizer']:12}{row['pieces']:8}{row['before']:9.3f}{row['after']:8.3f}{row['ratio']:8.3f}"
                    f"{row['other_ratio']:8.3f}{row['seconds']:8.1f} s"
                )
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
