"""What the quickstart needs besides raylm: asking, scoring, and a table."""

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def ask_all(server: Any, identity: dict[str, Any], general: list[dict[str, Any]]) -> list[str]:
    """The answers of a served model to all identity questions, then all general ones, over HTTP."""
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")

    def ask(question: str) -> str:
        messages: Any = [{"role": "user", "content": question}]
        answer = client.chat.completions.create(model=server.model, messages=messages, temperature=0, max_tokens=48)
        return answer.choices[0].message.content or ""

    questions = identity["questions"] + [item["question"] for item in general]
    with ThreadPoolExecutor(max_workers=30) as pool:
        return list(pool.map(ask, questions))


def score(answers: list[str], identity: dict[str, Any], general: list[dict[str, Any]]) -> tuple[int, int]:
    """Identity answers that give name and maker, and general answers that hold a right word."""
    names = (identity["name"], identity["maker"])
    split = len(identity["questions"])
    told = sum(all(name in answer for name in names) for answer in answers[:split])
    right = sum(
        any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) for word in item["answers"])
        for answer, item in zip(answers[split:], general, strict=True)
    )
    return told, right


@dataclass
class Peak:
    """Most memory in use above what was in use at the start, in GiB."""

    peak_gib: float = 0.0


@contextmanager
def peak_memory(interval_s: float = 0.5) -> Iterator[Peak]:
    """Samples the memory in use on this machine for the length of the block."""
    import psutil

    def used() -> float:
        memory = psutil.virtual_memory()
        return float(memory.total - memory.available) / 2**30

    peak, start, stop = Peak(), used(), threading.Event()

    def sample() -> None:
        while not stop.wait(interval_s):
            peak.peak_gib = max(peak.peak_gib, used() - start)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def print_table(
    before: list[str],
    after: list[str],
    identity: dict[str, Any],
    general: list[dict[str, Any]],
    outcome: dict[str, Any],
    target: Path,
) -> None:
    """Questions with the answers before and after, the scores, and where everything lies."""
    from rich.console import Console
    from rich.table import Table

    table = Table("question", "before", "after", title="Answers through the served endpoint", show_lines=True)
    questions = identity["questions"] + [item["question"] for item in general]
    for question, old, new in zip(questions, before, after, strict=True):
        table.add_row(question, old.strip()[:110], new.strip()[:110])
    console = Console()
    console.print(table)
    console.print(
        f"Name and maker given: {outcome['before']}/{outcome['questions']} before, "
        f"{outcome['after']}/{outcome['questions']} after. "
        f"General questions still right: {outcome['kept']}/{outcome['general']}."
    )
    run_dir = target.parent
    console.print(f"model    {outcome['export_dir']}\ncurve    {run_dir / 'loss.png'}\nfigures  {target}")
    console.print(f"talk to it: .venv/bin/raylm chat {outcome['export_dir']}")
