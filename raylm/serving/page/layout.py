"""The page itself: Gradio's components and what happens on each event.

Each event carries all it needs (messages, settings, key) and nothing is kept between events, so there is no state in
which one session could see another's. The list of conversations lives in the browser alone (page.js).
"""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import gradio as gr

from raylm.serving.page.client import RequestFailed, ServerClient
from raylm.serving.page.messages import (
    REASONING,
    ChatMessage,
    as_request,
    last_user_turn,
    message,
    plain,
    read_messages,
    text_of,
)

_HERE = Path(__file__).parent
_FORGET_S = 2.0
_UPDATE_S = 0.05  # a page redrawn more often is no smoother, and costs the browser
_BUTTONS: dict[str, Any] = {"submit_btn": True, "stop_btn": False}
_BUSY: dict[str, Any] = {"submit_btn": False, "stop_btn": True}
# Shown as text in answers: what loads something, asks for something, or covers the page; and marks of reasoning.
_TAGS_AS_TEXT = [
    *("script", "style", "link", "meta", "base", "iframe", "frame", "frameset", "object", "embed", "portal"),
    *("template", "slot", "noscript", "title", "xmp", "plaintext", "img", "image", "picture", "source", "video"),
    *("audio", "track", "map", "area", "canvas", "form", "input", "textarea", "select", "option", "keygen", "dialog"),
    *("marquee", "bgsound", "think", "thinking", "tool_call"),
]

Settings = tuple[Any, ...]  # key, model, system, temperature, top_p, max_tokens, seed, stop: as the browser sent them


def script() -> str:
    return (_HERE / "page.js").read_text(encoding="utf-8")


def style() -> str:
    return (_HERE / "page.css").read_text(encoding="utf-8")


def mount(app: Any, client: ServerClient, title: str) -> None:
    """Puts the page at the root of a FastAPI app."""
    blocks = build_blocks(client, title)
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        theme=theme(),
        css=style(),
        footer_links=[],
        run_history=False,  # it would store the inputs of each event, the key among them, in the browser
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
    )
    queue = blocks._queue
    # Gradio looks for new events a thousand times a second, and for progress bars, which the page has none of, a
    # hundred times: a few percent of a core for an idle page.
    queue.sleep_when_free, queue.progress_update_sleep_when_free = 0.02, 1.0


def theme() -> Any:
    """Gradio's own look with the system's fonts: none is fetched."""
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gr.themes.Default(primary_hue="indigo", neutral_hue="slate", radius_size="lg", **fonts)


def build_blocks(client: ServerClient, title: str) -> Any:
    """Gradio's Blocks of the page; not started."""
    chat = Chat(client)
    with gr.Blocks(title=title, analytics_enabled=False, fill_height=True, fill_width=True) as blocks:
        with gr.Sidebar(width=270, elem_id="history"):
            fresh = gr.Button("New chat", elem_id="new-chat")
            conversations = gr.Radio([], label="Conversations", visible=False, container=False, elem_id="conversations")
            remove_all = gr.Button("Delete all", size="sm", visible=False, elem_id="delete-all")
        with gr.Column(elem_id="main"):
            with gr.Row(elem_id="bar"):
                gr.Markdown(f"### {plain(title)}", elem_id="title", latex_delimiters=[])
                model = gr.Dropdown(
                    [], label="Model", show_label=False, container=False, allow_custom_value=True, elem_id="model"
                )
                refresh = gr.Button("↻", elem_id="refresh", elem_classes="icon")
                dark = gr.Button("◐", elem_id="dark", elem_classes="icon")
                gear = gr.Button("⚙", elem_id="gear", elem_classes="icon")
            chatbot = gr.Chatbot(
                elem_id="chat",
                show_label=False,
                container=False,
                scale=1,
                height="100%",
                layout="bubble",
                editable="user",
                buttons=["copy"],
                feedback_options=None,
                sanitize_html=True,
                allow_tags=_TAGS_AS_TEXT,
                allow_file_downloads=False,
                placeholder="Ask something",
            )
            notice = gr.Markdown(elem_id="notice", latex_delimiters=[])
            text = gr.Textbox(
                show_label=False,
                container=False,
                placeholder="Message",
                autofocus=True,
                lines=1,
                max_lines=10,
                elem_id="message",
                **_BUTTONS,
            )
        with gr.Sidebar(position="right", open=False, width=300, elem_id="settings") as sidebar:
            key = gr.Textbox(
                label="API key",
                info="Kept in this page until it is closed or loaded again.",
                type="password",
                visible=False,
                elem_id="key",
            )
            system = gr.Textbox(label="System prompt", lines=4, max_lines=12, elem_id="system")
            gr.Markdown("Empty fields are left to the model.", elem_id="hint")
            with gr.Row():
                temperature = gr.Textbox(label="Temperature", min_width=90, elem_id="temperature")
                top_p = gr.Textbox(label="Top p", min_width=90, elem_id="top-p")
            with gr.Row():
                max_tokens = gr.Textbox(label="Max tokens", min_width=90, elem_id="max-tokens")
                seed = gr.Textbox(label="Seed", min_width=90, elem_id="seed")
            stop = gr.Textbox(
                label="Stop", info="Texts that end an answer, one a line.", lines=1, max_lines=4, elem_id="stop"
            )

        settings = [key, model, system, temperature, top_p, max_tokens, seed, stop]
        # Raw values: what a browser sends is read by our own code only, never turned into components or files.
        raw: dict[str, Any] = {"preprocess": False, "postprocess": False, "show_progress": "hidden"}
        private: dict[str, Any] = {**raw, "api_visibility": "private"}
        shown = [text, chatbot, notice]
        listed = [conversations, remove_all]
        answers: list[Any] = [
            text.submit(chat.send, [text, chatbot, *settings], shown, api_name="chat", concurrency_limit=None, **raw),
            chatbot.retry(chat.retry, [chatbot, *settings], shown, concurrency_limit=None, **private),
            chatbot.edit(chat.edit, [chatbot, *settings], shown, concurrency_limit=None, **private),
        ]
        for answer in answers:
            # It follows a stopped answer as well.
            answer.then(None, [chatbot], [*listed, text], **_js("[...raylmChat.save(m), raylmChat.idle()]", "m"))
        text.stop(None, cancels=answers)
        chatbot.undo(chat.undo, [chatbot], shown, **private).then(
            None, [chatbot], listed, **_js("raylmChat.save(m)", "m")
        )
        cleared = [*listed, chatbot, notice]
        chatbot.clear(None, None, cleared, **_js("raylmChat.remove()"), cancels=answers)
        fresh.click(None, [chatbot], cleared, **_js("raylmChat.fresh(m)", "m"), cancels=answers)
        remove_all.click(None, None, cleared, **_js("raylmChat.removeAll()"), cancels=answers)
        opened = [conversations, chatbot]
        conversations.input(None, opened, [chatbot, notice], **_js("raylmChat.open(id, m)", "id, m"), cancels=answers)
        dark.click(None, **_js("raylmChat.toggleTheme()"))
        gear.click(None, **_js("raylmChat.toggleSettings()"))
        found = [model, key, sidebar, notice]
        blocks.load(chat.connect, [key, model], found, api_name="models", **raw)
        blocks.load(None, None, listed, **_js("raylmChat.start()"))
        gr.on([refresh.click, key.submit, key.blur], chat.connect, [key, model], found, **private)
        blocks.unload(chat.leave)
    chat.blocks = blocks
    blocks.state_session_capacity = 200
    blocks.max_threads = 1000  # answers at a time; they are coroutines
    blocks.queue(api_open=False, max_size=1000, default_concurrency_limit=None)
    return blocks


