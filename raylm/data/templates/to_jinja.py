"""A conversation template as the Jinja text that transformers, vLLM and other servers render.

It is saved with a model that was trained with the template, so that what is served is what was trained. Tool results,
calls and thinking are written out only where the template has a place for them.
"""

import re

from raylm.data.templates.conversation import PLACEHOLDERS, ConversationTemplate

_PLACEHOLDER = re.compile("{(" + "|".join(PLACEHOLDERS) + ")}")


def to_jinja(template: ConversationTemplate) -> str:
    """A chat template for `tokenizer.chat_template` that renders as `conversation.render` does.

    What a template has no place for is refused by `raise_exception`, as templates of models do.
    """
    lines = [
        "{%- if messages and messages[0]['role'] == 'system' -%}",
        "{%- set system = messages[0]['content'] or '' -%}{%- set turns = messages[1:] -%}",
        "{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}",
        "{%- if not system.strip() -%}{%- set system = " + _literal(template.default_system) + " -%}{%- endif -%}",
        *_tools(template),
        *_checks(template),
        *_reasoning_state(template),
        _out(template.start),
        *_system(template),
        "{%- for message in turns -%}",
        *_between(template, "not loop.first"),
        "{%- if message['role'] == 'user' -%}",
        *_user(template),
        "{%- elif message['role'] == 'assistant' -%}",
        *_assistant(template),
        *_results(template),
        "{%- else -%}{{- raise_exception('The template " + template.name + " has no role ' ~ message['role']) -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        "{%- if add_generation_prompt -%}",
        *_between(template, "turns"),
        *_choice(
            "turns and turns[-1]['role'] == 'tool'",
            template.header_after_result,
            template.generation_prompt,
            trimmed=True,
        ),
        "{%- endif -%}",
    ]
    return "".join(line for line in lines if line)


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def _expression(form: str, **values: str) -> str:
    """A Jinja expression for a form; values: expressions for its placeholders."""
    names = {"bos": "(bos_token or '')", "eos": "(eos_token or '')", **values}
    parts: list[str] = []
    done = 0
    for match in _PLACEHOLDER.finditer(form):
        if match[1] not in names:
            continue
        if match.start() > done:
            parts.append(_literal(form[done : match.start()]))
        parts.append(names[match[1]])
        done = match.end()
    if done < len(form):
        parts.append(_literal(form[done:]))
    return " ~ ".join(parts) if parts else "''"


def _out(form: str, **values: str) -> str:
    return "{{- " + _expression(form, **values) + " -}}" if form else ""


def _choice(condition: str, yes: str | None, no: str, *, trimmed: bool = False, **values: str) -> list[str]:
    """`no`, or `yes` (where it is not None) under a condition."""
    if trimmed and yes is not None:
        yes = yes.rstrip(" ")
    if yes is None or yes == no:
        return [_out(no, **values)]
    return ["{%- if " + condition + " -%}", _out(yes, **values), "{%- else -%}", _out(no, **values), "{%- endif -%}"]


def _tools(template: ConversationTemplate) -> list[str]:
    listing = template.tools
    if listing is None:
        return [
            f"{{%- if tools -%}}{{{{- raise_exception('The template {template.name} has no tools') -}}}}{{%- endif -%}}"
        ]
    shown = "(tool if tool is string else (tool | tojson))"
    pieces = "{%- for tool in tools -%}{%- set listed.text = listed.text ~ " + _expression(listing.each, tool=shown)
    if listing.between:
        pieces += " ~ ('' if loop.last else " + _literal(listing.between) + ")"
    return [
        "{%- if tools -%}",
        "{%- set listed = namespace(text='') -%}",
        pieces + " -%}{%- endfor -%}",
        "{%- set system = system ~ (" + _literal(listing.after_system) + " if system else '') ~ ",
        _literal(listing.before) + " ~ listed.text ~ " + _literal(listing.after) + " -%}",
        "{%- endif -%}",
    ]


def _checks(template: ConversationTemplate) -> list[str]:
    lines = []
    if template.system is None:
        lines += [
            "{%- if system -%}{{- raise_exception('The template ",
            template.name + " has no system text') -}}{%- endif -%}",
        ]
    if template.system_in_user:
        lines += [
            "{%- if system and (not turns or turns[0]['role'] != 'user') -%}",
            "{{- raise_exception('The system text needs a user turn after it') -}}{%- endif -%}",
        ]
    if template.alternate:
        lines += [
            "{%- for message in turns -%}",
            "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}",
            "{{- raise_exception('The turns must alternate between user and assistant') -}}{%- endif -%}{%- endfor -%}",
        ]
    return lines


