"""`raylm speculate bench`: what is asked, what follows from the figures, and a whole measurement."""

from pathlib import Path
from typing import Any

import httpx
import pytest

import raylm
from raylm.config.serving import ServeConfig
from raylm.errors import ConfigError, DataError
from raylm.inference.acceptance import Acceptance
from raylm.serving.speculation_bench import (
    BenchResult,
    BenchRow,
    as_json,
    closed_to_others,
    edit_tasks,
    read_tasks,
    table_lines,
    take,
)
from tests.serving.servers import free_port


def test_edit_tasks_differ_and_are_the_same_each_time() -> None:
    tasks = edit_tasks(20)
    assert tasks == edit_tasks(20)
    assert tasks != edit_tasks(20, seed=1)
    texts = [task[0]["content"] for task in tasks]
    assert len(set(texts)) == 20
    assert all(len(text.split()) > 40 for text in texts)


def test_rows_of_a_dataset_ask_up_to_their_last_user_message(write_dataset: Any) -> None:
    path = write_dataset([("hello", "yes")])
    assert read_tasks([str(path)]) == [[{"role": "user", "content": "hello"}]]
    with pytest.raises(DataError, match="absent"):
        read_tasks([str(path.with_name("absent.json"))])


def test_tasks_come_again_where_there_are_too_few() -> None:
    assert take(["a", "b"], 5) == ["a", "b", "a", "b", "a"]  # type: ignore[list-item,comparison-overlap]


def row(concurrency: int, speed_up: float, *, same: float = 1.0) -> BenchRow:
    found = Acceptance(drafts=10, draft_tokens=40, accepted_tokens=25, per_position=(10, 8, 5, 2))
    return BenchRow(concurrency, 100.0, 100.0 * speed_up, speed_up, same, found)


@pytest.mark.parametrize(
    ("speed_ups", "expected"),
    [
        ((2.0, 1.3, 1.1), None),
        ((2.0, 1.3, 0.6), 16),
        ((2.0, 0.6, 0.4), 1),
        ((1.0, 0.96, 0.95), None),
        ((0.9, 0.8), None),
    ],
)
def test_the_limit_is_the_last_that_does_not_lose(speed_ups: tuple[float, ...], expected: int | None) -> None:
    result = BenchResult("m", "ngram", tuple(map(row, (1, 16, 64), speed_ups)))
    assert result.off_above == expected
    assert result.always_loses == (speed_ups[0] < 0.95)
    text = "\n".join(table_lines(result))
    assert (f"speculation.off_above={expected}" in text) == (expected is not None)
    assert ("without speculation" in text) == result.always_loses


def test_the_table_has_acceptance_by_position() -> None:
    result = BenchResult("m", "ngram", (row(1, 2.5, same=0.9),))
    lines = table_lines(result)
    assert lines[1].split() == ["1", "100.0", "250.0", "2.50", "62%", "3.50", "1.00", "0.80", "0.50", "0.20"]
    assert lines[2].startswith("10% of the answers differ: near-ties")
    assert as_json(result)["rows"][0]["acceptance_per_position"] == [1.0, 0.8, 0.5, 0.2]


def test_without_speculation_there_is_nothing_to_measure() -> None:
    with pytest.raises(ConfigError, match="is not set, so there is nothing to measure"):
        raylm.bench_speculation("m")


@pytest.mark.slow
def test_both_servers_are_measured_and_what_is_refused_is_said(ray_cluster: Any, served_model_dir: Path) -> None:
    speculation = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "off_above": 2}
    given = {"model": str(served_model_dir), "port": free_port(), "dtype": "float32", "kv_cache_gib": 0.1}
    given |= {"proxy": "python", "speculation": speculation}
    tasks = [[{"role": "user", "content": f"say it {n} and {n} and {n}"}] for n in range(12)]

    from raylm.config import ServeConfig, load_config
    from raylm.serving.speculation_bench import measure_load, run_bench

    config = load_config(ServeConfig, given)
    result = run_bench(config, tasks, concurrencies=(1, 8), max_tokens=24)
    assert [row.concurrency for row in result.rows] == [1, 8]
    assert all(row.same_answers == 1.0 for row in result.rows)
    one, many = (row.acceptance for row in result.rows)
    assert one.accepted_tokens > 0
    assert len(one.per_position) == 4
    assert sum(one.per_position) == one.accepted_tokens
    assert many.draft_tokens < one.draft_tokens  # only when two or one of the requests were left
    with raylm.serve(config) as server:
        body = {"model": server.model, "messages": tasks[0], "max_tokens": 4}
        for refused in ({"min_p": 0.1, "temperature": 1}, {"logit_bias": {"5": 3}}):
            answer = httpx.post(f"{server.url}/v1/chat/completions", json={**body, **refused}, trust_env=False)
            assert answer.status_code == 400
            assert "not yet supported with speculative decoding" in answer.json()["error"]["message"]
        metrics = httpx.get(f"{server.url}/metrics", trust_env=False).text
        assert "vllm:spec_decode_num_accepted_tokens_per_pos_total" in metrics
        assert measure_load(server.url, server.model, tasks, concurrency=2, max_tokens=8).tokens > 0


def test_a_bench_leaves_the_door_and_the_page_out() -> None:
    config = ServeConfig.model_validate(
        {
            "model": "m",
            "num_replicas": 2,
            "max_model_len": 64,
            "api_key_file": "key",
            "chat_page": True,
            "limits": {"requests_per_minute": 1},
            "tls_cert_file": "c",
            "tls_key_file": "k",
        }
    )
    assert closed_to_others(config) == ServeConfig(model="m", max_model_len=64)
