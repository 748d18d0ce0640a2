"""The chat page as its users meet it: over HTTP behind HAProxy and the Python proxy, and in a real browser.

One server with a key for the whole module, in a process of its own; the page behind the Python proxy asks that server.
"""

import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client
from openai import OpenAI

from raylm.config.serving import ChatPageArgs, ServeConfig
from raylm.serving.chat_page import PAGE_NAME, ROUTE_PREFIX, build_page_app
from raylm.serving.proxy import front_door
from tests.serving.browser import Page, browser_page, find_browser
from tests.serving.servers import free_port, program_process
from tests.tiny import build_tiny_model

KEY = "page-s3cret-" + "k" * 24
SECRET = "a sentence that is only said here"
# Nearly as many as the model can: seconds of work.
LONG = {"max_tokens": "1800"}
PROGRAM = """
import logging, sys
from raylm.config import ServeConfig, load_config
from raylm.serving import serve

logging.basicConfig(level=logging.INFO)
with serve(load_config(ServeConfig, {}, sys.argv[1:])) as server:
    print(server.url, server.chat_page, flush=True)
    server.wait()
"""


@dataclass
class Running:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    ray_dir: Path
    log: Path

    @property
    def page(self) -> str:
        return self.url + ROUTE_PREFIX

    def running_requests(self) -> float:
        """Requests the engine works on now."""
        headers = {"authorization": f"Bearer {KEY}"}
        metrics = httpx.get(f"{self.url}/metrics", headers=headers, trust_env=False, timeout=30).text
        lines = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running")]
        assert lines
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def wait_for(self, busy: bool) -> None:
        deadline = time.monotonic() + 20
        while (self.running_requests() > 0) != busy:
            assert time.monotonic() < deadline, f"the engine is {'not ' if busy else ''}busy"
            time.sleep(0.05)

    def answer(self, messages: list[dict[str, str]], **options: Any) -> str:
        """What the API says, greedily."""
        client = OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)
        request: Any = {"model": "tiny-llama", "messages": messages, "temperature": 0, **options}
        return client.chat.completions.create(**request).choices[0].message.content or ""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("page")
    model = build_tiny_model(folder / "tiny-llama", hidden_size=128, max_position_embeddings=2048)
    (folder / "key").write_text(KEY + "\n")
    options = [f"model={model}", f"port={free_port()}", f"api_key_file={folder / 'key'}", "proxy=haproxy"]
    options += ["kv_cache_gib=0.1", "chat_page=true"]
    with program_process(PROGRAM, options, folder / "log") as (process, (url, page), ray_dir):
        assert page == url + "/chat/"
        yield Running(process, url=url, ray_dir=ray_dir, log=folder / "log")


class Tab:
    """A browser's session over plain HTTP: what Gradio's front end sends, without the front end."""

    def __init__(self, page: str) -> None:
        self.page, self.session = page, uuid.uuid4().hex
        self.http = httpx.Client(base_url=f"{page}/", trust_env=False, timeout=60)
        self.config = self.http.get("config").json()

    def number(self, element: str, event: str) -> int:
        """The event of an element, as the page's configuration numbers it."""
        parts = [part["id"] for part in self.config["components"] if part["props"].get("elem_id") == element]
        found = [
            entry["id"]
            for entry in self.config["dependencies"]
            if [parts[0], event] in entry["targets"] and entry["backend_fn"]
        ]
        return int(found[0])

    def start(self, element: str, event: str, data: list[Any], about: Any = None) -> str:
        body = {"data": data, "fn_index": self.number(element, event), "session_hash": self.session}
        body |= {"event_data": about, "simple_format": True}
        answer = self.http.post("gradio_api/queue/join", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["event_id"])

    def steps(self) -> Iterator[list[Any]]:
        """The outputs of the event that was started, step by step."""
        with self.http.stream("GET", "gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("msg") in ("process_generating", "process_completed"):
                    assert message["success"], message
                    yield message["output"]["data"]
                if message.get("msg") == "process_completed":
                    return

    def run(self, element: str, event: str, data: list[Any], about: Any = None) -> list[Any]:
        """The outputs of an event's last step."""
        self.start(element, event, data, about)
        return list(self.steps())[-1]


def settings(key: str = KEY, **changed: str) -> list[str]:
    names = {"key": key, "model": "tiny-llama", "system": "", "temperature": "0", "top_p": "", "max_tokens": "24"}
    return list((names | {"seed": "", "stop": ""} | changed).values())


def turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}], "metadata": None, "options": None}