def _js(expression: str, parameters: str = "") -> dict[str, Any]:
    """What makes an event run in the browser alone."""
    return {"js": f"({parameters}) => {expression}", "show_progress": "hidden", "api_visibility": "private"}


class Chat:
    """What the page's events do. Values come as the browser sent them, so each is read with care."""

    def __init__(self, client: ServerClient) -> None:
        self._client = client
        self.blocks: Any = None
        self._running: dict[str, set[asyncio.Task[Any]]] = {}

    async def connect(self, key: Any, model: Any, request: gr.Request) -> list[Any]:
        """The model list, the key field where the server asks for a key, and why there is no list."""
        self._forget_soon(request)
        try:
            names = await self._client.models(_text(key))
        except RequestFailed as failure:
            if failure.status == 401:
                hint = str(failure) if _text(key) else "This server asks for an API key. Enter it in the settings."
                return [gr.skip(), gr.update(visible=True), gr.update(open=True), _notice(hint)]
            return [gr.skip(), gr.skip(), gr.skip(), _notice(str(failure))]
        chosen = model if model in names else next(iter(names), None)
        return [gr.update(choices=[(name, name) for name in names], value=chosen), gr.skip(), gr.skip(), ""]

    async def send(
        self, text: Any, messages: Any, request: gr.Request, *settings: Any
    ) -> AsyncGenerator[list[Any], None]:
        """Answers `text`; where that fails, the text goes back into its field."""
        self._forget_soon(request)
        before = read_messages(messages)
        asked = [*before, message("user", _text(text))]
        if not _text(text).strip():
            yield [_update(**_BUTTONS), before, ""]
            return
        async with contextlib.aclosing(
            self._answer(asked, settings, request, before=before, text=_text(text))
        ) as steps:
            async for step in steps:
                yield step

    async def retry(
        self, messages: Any, data: gr.RetryData, request: gr.Request, *settings: Any
    ) -> AsyncGenerator[list[Any], None]:
        """Another answer to the message of the user at, or before, the one that was clicked."""
        self._forget_soon(request)
        before = read_messages(messages)
        index = last_user_turn(before, _index(data))
        if index is not None:
            async with contextlib.aclosing(
                self._answer(before[: index + 1], settings, request, before=before)
            ) as steps:
                async for step in steps:
                    yield step

    async def edit(
        self, messages: Any, data: gr.EditData, request: gr.Request, *settings: Any
    ) -> AsyncGenerator[list[Any], None]:
        """The message of the user with another text, and a new answer; what followed is dropped."""
        self._forget_soon(request)
        before = read_messages(messages)
        index = last_user_turn(before, _index(data))
        if index is not None:
            asked = [*before[:index], message("user", _text(data.value))]
            async with contextlib.aclosing(self._answer(asked, settings, request, before=before)) as steps:
                async for step in steps:
                    yield step

    async def undo(self, messages: Any, data: gr.UndoData, request: gr.Request) -> list[Any]:
        """Takes the last turn back; its text goes into the field again."""
        self._forget_soon(request)
        before = read_messages(messages)
        index = last_user_turn(before, _index(data))
        if index is None:
            return [_update(), before, ""]
        return [_update(value=text_of(before[index])), before[:index], ""]

    async def leave(self, request: gr.Request) -> None:
        """The tab was closed: its answers end now and not with their next piece."""
        session = request.session_hash or ""
        for task in self._running.get(session, set()):
            task.cancel()
        self._forget(session)

    def _forget_soon(self, request: gr.Request) -> None:
        """After the event: its inputs are kept before our code runs, its outputs after that."""
        asyncio.get_running_loop().call_later(_FORGET_S, self._forget, request.session_hash or "")

    def _forget(self, session: str) -> None:
        """Drops what Gradio keeps of a session: the last value of each component, conversation and key among them.

        Gradio needs it for links to a state, which the page has none of; it makes a new one at the next event.
        """
        holder = self.blocks.state_holder
        holder.session_data.pop(session, None)
        holder.time_last_used.pop(session, None)

    async def _answer(
        self,
        asked: list[ChatMessage],
        settings: Settings,
        request: Any,
        *,
        before: list[ChatMessage],
        text: str | None = None,
    ) -> AsyncGenerator[list[Any], None]:
        """Steps of the page: the question at once, then the growing answer; where it fails, why.

        Its callers close it themselves: Gradio closes the generator that it was given, and one inside that would wait
        for the garbage collector, with its request still running in the engine.

        before: what the page goes back to when there is no answer at all; text: what then stands in its field.
        """
        yield [_update(**_BUSY, **({} if text is None else {"value": ""})), asked, ""]
        shown = asked
        failure = ""
        try:
            with self._noted(request):
                key, model, system, *sampling = settings
                chosen = _text(model) or next(iter(await self._client.models(_text(key))), "")
                deltas = self._client.answer(
                    as_request(asked, _text(system)), model=chosen, key=_text(key), options=_options(*sampling)
                )
                async with contextlib.aclosing(deltas):
                    reasoning, answer, due = "", "", 0.0
                    async for delta in deltas:
                        reasoning, answer = reasoning + delta.reasoning, answer + delta.text
                        shown = [*asked, *_turn(reasoning, answer)]
                        if time.monotonic() >= due:
                            yield [_update(), shown, ""]
                            due = time.monotonic() + _UPDATE_S
        except RequestFailed as error:
            failure = _notice(str(error))
        if failure and shown is asked:
            yield [_update(**_BUTTONS, **({} if text is None else {"value": text})), before, failure]
        else:
            empty = "The answer is empty." if shown is asked else ""
            yield [_update(**_BUTTONS), shown, failure or _notice(empty)]

    @contextlib.contextmanager
    def _noted(self, request: gr.Request) -> Any:
        """Notes the task of an answer under its session, for `leave`."""
        session = request.session_hash or ""
        task = asyncio.current_task()
        assert task is not None
        tasks = self._running.setdefault(session, set())
        tasks.add(task)
        try:
            yield
        finally:
            tasks.discard(task)
            if not tasks:
                self._running.pop(session, None)
            self._forget_soon(request)


