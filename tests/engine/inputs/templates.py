"""Chat templates in the manners of public checkpoints."""

CHATML_PARTS = (  # Qwen2-VL's
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA = (  # images first, then texts
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CHATML_TRIMMED = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' + message.content | trim + "
    "'<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
TOOLS = (  # Qwen3's manner
    "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}"
    "{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- set ns = namespace(last=messages|length - 1) %}"
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}"
    "{{- '<|im_start|>' ~ message.role ~ '\\n' ~ content }}"
    "{%- for call in message.tool_calls or [] %}{{- '<tool_call>' ~ call.function.name ~ ' ' }}"
    "{{- call.function.arguments | tojson }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}"
    "{{- '<think></think>' }}{%- endif %}{%- endif %}"
)
MACRO = (  # Qwen3-VL's manner
    "{% macro render(content) %}{% if content is string %}{{ content }}{% else %}{% for item in content %}"
    "{{ item.text if 'text' in item else '<|image_pad|>' }}{% endfor %}{% endif %}{% endmacro %}"
    "{% for message in messages %}{{ render(message.content) }}{% endfor %}"
)
ALIAS = (
    "{% for m in messages %}{% set body = m['content'] %}{% if body is not string %}"
    "{% for p in body[0:] %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
)
SPLIT = "{% for m in messages %}{% for line in m.content.split('\n') %}{{ line }}{% endfor %}{% endfor %}"
LOOP = (  # parts of X; how X is got from the message ``m`` differs
    "{% for c in X %}{% if c.type == 'image' %}<|image_pad|>{% elif c.type == 'text' %}{{ c.text }}"
    "{% endif %}{% endfor %}"
)
MESSAGES = "{% for m in messages %}[{{ m.role }}]BODY{% endfor %}"


def loop(over: str, *, before: str = "", around: tuple[str, str] = ("", "")) -> str:
    """A template that loops over each message's parts, found by the expression ``over``."""
    return before + MESSAGES.replace("BODY", around[0] + LOOP.replace("X", over) + around[1])


LOOPS = {  # ways to spell the loop, none of which can be told from the syntax alone
    "attribute": loop("m.content"),
    "item": loop("m['content'][:]"),
    "macro": loop("", before="{% macro show(x) %}" + LOOP.replace("X", "x") + "{% endmacro %}").replace(
        LOOP.replace("X", ""), "{{ show(m.content) }}"
    ),
    "macro by keyword": loop(
        "", before="{% macro show(x) %}" + LOOP.replace("X", "x") + "{% endmacro %}"
    ).replace(LOOP.replace("X", ""), "{{ show(x=m.content) }}"),
    "macro in a macro": loop(
        "",
        before="{% macro one(y) %}" + LOOP.replace("X", "y") + "{% endmacro %}"
        "{% macro show(x) %}{{ one(y=x) }}{% endmacro %}",
    ).replace(LOOP.replace("X", ""), "{{ show(x=m.content) }}"),
    "get": loop("m.get('content')"),
    "set": loop("k", around=("{% set k = m.get('content') %}", "")),
    "or": loop("(m.content or [])"),
    "with": loop("k", around=("{% with k = m.content %}", "{% endwith %}")),
    "namespace": loop(
        "ns.c", before="{% set ns = namespace(c=none) %}", around=("{% set ns.c = m.content %}", "")
    ),
    "pair": loop("a", around=("{% set a, b = m.content, 1 %}", "")),
    "index": MESSAGES.replace(
        "BODY",
        "{% for i in range(m.content | length) %}{% set c = m.content[i] %}"
        "{{ '<|image_pad|>' if c.type == 'image' else c.text }}{% endfor %}",
    ),
}
IDEFICS = (  # looks at the first part's type for a colon
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<|image_pad|>' }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
LLAMA_VISION = (  # the system's content is a string, the user's either
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}"
    "<|system|>\n{{ system }}<|end|>{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<|image_pad|>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MISTRAL = (  # strict about the order of roles; tool results want ids of nine characters
    "{{ bos_token }}{% if messages[0].role == 'system' %}[SYS]{{ messages[0].content }}[/SYS]"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% set ns = namespace(turn=0) %}{% for m in rest %}"
    "{% if m.role == 'tool' or m.tool_calls %}{% else %}"
    "{% if (m.role == 'user') != (ns.turn % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
    "{% set ns.turn = ns.turn + 1 %}{% endif %}"
    "{% if m.role == 'user' %}[INST]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for b in m.content %}{{ '<|image_pad|>' if b.type in ['image', 'image_url'] else b.text }}"
    "{% endfor %}{% endif %}[/INST]{% elif m.tool_calls %}[CALLS]{{ m.tool_calls | length }}"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}"
    "{{ raise_exception('bad id') }}{% endif %}[RESULT]{{ m.content | string }}[/RESULT]"
    "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
GEMMA = (  # the system's first part opens the first user's turn; no system elsewhere
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set prefix = messages[0]['content'] if messages[0]['content'] is string else "
    "messages[0]['content'][0]['text'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set prefix = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('alternate') }}{% endif %}<{{ m['role'] }}>"
    "{{ prefix + '\n' if loop.first and prefix }}"
    "{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}"
    "{% for p in m['content'] %}"
    "{{ '<|image_pad|>' if p['type'] == 'image' else p['text'] | trim }}{% endfor %}{% endif %}{% endfor %}"
)
INTERNVL = (  # parts in a loop, a line feed after each image
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<|image_pad|>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
URL_PARTS = (  # knows OpenAI's name of the part only
    "{% for m in messages %}{% for p in m.content %}"
    "{{ '<|image_pad|>' if p.type == 'image_url' else p.text }}{% endfor %}{% endfor %}"
)
