"""Runs vLLM engines one after the other and answers requests with each: JSON in, JSON out.

    python engines.py JOBS.json ANSWERS.json

A job is {"name", "engine": arguments of vllm.LLM, "rounds": [{"prompts": [[id, …], …], "sampling": {…}}]}; every
round of it is answered by the same engine. An answer holds the token ids, the log-probabilities where they were asked
for, and vLLM's counters of speculation over the round. An engine that does not start, or a round that is refused, gives
the error instead. vLLM is imported once, and every engine has a forked process of its own: a third one in the same
process does not start.
"""

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

COUNTERS = {
    "drafts": "vllm:spec_decode_num_drafts",
    "draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "accepted_tokens": "vllm:spec_decode_num_accepted_tokens",
}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One engine, all its rounds."""
    from vllm import LLM

    options = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 2**26, "disable_log_stats": False}
    try:
        engine = LLM(**{**options, **job["engine"]})
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    rounds: list[Any] = []
    for given in job["rounds"]:
        rounds.append(answer(engine, **given))
        if "error" in rounds[-1] and engine.llm_engine.has_unfinished_requests():
            break  # a step has failed halfway: what it was at would be waited for, for ever
    return {"rounds": rounds}


def answer(engine: Any, prompts: list[list[int]], sampling: dict[str, Any], adapter: str | None = None) -> Any:
    """Ids, log-probabilities and counters of one round."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    if "structured_outputs" in sampling:
        sampling = {**sampling, "structured_outputs": StructuredOutputsParams(**sampling["structured_outputs"])}
    lora = {"lora_request": LoRARequest("adapter", 1, adapter)} if adapter else {}
    if "logit_bias" in sampling:
        sampling = {**sampling, "logit_bias": {int(token): bias for token, bias in sampling["logit_bias"].items()}}
    before = counters(engine)
    try:
        outputs = engine.generate(
            [{"prompt_token_ids": ids} for ids in prompts], SamplingParams(**sampling), use_tqdm=False, **lora
        )
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    answers = [output.outputs[0] for output in outputs]
    return {
        "ids": [list(found.token_ids) for found in answers],
        "logprobs": [
            None
            if found.logprobs is None
            else [{token: value.logprob for token, value in place.items()} for place in found.logprobs]
            for found in answers
        ],
        "counters": {name: value - before.get(name, 0) for name, value in counters(engine).items()},
    }


def counters(engine: Any) -> dict[str, int]:
    """vLLM's counters of speculation; empty without."""
    found = {metric.name: metric for metric in engine.get_metrics()}
    return {name: found[counter].value for name, counter in COUNTERS.items() if counter in found}


def main(jobs: Path, answers: Path) -> None:
    """Every job, in a process of its own."""
    import vllm  # noqa: F401  (the slow import, once)

    context = multiprocessing.get_context("fork")
    results = {}
    for job in json.loads(jobs.read_text()):
        with context.Pool(1) as pool:
            results[job["name"]] = pool.apply(run, (job,))
    answers.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
