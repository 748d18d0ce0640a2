"""The presets: one row each, with LMFlow's format strings, default system texts and tool layouts.

Where a family's later members only change a default, the row says just that. Layouts that can be said in one way only
are said once (QWEN_TOOLS, …). Differences from LMFlow, on purpose: the header of an answer carries no loss, answers
with a single tool call end like those with two (LMFlow's deepseek_v3 leaves them open), and a system text or a tool
that a template has no place for is an error instead of a warning.
"""

from dataclasses import replace

from raylm.data.templates.conversation import ConversationTemplate, Sequel, ToolListing

LMFLOW = "LMFlow, src/lmflow/utils/conversation_template"

_PLAIN_CALLS = Sequel(each='{"name": "{name}", "arguments": {arguments}}', between="\n", after_content="\n")

_CHATML = ConversationTemplate(
    name="chatml",
    system="<|im_start|>system\n{content}<|im_end|>\n",
    user="<|im_start|>user\n{content}<|im_end|>\n",
    header="<|im_start|>assistant\n",
    end="<|im_end|>",
    after="\n",
    source=f"{LMFLOW}/chatml.py",
)

_QWEN_TOOLS = ToolListing(
    before=(
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
    ),
    each="\n{tool}",
    after=(
        "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    ),
    after_system="\n\n",
)

_QWEN2_5 = replace(
    _CHATML,
    name="qwen2_5",
    default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    tools=_QWEN_TOOLS,
    calls=Sequel(
        each='<tool_call>\n{"name": "{name}", "arguments": {arguments}}\n</tool_call>', between="\n", after_content="\n"
    ),
    results=Sequel(
        before="<|im_start|>user", each="\n<tool_response>\n{content}\n</tool_response>", after="<|im_end|>\n"
    ),
    source=f"{LMFLOW}/qwen.py",
)

_LLAMA3 = ConversationTemplate(
    name="llama3",
    start="{bos}",
    system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
    header="<|start_header_id|>assistant<|end_header_id|>\n\n",
    end="<|eot_id|>",
    source=f"{LMFLOW}/llama.py",
)

_EMPTY = ConversationTemplate(name="empty", user="{bos}{content}", header="", end="{eos}", source=f"{LMFLOW}/base.py")

_DEEPSEEK_V2 = ConversationTemplate(
    name="deepseek_v2",
    start="{bos}",
    system="{content}\n\n",
    user="User: {content}\n\n",
    header="Assistant: ",
    end="{eos}",
    source=f"{LMFLOW}/deepseek.py",
)

_DEEPSEEK_V3 = ConversationTemplate(
    name="deepseek_v3",
    start="{bos}",
    system="{content}",
    user="<｜User｜>{content}",
    header="<｜Assistant｜>",
    header_after_result="",
    end="<｜end▁of▁sentence｜>",
    calls=Sequel(
        before="<｜tool▁calls▁begin｜>",
        each="<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>",
        between="\n",
        after="<｜tool▁calls▁end｜>",
    ),
    results=Sequel(
        before="<｜tool▁outputs▁begin｜>",
        each="<｜tool▁output▁begin｜>{content}<｜tool▁output▁end｜>",
        between="\n",
        after="<｜tool▁outputs▁end｜>",
    ),
    source=f"{LMFLOW}/deepseek.py",
)

_GEMMA = ConversationTemplate(
    name="gemma",
    start="{bos}",
    system="{content}",
    user="<start_of_turn>user\n{content}<end_of_turn>\n",
    header="<start_of_turn>model\n",
    end="<end_of_turn>",
    after="\n",
    source=f"{LMFLOW}/gemma.py",
)

_ROWS = (
    ConversationTemplate(
        name="chatglm3",
        start="[gMASK]sop",
        system="<|system|>\n {content}",
        user="<|user|>\n {content}",
        header="<|assistant|>\n ",
        source=f"{LMFLOW}/chatglm.py",
    ),
    _CHATML,
    replace(_DEEPSEEK_V2, name="deepseek"),
    _DEEPSEEK_V2,
    _DEEPSEEK_V3,
    replace(
        _DEEPSEEK_V3,
        name="deepseek_r1",
        reasoning="dropped",
        results=replace(_DEEPSEEK_V3.results or Sequel(each="{content}"), between=""),
    ),
    replace(_DEEPSEEK_V3, name="deepseek_r1_distill", reasoning="dropped"),
    replace(_EMPTY, name="disable"),
    _EMPTY,
    replace(_EMPTY, name="empty_no_special_tokens", user="{content}", end=""),
    _GEMMA,
    replace(_GEMMA, name="gemma3", system="{content}\n\n", system_in_user=True, strip=True, alternate=True),
    ConversationTemplate(
        name="hymba",
        system="<extra_id_0>System{content}\n\n",
        always_system=True,
        user="<extra_id_1>User\n{content}\n",
        header="<extra_id_1>Assistant\n",
        after="\n",
        last_end="{eos}",
        last_after="",
        tools=ToolListing(each="\n<tool> {tool} </tool>"),
        calls=_PLAIN_CALLS,
        results=Sequel(each="<extra_id_1>Tool\n{content}\n"),
        source=f"{LMFLOW}/hymba.py",
    ),
    replace(_CHATML, name="internlm2", start="{bos}", source=f"{LMFLOW}/internlm.py"),
    ConversationTemplate(
        name="llama2",
        system="<<SYS>>\n{content}\n<</SYS>>\n\n",
        system_in_user=True,
        user="{bos}[INST] {content} [/INST]",
        header="",
        end="{eos}",
        source=f"{LMFLOW}/llama.py",
    ),
    _LLAMA3,
    replace(
        _LLAMA3,
        name="llama3_for_tool",
        tools=ToolListing(each="{tool}", between=","),
        calls=_PLAIN_CALLS,
        results=Sequel(each="<|start_header_id|>tool<|end_header_id|>\n\n{content}<|eot_id|>"),
    ),
    ConversationTemplate(
        name="phi3",
        start="{bos}",
        system="<|system|>\n{content}<|end|>\n",
        user="<|user|>\n{content}<|end|>\n",
        header="<|assistant|>\n",
        end="<|end|>",
        after="\n",
        last_after="\n{eos}",
        source=f"{LMFLOW}/phi.py",
    ),
    replace(_CHATML, name="qwen2", source=f"{LMFLOW}/qwen.py"),
    _QWEN2_5,
    replace(_QWEN2_5, name="qwen2_5_1m", default_system="You are a helpful assistant."),
    replace(
        _QWEN2_5,
        name="qwen2_5_math",
        default_system="Please reason step by step, and put your final answer within \\boxed{}.",
    ),
    replace(
        _CHATML,
        name="qwen2_for_tool",
        tools=ToolListing(each="{tool}", between=","),
        calls=_PLAIN_CALLS,
        results=Sequel(each="<|im_start|>tool\n{content}<|im_end|>\n"),
        source=f"{LMFLOW}/qwen.py",
    ),
    replace(_QWEN2_5, name="qwen3", default_system="", reasoning="last_turn", source="Qwen/Qwen3-8B, chat template"),
    replace(
        _QWEN2_5,
        name="qwen_qwq",
        default_system=(
            "You are a helpful and harmless assistant. You are Qwen developed by Alibaba. "
            "You should think step-by-step."
        ),
    ),
    replace(_CHATML, name="yi", source=f"{LMFLOW}/__init__.py"),
    replace(_CHATML, name="yi1_5", system="{content}", source=f"{LMFLOW}/yi.py"),
    ConversationTemplate(
        name="zephyr",
        system="<|system|>\n{content}{eos}",
        user="<|user|>\n{content}{eos}",
        header="<|assistant|>\n",
        end="{eos}",
        between="\n",
        source=f"{LMFLOW}/zephyr.py",
    ),
)

PRESETS = {row.name: row for row in _ROWS}
