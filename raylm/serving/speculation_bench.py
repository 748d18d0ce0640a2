"""`raylm speculate bench`: what speculation is worth for a model, by the number of requests at a time.

Two servers, one after the other, as `raylm serve` starts them: without and with the configured speculation. Both get
the same requests, with the likeliest token each time, so that the answers are the same and only the time differs.
"""

import asyncio
import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raylm.config.serving import ServeConfig
from raylm.errors import ConfigError, DataError, ServingError
from raylm.inference.acceptance import Acceptance

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]
_REQUEST_TIMEOUT_S = 600.0
_TEXTS = (
    "The old lighthouse stood at the end of the harbour wall, where the wind never rested. Every evening the keeper "
    "climbed the narrow stairs with a lamp in one hand and a loaf of bread in the other. He liked to watch the fishing "
    "boats come home, and he knew each of them by the sound of its engine long before he could see its sails.",
    "Rivers carry more than water to the sea. They move sand, clay and small stones, and in times of flood they take "
    "whole trees along. Where the current becomes slow, this load sinks to the bottom, and over many years new land "
    "grows there. Farmers have always valued such land, because it is flat, rich and easy to work.",
    "Bread needs only flour, water, salt and time. The flour is mixed with water first and left alone for an hour, so "
    "that it can swell. Then salt and a little yeast are added, and the dough is folded several times. It should rest "
    "in a cool place overnight, and in the morning it is baked in a very hot oven until the crust is dark.",
    "The city library opened its new reading room last spring. It has tall windows, wooden tables and a lamp at every "
    "seat. Visitors may bring their own books, but most of them come for the newspapers, which hang on long sticks "
    "beside the door. On cold days every chair is taken before noon, and nobody speaks above a whisper.",
    "A good knife is the first tool of every cook. It should lie well in the hand, and its blade must be kept sharp, "
    "because a dull one slips and is dangerous. After use it is washed at once and dried with a cloth. It never goes "
    "into a drawer with other tools, where the edge would touch metal and lose its bite within a week.",
    "Swallows return to the same barn each year in the last days of April. They repair the nest with mud from the pond "
    "and line it with feathers and straw. Four or five eggs are laid, and both parents feed the young from dawn until "
    "dark. By the end of summer the family gathers on the wires, and one morning all of them are gone.",
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One load on one server. answers: the texts, in the order of the requests."""

    tokens: int
    seconds: float
    answers: tuple[str, ...]
    acceptance: Acceptance

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all answers together, a second."""
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One number of requests at a time. same_answers: share of the answers that were equal with and without."""

    concurrency: int
    without: float
    """Tokens a second without speculation."""
    tokens_per_second: float
    speed_up: float
    same_answers: float
    acceptance: Acceptance


@dataclass(frozen=True, slots=True)
class BenchResult:
    """All rows, by concurrency."""

    model: str
    method: str
    rows: tuple[BenchRow, ...]

    @property
    def off_above(self) -> int | None:
        """The largest concurrency below the first that lost more than a twentieth; None when none lost."""
        best = None
        for row in self.rows:
            if row.speed_up < 0.95:
                return best
            best = row.concurrency
        return None

    @property
    def always_loses(self) -> bool:
        """True when even the smallest concurrency lost."""
        return self.rows[0].speed_up < 0.95


def edit_tasks(count: int, *, seed: int = 0) -> list[Messages]:
    """Requests to copy a paragraph and correct its spelling: the work that n-gram speculation is made for."""
    draw = random.Random(seed)
    tasks: list[Messages] = []
    for number in range(count):
        words = _TEXTS[number % len(_TEXTS)].split()
        first = draw.randrange(len(words) // 3)
        words = words[first:] + words[:first]
        for place in draw.sample([place for place, word in enumerate(words) if len(word) > 4], 5):
            word = words[place]
            at = draw.randrange(1, len(word) - 2)
            words[place] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        text = " ".join(words)
        request = f"Correct the spelling of this text. Repeat the whole text and change nothing else:\n\n{text}"
        tasks.append([{"role": "user", "content": request}])
    return tasks


def read_tasks(files: Sequence[str]) -> list[Messages]:
    """Rows of datasets in any format as requests: each conversation up to its last user message. Raises DataError."""
    from raylm.config.data import DataSection
    from raylm.data.rows import iterate_rows

    tasks = []
    for found in iterate_rows(DataSection.model_validate({"train": list(files)}).train, {}):
        if found.row is None:
            raise DataError(found.where, found.problem)
        row = found.row
        if row.kind in ("text", "text2text"):
            messages = [{"role": "user", "content": row.value if row.kind == "text" else row.value[0]}]
        elif row.kind in ("conversation", "preference", "kto"):
            messages = list(row.value["messages" if row.kind == "conversation" else "prompt"])
        else:
            raise DataError(found.where, f"is a row of kind {row.kind}, which asks nothing.")
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise DataError(found.where, "holds nothing to answer.")
        tasks.append(messages)
    return tasks


def run_bench(
    config: ServeConfig, tasks: Sequence[Messages], *, concurrencies: Sequence[int], max_tokens: int
) -> BenchResult:
    """Measures both servers, each of one replica, with twice as many tasks as run at a time.

    Raises ConfigError without `speculation`, and what `serve` raises.
    """
    if config.speculation is None:
        raise ConfigError("speculation", "is not set, so there is nothing to measure.", "Set speculation.method=ngram")
    if not tasks:
        raise ConfigError("data", "holds nothing to ask.", "Give another file, or leave it out.")
    import os

    from raylm.ray_session import ray_session

    concurrencies = sorted(set(concurrencies))
    alone = closed_to_others(config)
    with ray_session(config.cluster_address, num_cpus=os.cpu_count() or 1):
        plain = _measure_server(
            alone.model_copy(update={"speculation": None}),
            tasks,
            concurrencies,
            max_tokens=max_tokens,
        )
        guessed = _measure_server(alone, tasks, concurrencies, max_tokens=max_tokens)
    rows = tuple(_row(count, *pair) for count, *pair in zip(concurrencies, plain, guessed, strict=True))
    return BenchResult(config.model, config.speculation.method, rows)


def closed_to_others(config: ServeConfig) -> ServeConfig:
    """The engine's part of a configuration, for one replica on loopback that only this process asks: keys and limits
    would slow or refuse the load, and a page or a certificate is nothing to measure."""
    from raylm.config.limits import LimitsSection

    changes = {
        "num_replicas": 1,
        "host": "127.0.0.1",
        "api_key_file": None,
        "limits": LimitsSection(),
        "chat_page": False,
        "tls_cert_file": None,
        "tls_key_file": None,
    }
    return config.model_copy(update=changes)


def _row(concurrency: int, plain: Measured, guessed: Measured) -> BenchRow:
    same = sum(a == b for a, b in zip(plain.answers, guessed.answers, strict=True))
    return BenchRow(
        concurrency=concurrency,
        without=plain.tokens_per_second,
        tokens_per_second=guessed.tokens_per_second,
        speed_up=guessed.tokens_per_second / plain.tokens_per_second,
        same_answers=same / len(plain.answers),
        acceptance=guessed.acceptance,
    )


def _measure_server(
    config: ServeConfig, tasks: Sequence[Messages], concurrencies: Sequence[int], *, max_tokens: int
) -> list[Measured]:
    from raylm.serving.api_key import read_api_key
    from raylm.serving.endpoint import serve

    key = read_api_key(config.api_key_file)
    with serve(config) as server:
        options: dict[str, Any] = {"max_tokens": max_tokens, "api_key": key}
        measure_load(server.url, server.model, take(tasks, 2), concurrency=2, **options)
        found = []
        for concurrency in concurrencies:
            asked = take(tasks, max(2 * concurrency, 4))
            found.append(measure_load(server.url, server.model, asked, concurrency=concurrency, **options))
            logger.info("%d at a time: %.0f tokens/s", concurrency, found[-1].tokens_per_second)
    return found


def take(tasks: Sequence[Messages], count: int) -> list[Messages]:
    """The first `count` tasks, from the beginning again where there are fewer."""
    return [tasks[number % len(tasks)] for number in range(count)]


def measure_load(
    url: str,
    model: str,
    tasks: Sequence[Messages],
    *,
    concurrency: int,
    max_tokens: int,
    api_key: str | None = None,
) -> Measured:
    """Asks all tasks, `concurrency` at a time, and reads what speculation did meanwhile from /metrics.

    url: `http://HOST:PORT` of a server that nobody else asks. Raises ServingError when it refuses.
    """
    return asyncio.run(_measure(url, model, tasks, concurrency, max_tokens, api_key))


async def _measure(
    url: str, model: str, tasks: Sequence[Messages], concurrency: int, max_tokens: int, api_key: str | None
) -> Measured:
    import httpx

    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    waiting = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(headers=headers, limits=limits, timeout=_REQUEST_TIMEOUT_S, trust_env=False) as client:

        async def ask(messages: Messages) -> tuple[str, int]:
            body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
            async with waiting:
                response = await client.post(f"{url}/v1/chat/completions", json=body)
            if response.status_code != 200:
                raise ServingError(url, f"answered {response.status_code}: {_reason(response.text)}")
            answer = response.json()
            return answer["choices"][0]["message"]["content"] or "", answer["usage"]["completion_tokens"]

        before = Acceptance.from_text((await client.get(f"{url}/metrics")).text)
        started = time.perf_counter()
        answers = await asyncio.gather(*map(ask, tasks))
        seconds = time.perf_counter() - started
        after = Acceptance.from_text((await client.get(f"{url}/metrics")).text)
    return Measured(
        tokens=sum(tokens for _, tokens in answers),
        seconds=seconds,
        answers=tuple(text for text, _ in answers),
        acceptance=after.since(before),
    )


def _reason(body: str) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200]


def table_lines(result: BenchResult) -> list[str]:
    """The table for a terminal, and what follows from it."""
    lines = ["at a time  without  with      speed-up  accepted  length  by position"]
    for row in result.rows:
        found = row.acceptance
        rate = "-" if found.rate is None else f"{found.rate:.0%}"
        length = "-" if found.mean_length is None else f"{found.mean_length:.2f}"
        places = " ".join(f"{share:.2f}" for share in found.rate_per_position)
        lines.append(
            f"{row.concurrency:>9}  {row.without:>7.1f}  {row.tokens_per_second:>7.1f}  {row.speed_up:>9.2f}  "
            f"{rate:>8}  {length:>6}  {places}"
        )
    different = [row for row in result.rows if row.same_answers < 1]
    if different:
        share = min(row.same_answers for row in different)
        lines.append(f"{1 - share:.0%} of the answers differ: near-ties (docs/speculative-decoding.md)")
    if result.always_loses:
        lines.append("it loses at every number of requests: serve without speculation")
    elif result.off_above is not None:
        lines.append(f"it loses above: speculation.off_above={result.off_above}")
    return lines


def as_json(result: BenchResult) -> dict[str, Any]:
    """The same for machines."""
    return {
        "model": result.model,
        "method": result.method,
        "off_above": result.off_above,
        "rows": [
            {
                "concurrency": row.concurrency,
                "tokens_per_second_without": round(row.without, 2),
                "tokens_per_second": round(row.tokens_per_second, 2),
                "speed_up": round(row.speed_up, 3),
                "same_answers": round(row.same_answers, 4),
                **row.acceptance.as_json(),
            }
            for row in result.rows
        ],
    }
