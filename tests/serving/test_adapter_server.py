"""Adapters over HTTP: every answer is held against PEFT's merged model in float32 (known faults W03, W08, W09, Z06)."""

import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from raylm.config import GenerateConfig
from raylm.errors import ServingError
from raylm.inference.chat import chat_in_terminal
from raylm.inference.generate import run_generation
from raylm.merging import run_merge
from tests.serving.adapter_support import build_adapter, greedy, is_greedy, merged_model, replace_adapter
from tests.serving.servers import KEY, Running, free_port, server_process
from tests.tiny import build_tiny_model

BASE = "tiny-llama"
TOKENS = 12
COMMON = [3 + (17 * number) % 250 for number in range(150)]
"""A prompt of four blocks and more, the same for all."""
Answer = tuple[list[int], list[float]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with room for long answers."""
    folder = tmp_path_factory.mktemp("base") / BASE
    return build_tiny_model(folder, hidden_size=128, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("one", "two", "three", "one-v2", "one-v3"), start=1):
        options = {"r": 3, "use_rslora": True} if name == "two" else {}
        build_adapter(folder / name, base, seed=seed, **options)
    return folder


@pytest.fixture(scope="module")
def expected(base: Path, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Answer]:
    """What the merged model answers, and the base for None."""

    @cache
    def answer(name: str | None) -> Answer:
        return greedy(merged_model(base, made / name if name else None), COMMON, TOKENS)

    return answer


@contextmanager
def running(log: Path, *options: str, **environment: str) -> Iterator[Running]:
    """A server in a process of its own, stopped by ctrl-c."""
    log.with_suffix(".key").write_text(KEY + "\n")
    settings = [f"port={free_port()}", f"api_key_file={log.with_suffix('.key')}", "kv_cache_gib=0.2", "dtype=float32"]
    settings += ["engine.block_size=32", "engine.enable_prompt_tokens_details=true", *options]
    with server_process(settings, log, variables=environment) as server:
        yield server


def make_root(folder: Path, made: Path, *names: str) -> Path:
    import shutil

    for name in names:
        shutil.copytree(made / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def root(made: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters that can be served, and two that cannot."""
    folder = make_root(tmp_path_factory.mktemp("root") / "adapters", made, "one", "two", "three")
    build_adapter(folder / "wide", base, seed=9, r=12)
    build_adapter(folder / "dora", base, seed=9, use_dora=True)
    return folder


@pytest.fixture(scope="module")
def server(base: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("server") / "log"
    options = (f"model={base}", f"adapters={root}", "max_adapters=2", "max_adapter_rank=8", "proxy=haproxy")
    with running(log, *options, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as found:
        yield found


def ask(server: Running, model: str, prompt: list[int] = COMMON, count: int = TOKENS) -> tuple[Answer, Any]:
    request = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "logprobs": 1}
    response = server.get("/v1/completions", "POST", json={**request, "ignore_eos": True, "return_token_ids": True})
    assert response.status_code == 200, response.text
    body = response.json()
    [choice] = body["choices"]
    return (choice["token_ids"], choice["logprobs"]["token_logprobs"]), body


def agree(found: Answer, wanted: Answer) -> bool:
    return found[0] == wanted[0] and found[1] == pytest.approx(wanted[1], abs=2e-3)


def row_of(server: Running, name: str) -> dict[str, Any]:
    [row] = [row for row in server.get("/v1/adapters").json()["data"] if row["name"] == name]
    return dict(row)


def test_the_adapters_change_the_answers(expected: Callable[..., Answer]) -> None:
    """Or all that follows would prove nothing."""
    assert len({tuple(expected(name)[0]) for name in (None, "one", "two", "three", "one-v2", "one-v3")}) == 6


def test_an_adapter_answers_as_the_merged_model(
    server: Running, made: Path, base: Path, expected: Callable[..., Answer], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        for model in (f"{BASE}:{name}", name):
            found, body = ask(server, model)
            assert agree(found, expected(name)), (found, expected(name))
            assert body["model"] == model  # what was asked
        assert agree(ask(server, BASE)[0], expected(None))
    run_merge(made / "one", tmp_path / "merged", str(base))
    assert agree(ask(server, "one")[0], greedy(merged_model(tmp_path / "merged", None), COMMON, TOKENS))


def test_base_and_adapters_share_a_batch(server: Running, expected: Callable[..., Answer]) -> None:
    names = [None, "one", "two"] * 4
    with ThreadPoolExecutor(len(names)) as threads:
        found = list(threads.map(lambda name: ask(server, f"{BASE}:{name}" if name else BASE)[0], names))
    assert all(agree(answer, expected(name)) for answer, name in zip(found, names, strict=True))


def test_the_lists_name_parent_version_and_reason(server: Running, root: Path) -> None:
    cards = {model["id"]: model for model in server.get("/v1/models").json()["data"]}
    assert list(cards) == [BASE, f"{BASE}:one", f"{BASE}:three", f"{BASE}:two"]
    assert {card["parent"] for card in cards.values()} == {None, BASE}
    assert cards[f"{BASE}:one"]["max_model_len"] == 2048
    listed = server.get("/v1/adapters").json()
    rows = {row["name"]: row for row in listed["data"]}
    assert list(rows) == ["dora", "one", "three", "two", "wide"]
    assert len(listed["replica"]) == 8
    assert cards[f"{BASE}:one"]["version"] == rows["one"]["version"]
    assert len({row["version"] for row in rows.values() if row["version"]}) == 3
    assert (rows["one"]["rank"], rows["one"]["id"]) == (4, f"{BASE}:one")
    assert "uses DoRA, which vLLM does not serve. Merge it" in rows["dora"]["error"]
    assert "rank 12 is above the 8" in rows["wide"]["error"]
    text = server.log.read_text()
    assert "adapter dora: uses DoRA" in text
    assert "adapter wide: its rank 12" in text


def test_the_least_recently_used_gives_way(server: Running, expected: Callable[..., Answer]) -> None:
    def held() -> list[str]:
        return [row["name"] for row in server.get("/v1/adapters").json()["data"] if row["loaded"]]

    for name in ("one", "two", "three"):
        ask(server, name)
    assert held() == ["three", "two"]
    assert agree(ask(server, "one")[0], expected("one"))
    assert held() == ["one", "three"]
    with ThreadPoolExecutor(9) as threads:  # three adapters at once in an engine that holds two
        names = ["one", "two", "three"] * 3
        found = list(threads.map(lambda name: ask(server, name)[0], names))
    assert all(agree(answer, expected(name)) for answer, name in zip(found, names, strict=True))


@pytest.mark.parametrize(
    ("model", "status", "message"),
    [
        ("dora", 400, "adapter dora: uses DoRA"),
        (f"{BASE}:wide", 400, "its rank 12 is above the 8 that the server was started with"),
        (f"{BASE}:nobody", 404, f"`{BASE}:nobody` does not exist. It is one of {BASE}, {BASE}:dora, {BASE}:one, "),
        ("other:one", 404, "does not exist"),
        (f"{BASE}:../one", 404, "does not exist"),
        ("../adapters/one", 404, "does not exist"),
        (f"{BASE}:", 404, "does not exist"),
        ("one/", 404, "does not exist"),
        ("one\0", 404, "does not exist"),
    ],
)
def test_what_is_not_served_is_said_with_the_reason(server: Running, model: str, status: int, message: str) -> None:
    """W09: a 4xx for it alone, whichever route is asked."""
    for path, body in (
        ("/v1/completions", {"prompt": "x", "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
        ("/tokenize", {"prompt": "x"}),
    ):
        response = server.get(path, "POST", json={"model": model, **body})
        assert response.status_code == status, response.text
        assert message in response.json()["error"]["message"]
    assert ask(server, "two")[1]["model"] == "two"


def test_a_reload_leaves_neither_weights_nor_blocks_of_the_old_version(
    server: Running, root: Path, made: Path, base: Path, expected: Callable[..., Answer]
) -> None:
    """W08: v2 under v1's name answers as a fresh server with v2, and who began on v1 ends on v1."""
    assert agree(ask(server, "one")[0], expected("one"))
    assert ask(server, f"{BASE}:one")[1]["usage"]["prompt_tokens_details"]["cached_tokens"] >= 128
    former = row_of(server, "one")["version"]
    count = 1200
    with ThreadPoolExecutor(2) as threads:
        long = threads.submit(ask, server, "one", COMMON, count)
        time.sleep(0.3)
        replace_adapter(root / "one", made / "one-v2")
        reload = server.get("/v1/adapters/one/reload", "POST")
        assert reload.status_code == 200, reload.text
        found, body = ask(server, "one")
        was_running = not long.done()
        started, _ = long.result()
    assert was_running, "the long answer ended too early to show anything"
    assert agree(found, expected("one-v2")), found
    assert not (body["usage"]["prompt_tokens_details"] or {}).get("cached_tokens")
    assert len(started[0]) == count
    assert is_greedy(merged_model(base, made / "one"), COMMON, started[0])
    assert reload.json()["version"] == row_of(server, "one")["version"] != former
    again, body = ask(server, "one")
    assert agree(again, expected("one-v2"))
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] >= 128


def test_new_files_are_served_within_a_second_without_a_reload(
    server: Running, root: Path, made: Path, expected: Callable[..., Answer]
) -> None:
    ask(server, "one")
    replace_adapter(root / "one", made / "one-v3")
    time.sleep(1.05)
    assert agree(ask(server, "one")[0], expected("one-v3"))


def test_an_adapter_is_loaded_and_dropped_by_hand(server: Running, root: Path) -> None:
    assert server.get("/v1/adapters/two", "PUT").json()["loaded"] is True
    assert server.get("/v1/adapters/two", "DELETE").json()["loaded"] is False
    assert server.get("/v1/adapters/two").json()["loaded"] is False
    assert server.get("/v1/adapters/two", "PUT").json()["loaded"] is True
    assert server.get("/v1/adapters/dora", "PUT").status_code == 400
    assert "uses DoRA" in server.get("/v1/adapters/dora/reload", "POST").json()["error"]["message"]
    for method, path in (("PUT", "nobody"), ("DELETE", "..%2Fone"), ("GET", "nobody"), ("POST", "nobody/reload")):
        assert server.get(f"/v1/adapters/{path}", method).status_code == 404


def test_every_adapter_route_needs_the_key_and_none_takes_a_path(server: Running, made: Path) -> None:
    """Z06; vLLM's own routes would load any folder, and are closed although its variable is set."""
    for method, path in (("GET", ""), ("GET", "/one"), ("PUT", "/one"), ("DELETE", "/one"), ("POST", "/one/reload")):
        assert server.get(f"/v1/adapters{path}", method, key=None).status_code == 401
    body = {"lora_name": "x", "lora_path": str(made / "three")}
    assert server.get("/v1/load_lora_adapter", "POST", json=body).status_code == 404
    assert server.get("/v1/unload_lora_adapter", "POST", json=body).status_code == 404


def test_usage_of_an_adapter_comes_once_at_the_end(server: Running) -> None:
    """W03 with an adapter."""
    request: dict[str, Any] = {"model": "two", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    chunks = list(
        server.client().chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    )
    assert [bool(chunk.usage) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert {chunk.model for chunk in chunks} == {"two"}
    assert not any(chunk.usage for chunk in server.client().chat.completions.create(**request, stream=True))


def test_the_terminal_talks_to_an_adapter(server: Running) -> None:
    def said(model: str | None) -> str:
        lines, out = iter(["why", "/quit"]), io.StringIO()
        chat_in_terminal(
            server.url, api_key=KEY, max_tokens=8, model=model, read=lambda _: next(lines), write=out.write
        )
        return out.getvalue()

    messages: Any = [{"role": "user", "content": "why"}]
    for model, asked in ((None, BASE), ("two", f"{BASE}:two")):
        request: dict[str, Any] = {"model": asked, "messages": messages, "temperature": 0, "max_tokens": 8}
        chunks = server.client().chat.completions.create(**request, stream=True)
        answer = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert said(model).startswith(f"{asked} at ")
        assert answer
        assert answer in said(model)
    with pytest.raises(ServingError, match="does not serve nobody"):
        said("nobody")


def test_metrics_tell_adapters_apart(server: Running) -> None:
    """Requests and tokens by adapter, and those of the model itself; vLLM's own are of all."""

    def counted() -> dict[tuple[str, str], float]:
        return {
            (sample.labels["adapter"], sample.labels.get("kind", sample.name)): sample.value
            for family in text_string_to_metric_families(server.get("/metrics").text)
            for sample in family.samples
            if sample.name.startswith("raylm_adapter_") and sample.name.endswith(("_total", "_count"))
        }

    before = Counter(counted())
    for model in ("two", f"{BASE}:two", BASE):
        ask(server, model)
    grown = Counter(counted()) - before
    assert "lora_requests_info" in server.get("/metrics").text
    requests = {adapter: count for (adapter, kind), count in grown.items() if kind == "raylm_adapter_requests_total"}
    assert requests == {"two": 2, "": 1}
    for latency in ("time_to_first_token", "time_per_output_token"):
        assert grown["two", f"raylm_adapter_{latency}_seconds_count"] == 2
    assert grown["two", "generated"] == 2 * grown["", "generated"] > 0
    assert grown["two", "prompt"] == 2 * grown["", "prompt"] > 0


# ---- with more than one replica, object storage, one adapter


@pytest.mark.slow
def test_every_replica_answers_with_the_version_that_a_reload_answered(
    base: Path, made: Path, expected: Callable[..., Answer], tmp_path: Path
) -> None:
    """W08 on two replicas: after the answer to a reload, whichever replica gave it, none serves the old version."""
    root = make_root(tmp_path / "root", made, "one")
    with running(tmp_path / "log", f"model={base}", f"adapters={root}", "num_replicas=2") as server:

        def many(wanted: str) -> set[str]:
            with ThreadPoolExecutor(8) as threads:
                found = list(threads.map(lambda _: ask(server, "one")[0], range(24)))
            assert all(agree(answer, expected(wanted)) for answer in found)
            listed = [server.get("/v1/adapters").json() for _ in range(16)]
            assert len({answer["data"][0]["version"] for answer in listed}) == 1
            assert all(answer["data"][0]["loaded"] for answer in listed)
            return {answer["replica"] for answer in listed}

        seen: set[str] = set()
        while len(seen) < 2:  # the front door hears of a replica that is ready after the server does
            seen.add(server.get("/v1/adapters").json()["replica"])
        time.sleep(3)
        assert many("one") == seen
        for version in ("one-v2", "one-v3", "one", "one-v2"):
            with ThreadPoolExecutor(8) as threads:  # both replicas have just looked at the files
                list(threads.map(lambda _: ask(server, "one"), range(16)))
            replace_adapter(root / "one", made / version)
            assert server.get("/v1/adapters/one/reload", "POST").status_code == 200
            assert many(version) == seen


@pytest.mark.slow
def test_a_bucket_of_adapters_behind_the_python_proxy(
    base: Path, made: Path, expected: Callable[..., Answer], tmp_path: Path, bucket: Any
) -> None:
    def upload(source: str, name: str) -> None:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            bucket.upload_file(str(made / source / file), f"adapters/{name}/{file}")

    upload("one", "one")
    upload("two", "two")
    options = (f"model={base}", "adapters=s3://data/adapters", "proxy=python")
    with running(tmp_path / "log", *options) as server:
        assert agree(ask(server, "one")[0], expected("one"))
        assert agree(ask(server, "two")[0], expected("two"))
        upload("one-v2", "one")
        assert server.get("/v1/adapters/one/reload", "POST").status_code == 200
        assert agree(ask(server, "one")[0], expected("one-v2"))
        upload("three", "one")
        time.sleep(5.1)
        assert agree(ask(server, "one")[0], expected("three"))
        assert server.get("/v1/adapters/nobody", "PUT").status_code == 404


@pytest.mark.slow
def test_one_adapter_is_there_from_the_start(
    base: Path, made: Path, expected: Callable[..., Answer], tmp_path: Path
) -> None:
    with running(tmp_path / "log", f"model={base}", f"adapter={made / 'one'}") as server:
        assert row_of(server, "one")["loaded"] is True
        assert agree(ask(server, f"{BASE}:one")[0], expected("one"))
        assert agree(ask(server, BASE)[0], expected(None))


@pytest.mark.slow
def test_generation_answers_with_an_adapter(base: Path, made: Path, tmp_path: Path, ray_cluster: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}  # the second is the model's
    questions = ("why", "the answer")
    answers: dict[str | None, list[str]] = {}
    for name in (None, "one"):
        out, adapter = tmp_path / f"{name}.jsonl", {"adapter": str(made / name)} if name else {}
        settings: dict[str, Any] = {"model": str(base), "prompts": questions, "output": str(out), "max_tokens": 12}
        run_generation(GenerateConfig.model_validate({**settings, "dtype": "float32", **adapter}))
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        answers[name] = [row["answer"].replace("\ufffd", "") for row in rows]
        model = merged_model(base, made / name if name else None)
        for question, answer in zip(questions, answers[name], strict=True):
            messages = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            wanted = list(takewhile(lambda token: token not in ends, greedy(model, prompt, 12)[0]))
            assert answer == tokenizer.decode(wanted).replace("\ufffd", "")
    assert "333" in answers[None][0]
    assert not set(answers[None]) & set(answers["one"])
