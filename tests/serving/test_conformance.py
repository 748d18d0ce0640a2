"""Our server is what bare vLLM is: the same requests to both, and odd requests that must disturb nobody."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from raylm.config.serving import ServeArgs
from raylm.serving.app import replica_environment
from raylm.serving.engine_args import command_line
from tests.serving.comparison import Answer, answer_of, whole_texts
from tests.serving.request_table import MODEL, ODD_REQUESTS, REQUESTS, Request, completion
from tests.serving.servers import ENGINE, KEY, Running, bare_server

ALL = {**REQUESTS, **ODD_REQUESTS}
LIMITED = {"n that is huge"}  # by `limits`, which say so themselves


@pytest.fixture(scope="module")
def bare(served_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM's own server with the engine arguments and variables of ours."""
    args = ServeArgs(model=str(served_model_dir), name=MODEL, dtype="float32", kv_cache_gib=0.1, engine=ENGINE)
    words = command_line(args, str(served_model_dir), on_cpu=True, native_bf16=False)
    log = tmp_path_factory.mktemp("bare") / "log"
    with bare_server(words, replica_environment(args, on_cpu=True), log) as url:
        yield url


def send(url: str, request: Request, *, key: str | None = None, stream: bool = False) -> Answer:
    headers = {**({"authorization": f"Bearer {key}"} if key else {}), **request.headers}
    body = {**request.body, "stream": True} if stream else request.body
    content: dict[str, Any] = {} if body is None else {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = httpx.request(request.method, url + request.path, headers=headers, timeout=60, trust_env=False, **content)
    return answer_of(answer, shape_only=request.shape_only)


@pytest.mark.slow
def test_every_answer_is_that_of_bare_vllm(server: Running, bare: str) -> None:
    """Known faults W01, W02, W03, W05 and W14. All differences are shown at once."""
    differences = []
    for name, request in ALL.items():
        for stream in (False, True) if request.stream_too else (False,):
            expected, ours = send(bare, request, stream=stream), send(server.url, request, key=KEY, stream=stream)
            if (expected.status != ours.status) if name in LIMITED else (expected != ours):
                differences.append(f"{name}, stream={stream}:\n  bare {expected}\n  ours {ours}")
            if expected.status != request.status:
                differences.append(f"{name}, stream={stream}: bare {expected.status} {expected.body}")
    assert not differences, "\n".join(differences)
    assert len(REQUESTS) >= 60


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_of_the_table(server: Running, name: str) -> None:
    """Its status, the text it forces, and the same text in a stream."""
    request = REQUESTS[name]
    whole = send(server.url, request, key=KEY)
    assert whole.status == request.status, whole.body
    if request.text is not None:
        assert whole_texts(whole) == (request.text,)
    if request.stream_too:
        assert send(server.url, request, key=KEY, stream=True).texts == whole_texts(whole)
    if request.status >= 400:
        assert whole.media == "application/json"
        assert whole.body["error"]["code"] == request.status
        # Both numbers of known fault W05. vLLM leaves them out where the prompt is exactly as long as the context.
        message = "max_tokens must be at least 1" if name == "prompt as long as the context" else "256"
        assert message in whole.body["error"]["message"]


def test_odd_requests_get_their_4xx_and_disturb_no_stream(server: Running) -> None:
    normal = completion(max_tokens=120, allowed_token_ids=list(range(30, 90)))
    undisturbed = send(server.url, normal, key=KEY, stream=True).texts
    assert len(undisturbed[0]) > 20
    seen: list[tuple[str, ...]] = []
    done = threading.Event()

    def keep_streaming() -> None:
        while not done.is_set():
            seen.append(send(server.url, normal, key=KEY, stream=True).texts)

    thread = threading.Thread(target=keep_streaming)
    thread.start()
    wrong = {}
    try:
        for name, request in ODD_REQUESTS.items():
            answer = send(server.url, request, key=KEY)
            # `detail` is FastAPI's own, before any of vLLM's code: a wrong method, bytes that are no text.
            if answer.status != request.status or not {"error", "detail"} & answer.body.keys():
                wrong[name] = (answer.status, answer.body)
    finally:
        done.set()
        thread.join()
    assert not wrong
    assert len(ODD_REQUESTS) >= 30
    assert set(seen) == {undisturbed}
