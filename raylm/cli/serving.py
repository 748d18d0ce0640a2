"""serve, deploy, chat, metrics dashboard: servers, those who talk to them, and those who watch them."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import raylm
from raylm.cli.arguments import add_command, add_group, add_overrides
from raylm.errors import ConfigError
from raylm.words import listed


def add(commands: Any) -> None:
    """Declares serve, deploy and chat."""
    serve = add_command(commands, "serve", _serve, "host a model behind an OpenAI-compatible endpoint")
    serve.add_argument("model", help="hub id, folder, GGUF file, or YAML of a server")
    serve.add_argument("--adapter", metavar="DIR", help="LoRA adapter to serve beside the model")
    add_overrides(serve)
    deploy = add_command(commands, "deploy", _deploy, "host a model on a running cluster, or replace what is deployed")
    deploy.add_argument("model", nargs="?", help="hub id, folder, GGUF file, or YAML of a server")
    others = deploy.add_mutually_exclusive_group()
    others.add_argument("--status", action="store_true", help="say what is deployed")
    others.add_argument("--rollback", action="store_true", help="put the former version back")
    others.add_argument("--delete", action="store_true", help="end what is deployed")
    add_overrides(deploy)
    chat = add_command(commands, "chat", _chat, "talk to a model or a running server in the terminal")
    chat.add_argument("target", metavar="MODEL_OR_URL", help="hub id, folder, GGUF file, or http://… of a server")
    chat.add_argument("--adapter", metavar="DIR", help="LoRA adapter to talk to (of a running server: its name)")
    chat.add_argument("--system", help="system message")
    chat.add_argument("--max-tokens", type=int, metavar="N", help="length of an answer at most")
    chat.add_argument("--api-key-file", help="file with the key the server asks for")
    add_overrides(chat)


def add_metrics(commands: Any) -> None:
    """Declares metrics dashboard."""
    metrics = add_group(commands, "metrics", "watch servers")
    board = add_command(metrics, "dashboard", _dashboard, "print the Grafana dashboard of a server")
    board.add_argument("--output", metavar="FILE", help="file to write instead")


def _serve(options: Any) -> None:
    with raylm.serve(options.model, _with_adapter(options)) as server:
        model = server.adapter or server.model
        if options.json:
            page = {"chat_page": server.chat_page} if server.chat_page else {}
            print(json.dumps({"url": server.url, "model": model, "models": server.models, **page}), flush=True)
        else:
            are = "is" if len(server.models) == 1 else "are"
            print(f"{listed(server.models)} {are} served at {server.url}/v1 (ctrl-c stops it). Try:", flush=True)
            print(_curl(server.url, model), flush=True)
            if server.chat_page:
                print(f"Chat page: {server.chat_page}", flush=True)
        try:
            server.wait()
        except KeyboardInterrupt:
            print("stopping", file=sys.stderr)


def _with_adapter(options: Any) -> list[str]:
    """The settings of a command with its --adapter among them."""
    return [*([f"adapter={json.dumps(options.adapter)}"] if options.adapter else []), *options.overrides]


def _curl(url: str, model: str) -> str:
    # Without a limit a small machine answers for minutes, and shows nothing meanwhile.
    messages = [{"role": "user", "content": "Who are you?"}]
    body = json.dumps({"model": model, "messages": messages, "max_tokens": 64})
    return f"curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'"


def _deploy(options: Any) -> None:
    given = [item for item in (options.model, *options.overrides) if item is not None]
    if not (options.status or options.rollback or options.delete):
        if not given or "=" in given[0]:
            raise ConfigError("raylm deploy", "has no model.", "Give a model, or --status, --rollback or --delete.")
        _print_deployment(raylm.deploy(given[0], given[1:]), as_json=options.json)
        return
    from raylm.serving import delete, deployed, roll_back

    unknown = next((item for item in given if not item.startswith("cluster_address=")), None)
    if unknown is not None:
        raise ConfigError(unknown, "goes with a new version.", "Only cluster_address=… goes with this option.")
    address = given[-1].partition("=")[2] if given else None
    if options.delete:
        delete(address)
        print(json.dumps({"deleted": True}) if options.json else "deleted")
    else:
        _print_deployment(roll_back(address) if options.rollback else deployed(address), as_json=options.json)


def _print_deployment(found: Any, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(dataclasses.asdict(found)))
        return
    print(f"address         {found.url}/v1")
    print(f"revision        {found.revision}, {found.status}")
    print(*(f"model           {', '.join(names)}" for names in found.models), sep="\n")
    print(f"replicas        {', '.join(f'{name} {count}' for name, count in found.replicas.items())}")
    if found.before:
        print("go back         raylm deploy --rollback")


def _chat(options: Any) -> None:
    from raylm.inference.chat import chat_in_terminal
    from raylm.serving.api_key import read_api_key

    key = read_api_key(options.api_key_file)
    if options.target.startswith(("http://", "https://")):
        if options.overrides:
            raise ConfigError(options.overrides[0], "is a setting of a server, and this one runs already.")
        chat_in_terminal(
            options.target,
            api_key=key,
            system=options.system,
            max_tokens=options.max_tokens,
            model=options.adapter,
        )
        return
    with raylm.serve(options.target, _with_adapter(options)) as server:
        from raylm.data.prompt import PromptEncoder
        from raylm.data.tokenizer import load_tokenizer
        from raylm.models.folder import as_folder

        prompts = PromptEncoder(load_tokenizer(as_folder(options.target)), options.target)
        chat_in_terminal(
            server.url,
            api_key=key,
            system=options.system,
            max_tokens=options.max_tokens,
            prompts=prompts,
            model=server.adapter,
        )


def _dashboard(options: Any) -> None:
    from raylm.serving.dashboard import dashboard

    text = json.dumps(dashboard(), indent=2)
    if options.output is None:
        print(text)
        return
    Path(options.output).write_text(text + "\n", encoding="utf-8")
    print(json.dumps({"output": options.output}) if options.json else f"dashboard       {options.output}")