def texts(messages: list[dict[str, Any]]) -> list[str]:
    return [message["content"][0]["text"] for message in messages]


def test_the_page_loads_without_the_key_and_knows_nothing_of_it(server: Running) -> None:
    with httpx.Client(trust_env=False, follow_redirects=True, timeout=30) as http:
        page = http.get(server.page)
        assert (page.status_code, page.url.path) == (200, "/chat/")
        assert "script-src 'self' 'nonce-" in page.headers["content-security-policy"]
        assert KEY not in page.text
        found = set(http.get(f"{server.page}/config").json())
        assert "components" in found
        assert http.get(f"{server.page}/theme.css").status_code == 200
        assert http.post(f"{server.page}/gradio_api/upload").status_code == 404
        assert http.get(f"{server.page}/gradio_api/file=/etc/passwd").status_code == 404
        foreign = {"origin": "http://evil.example", "content-type": "application/json"}
        assert http.post(f"{server.page}/gradio_api/queue/join", headers=foreign, json={}).status_code == 403
        assert http.get(f"{server.url}/v1/models").status_code == 401  # the API is as closed as it was


def test_a_streamed_answer_is_the_greedy_answer_of_the_api(server: Running) -> None:
    """With Gradio's own client, which follows a stream as the page does."""
    client = Client(f"{server.page}/", verbose=False, analytics_enabled=False)
    asked = [turn("user", "hello"), turn("assistant", "yes")]
    job = client.submit("who are you?", asked, *settings(system="Be kind."), api_name="/chat")
    job.result(timeout=60)
    expected = server.answer(
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "who are you?"},
        ],
        max_tokens=24,
    )
    shown = [texts(step[1]) for step in job.outputs()]
    assert len(expected) > 12
    assert shown[0] == ["hello", "yes", "who are you?"]  # the question is there before the answer begins
    assert shown[-1] == ["hello", "yes", "who are you?", expected]
    answers = [step[3] for step in shown if len(step) == 4]
    assert all(expected.startswith(answer) for answer in answers)


def test_models_are_listed_with_the_key_alone(server: Running) -> None:
    tab = Tab(server.page)
    model, key_field, sidebar, notice = tab.run("refresh", "click", [KEY, None])
    assert (model["choices"], model["value"], notice) == ([["tiny-llama", "tiny-llama"]], "tiny-llama", "")
    assert key_field.get("visible") is None
    model, key_field, sidebar, notice = tab.run("refresh", "click", ["", None])
    assert "choices" not in model
    assert (key_field["visible"], sidebar["open"]) == (True, True)
    assert "asks for an API key" in notice


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"key": ""}, "valid API key"),
        ({"key": "wrong"}, "valid API key"),
        ({"model": "other"}, "does not serve this"),
        ({"max_tokens": "9000"}, "refused the request"),
        ({"temperature": "-1"}, "refused the request"),
        ({"temperature": "hot"}, "Temperature is no number: hot"),
        ({"seed": "1.5"}, "Seed is no whole number"),
    ],
)
def test_an_error_is_a_message_and_the_conversation_stays(server: Running, changed: dict[str, str], said: str) -> None:
    before = [turn("user", "hello"), turn("assistant", "yes")]
    text, messages, notice = Tab(server.page).run("message", "submit", ["again", before, *settings(**changed)])
    assert said in notice.replace("\\", "")
    assert messages == before
    assert (text["value"], text["submit_btn"]) == ("again", True)


def test_stop_strings_end_an_answer(server: Running) -> None:
    whole = server.answer([{"role": "user", "content": "hello"}], max_tokens=24)
    pairs = (whole[at : at + 2] for at in range(1, len(whole) - 1))
    end = next(pair for pair in pairs if whole.index(pair) > 0)  # there is something before it
    shown = Tab(server.page).run("message", "submit", ["hello", [], *settings(stop=f"{end}\n")])[1]
    assert texts(shown) == ["hello", whole[: whole.index(end)]]