def _turn(reasoning: str, answer: str) -> list[ChatMessage]:
    thought = [message("assistant", reasoning, title=REASONING, pending=not answer)] if reasoning else []
    return [*thought, *([message("assistant", answer)] if answer else [])]


def _options(temperature: Any, top_p: Any, max_tokens: Any, seed: Any, stop: Any) -> dict[str, Any]:
    """Fields of a request for the settings that are filled in; the server judges the numbers. Raises RequestFailed."""
    options: dict[str, Any] = {}
    for name, value, kind in (
        ("temperature", temperature, float),
        ("top_p", top_p, float),
        ("max_tokens", max_tokens, int),
        ("seed", seed, int),
    ):
        if entered := _text(value).strip():
            options[name] = _number(name, entered, kind)
    texts = [line for line in _text(stop).split("\n") if line]
    return {**options, "stop": texts} if texts else options


def _number(name: str, entered: str, kind: type[float] | type[int]) -> float | int:
    try:
        number = kind(entered.replace(",", "."))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        wanted = "whole number" if kind is int else "number"
        raise RequestFailed(f"{name.replace('_', ' ').capitalize()} is no {wanted}: {entered[:40]}")
    return number


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _index(data: Any) -> int | None:
    """The message an event is about."""
    index = data.index[0] if isinstance(data.index, list | tuple) else data.index
    return index if isinstance(index, int) else None


def _notice(text: str) -> str:
    return f"⚠ {plain(text)}" if text else ""


def _update(**changes: Any) -> Any:
    return gr.update(**changes) if changes else gr.skip()
