"""Chat templates after those of five families of models, and a tokenizer of bytes with their special tokens.

Written for these tests: each does what its family's does to turns, tools and thoughts, in fewer words.
"""

from __future__ import annotations

from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

# A new line behind a tag is dropped by the settings of transformers; those that a template writes stand in expressions.
CALLS = (
    "{% for call in message.tool_calls %}"
    """{{ '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) """
    """+ '}\\n</tool_call>' }}{% endfor %}"""
)
TOOL_LIST = "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
TOOL_TURN = (
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
)
GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

QWEN25 = (
    "{% if messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}{{ '' }}"
    "{% else %}<|im_start|>system\nYou are a helpful assistant.{% endif %}" + TOOL_LIST + "<|im_end|>\n"
    "{% for message in messages %}"
    "{% if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% elif message.role == 'assistant' %}<|im_start|>assistant"
    "{% if message.content %}{{ '\\n' + message.content }}{% endif %}"
    "{% if message.tool_calls %}" + CALLS + "{% endif %}<|im_end|>\n"
    "{% elif message.role == 'tool' %}" + TOOL_TURN + "{% endif %}{% endfor %}" + GENERATION
)

# Thoughts of turns before the last question are left out.
QWEN3 = (
    "{% set at = namespace(last=-1) %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% set at.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}<|im_start|>system\n" + TOOL_LIST + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "{% if message.role in ('user', 'system') %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% elif message.role == 'assistant' %}{% set content = message.content %}"
    "{% if '</think>' in content and loop.index0 < at.last %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant{% if content %}{{ '\\n' + content }}{% endif %}{% if message.tool_calls %}"
    + CALLS
    + "{% endif %}<|im_end|>\n"
    "{% elif message.role == 'tool' %}" + TOOL_TURN + "{% endif %}{% endfor %}" + GENERATION
)

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ 'ipython' if message.role == 'tool' else message.role }}<|end_header_id|>\n\n"
    '{% if tools and loop.first %}Respond with {"name": ..., "parameters": ...}.{% endif %}'
    '{% if message.tool_calls %}{"name": "{{ message.tool_calls[0].function.name }}", '
    '"parameters": {{ message.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ message.content | trim }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

SMOLLM2 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}" + GENERATION
)

# Roles must alternate, tools stand before the last question, and an answer ends a sequence.
MISTRAL = (
    "{{ bos_token }}{% set at = namespace(last=-1, turn=0) %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% set at.last = loop.index0 %}{% endif %}"
    "{% if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}"
    "{% if (message.role == 'user') != (at.turn % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant') }}{% endif %}"
    "{% set at.turn = at.turn + 1 %}{% endif %}{% endfor %}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}"
    "{% if tools and loop.index0 == at.last %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ message.content }}[/INST]"
    "{% elif message.role == 'assistant' and message.tool_calls %}[TOOL_CALLS] ["
    "{% for call in message.tool_calls %}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}"
    "{% elif message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    '{% elif message.role == \'tool\' %}[TOOL_RESULTS] {"content": "{{ message.content }}"}[/TOOL_RESULTS]'
    "{% endif %}{% endfor %}"
)

FAMILIES = {
    "qwen2.5": (QWEN25, "<|im_end|>"),
    "qwen3": (QWEN3, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "smollm2": (SMOLLM2, "<|im_end|>"),
    "mistral": (MISTRAL, "</s>"),
}
"""Template, and the token that ends a turn."""
SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
)
BOS = {"llama3": "<|begin_of_text|>", "mistral": "<s>"}


def tokenizer_of(family: str) -> Qwen2Tokenizer:
    """One token for each byte and each special token; pairs that words are made of are merged, so that a cut would show."""
    template, end = FAMILIES[family]
    alphabet = sorted(ByteLevel.alphabet())
    pairs = [("h", "e"), ("i", "n"), ("e", "r"), ("Ċ", "Ċ"), ("Ġ", "t"), ("4", "2")]
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=pairs,
        eos_token=end,
        bos_token=BOS.get(family),
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL),
    )
    tokenizer.chat_template = template
    return tokenizer