def test_retry_edit_and_undo(server: Running) -> None:
    tab = Tab(server.page)
    talk = [turn("user", "hello"), turn("assistant", "one"), turn("user", "world"), turn("assistant", "two")]
    first = server.answer([{"role": "user", "content": "hello"}], max_tokens=24)
    edited = server.answer([{"role": "user", "content": "the answer"}], max_tokens=24)
    shown = tab.run("chat", "retry", [talk, *settings()], {"index": 1, "value": "one"})[1]
    assert texts(shown) == ["hello", first]
    about = {"index": 0, "value": "the answer", "previous_value": "hello"}
    assert texts(tab.run("chat", "edit", [talk, *settings()], about)[1]) == ["the answer", edited]
    text, shown, _ = tab.run("chat", "undo", [talk], {"index": 3, "value": "two"})
    assert (text["value"], texts(shown)) == ("world", ["hello", "one"])
    # A retry that fails leaves the old answer where it was.
    _, shown, notice = tab.run("chat", "retry", [talk, *settings("wrong")], {"index": 3, "value": "two"})
    assert (texts(shown), bool(notice)) == (["hello", "one", "world", "two"], True)


def test_sessions_are_apart(server: Running) -> None:
    """Two tabs at once: each gets its own answer, and nothing that is kept leads from one to the other."""
    one, two = Tab(server.page), Tab(server.page)
    one.start("message", "submit", [SECRET, [], *settings()])
    two.start("message", "submit", ["hello", [], *settings()])
    seen = {"one": str(list(one.steps())), "two": str(list(two.steps()))}
    assert SECRET in seen["one"]
    assert SECRET not in seen["two"]
    third = Tab(server.page)
    for tab in (two, third):
        assert SECRET not in str(tab.run("refresh", "click", [KEY, None]))
        assert SECRET not in json.dumps(tab.http.get("config").json())
    assert SECRET not in third.http.get("").text
    link = third.http.get("gradio_api/deep_link", params={"session_hash": one.session})
    assert link.status_code == 404


def test_stop_ends_the_request_in_the_engine(server: Running) -> None:
    tab = Tab(server.page)
    event = tab.start("message", "submit", ["hello", [], *settings(**LONG)])
    steps = tab.steps()
    while len(next(steps)[1]) < 2:
        pass
    server.wait_for(busy=True)
    body = {"session_hash": tab.session, "fn_index": tab.number("message", "submit"), "event_id": event}
    assert tab.http.post("gradio_api/cancel", json=body).status_code == 200
    server.wait_for(busy=False)


def test_a_closed_tab_ends_the_request_in_the_engine(server: Running) -> None:
    tab = Tab(server.page)
    tab.start("message", "submit", ["hello", [], *settings(**LONG)])
    for step in tab.steps():  # leaving the loop closes the connection
        if len(step[1]) == 2:
            break
    tab.http.close()
    server.wait_for(busy=False)


def test_behind_the_python_proxy(server: Running, ray_cluster: Any) -> None:
    """The same application under another proxy, here asking a server elsewhere; `/chat` with and without slash."""
    from ray import serve

    config = ServeConfig(model="none", port=free_port(), proxy="python")
    with front_door(config, num_nodes=1) as door:
        assert door.proxy == "python"
        page = f"http://127.0.0.1:{door.port}{ROUTE_PREFIX}"
        try:
            serve.run(build_page_app(ChatPageArgs(base_url=server.url)), name=PAGE_NAME, route_prefix=ROUTE_PREFIX)
            loaded = httpx.get(page, trust_env=False, follow_redirects=True, timeout=30)
            assert (loaded.status_code, loaded.url.path) == (200, "/chat/")
            script = loaded.text.split('src="./assets/')[1].split('"')[0]
            assert httpx.get(f"{page}/assets/{script}", trust_env=False).status_code == 200
            tab = Tab(page)
            tab.start("message", "submit", ["hello", [], *settings()])
            steps = [texts(step[1]) for step in tab.steps()]
            assert steps[0] == ["hello"]
            assert steps[-1][1] == server.answer([{"role": "user", "content": "hello"}], max_tokens=24)
            tab.start("message", "submit", ["hello", [], *settings(**LONG)])
            for step in tab.steps():
                if len(step[1]) == 2:
                    break
            tab.http.close()
            server.wait_for(busy=False)
        finally:
            serve.delete(PAGE_NAME)


HOSTILE = """Look:
<script>window.ran = "script"</script>
<img src="x" onerror="window.ran = 'onerror'">
![picture](http://127.0.0.1:9/leak.png?what=secret)
<iframe src="http://127.0.0.1:9/frame"></iframe>
<form action="http://127.0.0.1:9/form"><input name="key"></form>
<svg onload="window.ran = 'svg'"></svg> <a href="javascript:window.ran='link'">link</a>
<div style="position:fixed;inset:0;z-index:9999;background:red">cover</div>
"""