def _reasoning_state(template: ConversationTemplate) -> list[str]:
    if template.reasoning != "last_turn":
        return []
    return [
        "{%- set query = namespace(last=(turns | length) - 1, found=false) -%}",
        "{%- for message in turns -%}",
        "{%- if message['role'] == 'user' and not (message['content'].startswith('<tool_response>')",
        " and message['content'].endswith('</tool_response>')) -%}",
        "{%- set query.last = loop.index0 -%}",
        "{%- endif -%}{%- endfor -%}",
    ]


def _system(template: ConversationTemplate) -> list[str]:
    if template.system is None or template.system_in_user:
        return []
    if template.always_system:
        return [_out(template.system, content="system")]
    return ["{%- if system -%}", _out(template.system, content="system"), "{%- endif -%}"]


def _between(template: ConversationTemplate, condition: str) -> list[str]:
    if not template.between:
        return []
    placed = "" if template.system is None or template.system_in_user else " or system"
    if template.always_system:
        placed = " or true"
    return ["{%- if " + condition + placed + " -%}", _out(template.between), "{%- endif -%}"]


def _content(template: ConversationTemplate) -> str:
    return "message['content'].strip()" if template.strip else "message['content']"


def _user(template: ConversationTemplate) -> list[str]:
    content = _content(template)
    if not template.system_in_user:
        return [_out(template.user, content=content)]
    system = _expression(template.system or "", content="system")
    both = f"((({system}) ~ {content}) if loop.first and system else {content})"
    return [_out(template.user, content=both)]


def _assistant(template: ConversationTemplate) -> list[str]:
    lines = _choice("not loop.first and loop.previtem['role'] == 'tool'", template.header_after_result, template.header)
    content = _content(template).replace("message['content']", "(message['content'] or '')")
    if template.reasoning == "dropped":
        lines.append("{%- set answer = " + content + ".split('</think>')[-1] -%}")
    elif template.reasoning == "last_turn":
        lines += [
            "{%- set answer = " + content + " -%}",
            "{%- set thinking = message['reasoning'] or message['reasoning_content'] or '' -%}",
            "{%- if not thinking and '</think>' in answer -%}",
            "{%- set thinking = answer.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}",
            "{%- set answer = answer.split('</think>')[-1].lstrip('\\n') -%}",
            "{%- endif -%}",
            "{%- if loop.index0 > query.last and (loop.last or thinking) -%}",
            "{{- '<think>\\n' ~ thinking.strip('\\n') ~ '\\n</think>\\n\\n' -}}",
            "{%- set answer = answer.lstrip('\\n') -%}",
            "{%- endif -%}",
        ]
    else:
        lines.append("{%- set answer = " + content + " -%}")
    lines.append("{{- answer -}}")
    lines += _calls(template)
    lines += _choice("loop.last", template.last_end, template.end)
    lines += _choice("loop.last", template.last_after, template.after)
    return lines


def _calls(template: ConversationTemplate) -> list[str]:
    calls = template.calls
    if calls is None:
        return [
            "{%- if message['tool_calls'] -%}{{- raise_exception('The template ",
            template.name + " has no tool calls') -}}{%- endif -%}",
        ]
    arguments = "(function['arguments'] if function['arguments'] is string else (function['arguments'] | tojson))"
    lines = ["{%- if message['tool_calls'] -%}"]
    if calls.after_content:
        lines += ["{%- if answer -%}", _out(calls.after_content), "{%- endif -%}"]
    lines += [
        _out(calls.before),
        "{%- for call in message['tool_calls'] -%}",
        "{%- set function = call['function'] or call -%}",
        "{%- if not loop.first -%}" + _out(calls.between) + "{%- endif -%}" if calls.between else "",
        _out(calls.each, name="function['name']", arguments=arguments),
        "{%- endfor -%}",
        _out(calls.after),
        "{%- endif -%}",
    ]
    return lines


def _results(template: ConversationTemplate) -> list[str]:
    results = template.results
    if results is None:
        return []
    return [
        "{%- elif message['role'] == 'tool' -%}",
        *_choice("not loop.first and loop.previtem['role'] == 'tool'", results.between, results.before),
        _out(results.each, content=_content(template)),
        "{%- if loop.last or loop.nextitem['role'] != 'tool' -%}" + _out(results.after) + "{%- endif -%}"
        if results.after
        else "",
    ]
