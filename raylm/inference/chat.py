"""Chat in a terminal with any OpenAI-compatible endpoint: streams answers, keeps the history.

/reset forgets the conversation, /quit or end of input leaves, ctrl-c stops the answer that is being given.
"""

from collections.abc import Callable, Iterator
from typing import Any

from raylm.data.prompt import PromptEncoder
from raylm.data.schema import RowProblem
from raylm.errors import ServingError, nearest

HELP = "/reset starts over, /quit leaves, ctrl-c stops an answer."


def chat_in_terminal(
    url: str,
    *,
    api_key: str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
    prompts: PromptEncoder | None = None,
    model: str | None = None,
    read: Callable[[str], str] = input,
    write: Callable[[str], None] | None = None,
) -> None:
    """Runs until /quit; answers are the likeliest ones, so the same words get the same answer.

    url: of the server, with or without /v1; max_tokens: of an answer, default the model's room; prompts: of the served
    model, where it is at hand: with it, names of control tokens that somebody types stay text, as in training; model:
    the one to talk to, or an adapter's name; default: the first that the server lists. Raises ServingError when the
    server does not answer, or does not serve it.
    """
    write = write or _write
    client, model = _connect(url, api_key, model)
    history: list[dict[str, str]] = _start(system)
    write(f"{model} at {url}. {HELP}\n")
    while True:
        try:
            line = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        if line == "/quit":
            return
        if line == "/reset":
            history = _start(system)
            write("Started over.\n")
        elif line.startswith("/"):
            write(HELP + "\n")
        elif line:
            history.append({"role": "user", "content": line})
            _turn(_stream(client, model, history, max_tokens, prompts), history, write)


def _turn(pieces: Iterator[str], history: list[dict[str, str]], write: Callable[[str], None]) -> None:
    answer = ""
    try:
        for piece in pieces:
            write(piece)
            answer += piece
    except KeyboardInterrupt:
        write(" [stopped]")
    except ServingError as error:
        history.pop()
        write(f"{error}\n")
        return
    write("\n")
    history.append({"role": "assistant", "content": answer})


def _stream(
    client: Any, model: str, history: list[dict[str, str]], max_tokens: int | None, prompts: PromptEncoder | None
) -> Iterator[str]:
    import openai

    limit = {"max_tokens": max_tokens} if max_tokens else {}
    conversation = {"messages": history}
    try:
        if prompts is not None and prompts.types_control_tokens(conversation):
            # The server would parse them; it takes ids as they are. Its own default would be 16 tokens.
            ids = prompts.ids(conversation)
            room = limit or {"max_tokens": _context_length(client, model) - len(ids)}
            for part in client.completions.create(model=model, prompt=ids, stream=True, temperature=0.0, **room):
                if part.choices and part.choices[0].text:
                    yield part.choices[0].text
            return
        for chunk in client.chat.completions.create(
            model=model, messages=history, stream=True, temperature=0.0, **limit
        ):
            if chunk.choices and chunk.choices[0].delta.content:
                yield chunk.choices[0].delta.content
    except RowProblem as problem:
        raise ServingError("the message", str(problem)) from None
    except openai.APIError as error:
        raise ServingError("the server", f"refused: {error.message}", "/reset starts a shorter conversation.") from None


def _context_length(client: Any, model: str) -> int:
    """Tokens of prompt and answer together, as vLLM's list of models has it."""
    return next(int(item.max_model_len) for item in client.models.list() if item.id == model)


def _connect(url: str, api_key: str | None, wanted: str | None) -> tuple[Any, str]:
    import logging

    import openai

    logging.getLogger("httpx").setLevel(logging.WARNING)  # vLLM raises it, and a line a request disturbs a chat
    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    client = openai.OpenAI(base_url=base, api_key=api_key or "none", max_retries=0)
    try:
        served = [model.id for model in client.models.list()]
    except openai.AuthenticationError:
        raise ServingError(url, "asks for an API key.", "Give it with --api-key-file.") from None
    except openai.APIConnectionError:
        raise ServingError(url, "does not answer.", "Start it with: raylm serve MODEL") from None
    except openai.APIError as error:
        raise ServingError(url, f"does not list its models: {error.message}", "Try again in a moment.") from None
    exact = [name for name in served if wanted in (None, name)]
    found = exact or [name for name in served if name.endswith(f":{wanted}")]
    if not found:
        raise ServingError(url, f"does not serve {wanted}.", nearest(str(wanted), served))
    return client, found[0]


def _start(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def _write(text: str) -> None:
    import sys

    sys.stdout.write(text)
    sys.stdout.flush()