@pytest.fixture
def browser() -> Iterator[Page]:
    binary = find_browser()
    if binary is None:
        pytest.skip("no Chromium or Chrome on this machine")
    with browser_page(binary) as page:
        yield page


@pytest.mark.slow
def test_in_a_browser(server: Running, browser: Page, tmp_path: Path) -> None:
    """A visit: the key, a streamed answer, stop, history over a reload, dark mode, and hostile answers.

    Screenshots go to RAYLM_SCREENSHOTS, if set.
    """
    shots = Path(os.environ.get("RAYLM_SCREENSHOTS", tmp_path))
    field, chat = "#message textarea", "document.querySelector('#chat').innerText"
    browser.open(server.page)
    browser.wait("document.querySelector('#notice').innerText.includes('asks for an API key')")
    browser.screenshot(shots / "key.png")
    browser.type("#key input", KEY, enter=True)
    browser.wait("document.querySelector('#model input').value === 'tiny-llama'")
    browser.type("#temperature input, #temperature textarea", "0")
    browser.type("#max-tokens input, #max-tokens textarea", "24")

    browser.type(field, "hello", enter=True)
    browser.wait("!!document.querySelector('#conversations label')")  # saved: the answer is complete
    expected = server.answer([{"role": "user", "content": "hello"}], max_tokens=24)
    stored = json.loads(browser.run("localStorage.getItem('raylm-chat:/chat/')"))
    assert texts(stored[0]["messages"]) == ["hello", expected]
    browser.screenshot(shots / "answer.png")

    browser.run("document.querySelector('#max-tokens input, #max-tokens textarea').select()")
    browser.type("#max-tokens input, #max-tokens textarea", LONG["max_tokens"])
    browser.type(field, "more", enter=True)
    browser.wait("!!document.querySelector('#message .stop-button')")
    server.wait_for(busy=True)
    browser.click("#message .stop-button")
    server.wait_for(busy=False)
    browser.wait("!!document.querySelector('#message .submit-button')")
    browser.click("#new-chat")
    browser.wait(f"!{chat}.includes('more')")
    browser.click("#conversations label")
    browser.wait(f"{chat}.includes('more')")

    assert not browser.run("document.body.classList.contains('dark')")
    browser.click("#dark")
    assert browser.run("document.body.classList.contains('dark')")
    browser.screenshot(shots / "dark.png")

    assert not browser.complaints
    hostile = [{"id": "h", "title": "hostile", "messages": [turn("user", "attack"), turn("assistant", HOSTILE)]}]
    browser.run(f"localStorage.setItem('raylm-chat:/chat/', {json.dumps(json.dumps(hostile + stored))})")
    browser.open(server.page)
    browser.wait("document.querySelectorAll('#conversations label').length === 2")
    browser.wait("document.body.classList.contains('dark')")
    time.sleep(2)  # the page is there before each of its events is
    browser.click("#conversations label")
    browser.wait(f"{chat}.includes('cover')")
    time.sleep(1)
    browser.screenshot(shots / "hostile.png")
    assert browser.run("window.ran === undefined")
    assert browser.run(f"{chat}.includes('<script>')")  # shown as what it is
    assert browser.run("document.querySelectorAll('#chat iframe, #chat form, #chat .message img').length") == 0
    # What covers the page is cut off at the edge of its message: the field can still be reached.
    assert (
        browser.run(
            "(() => { const b = document.querySelector('#message textarea').getBoundingClientRect();"
            "return document.elementFromPoint(b.x + 20, b.y + 20).tagName; })()"
        )
        == "TEXTAREA"
    )
    # Nothing was asked of anyone but this server, and only the page's own part of it.
    own = (f"{server.page}/", server.page, "data:", "blob:")
    assert not [url for url in browser.requested if not url.startswith(own)]
    assert KEY not in browser.run("JSON.stringify(localStorage)")


def test_the_key_and_what_was_said_are_in_no_file(server: Running) -> None:
    """Known fault Z01. Stops the module's server, so it is the last test that uses it."""
    server.process.send_signal(signal.SIGINT)
    server.process.wait(timeout=60)
    files = [file for file in [server.log, *server.ray_dir.rglob("*")] if file.is_file()]
    assert len(files) > 10
    for file in files:
        content = file.read_bytes()
        assert KEY.encode() not in content, file
        assert SECRET.encode() not in content, file
