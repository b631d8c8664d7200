"""Chat templates render as transformers renders them, and refuse in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from expertmesh.actors.gateway.chat_template import ChatTemplate, open_chat_template
from expertmesh.cluster.errors import CorruptCheckpointError, InputError
from tests.unit.gateway_fakes import save_tokenizer

MESSAGES = [
    {"role": "system", "content": "  Be <brief> & \u00fc "},
    {"role": "user", "content": "hi\n"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "more"},
]
TEMPLATES = {
    "plain": "{% for m in messages %}<|{{ m['role'] }}|>{{ m.content | trim }}{{ eos_token }}{% endfor %}",
    "blocks": """
        {%- for message in messages %}
            {%- if loop.first and message.role == 'system' %}
                {{- 'S:' + message.content }}
                {%- continue %}
            {%- endif %}
            {% if message.role == 'user' %}
    U: {{ message.content }}
            {% else %}
    A: {% generation %}{{ message.content }}{% endgeneration %}
            {% endif %}
        {%- endfor %}
        {%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}""",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "state": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "variable": "{% if thinking is defined and thinking %}think{% endif %}{{ messages[-1].content }}{{ bos_token }}",
}


def write(directory: Path, **config: Any) -> Path:
    save_tokenizer(directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return directory


def opened(directory: Path) -> ChatTemplate:
    template = open_chat_template(directory)
    assert template is not None
    return template


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_renders_as_transformers_renders_it(source: str, tmp_path: Path) -> None:
    directory = write(
        tmp_path, chat_template=source, bos_token={"__type": "AddedToken", "content": "<bos>", "special": True}
    )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, thinking=True)
    assert opened(directory).render(MESSAGES, {"thinking": True}) == expected


def test_where_a_template_is_found(tmp_path: Path) -> None:
    assert open_chat_template(write(tmp_path)) is None
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "usual"}]
    assert opened(write(tmp_path, chat_template=named)).render(MESSAGES, {}) == "usual"
    (tmp_path / "chat_template.jinja").write_text("from the file {{ eos_token }}")
    assert opened(tmp_path).render(MESSAGES, {}) == "from the file <eos>"


def test_what_no_template_is_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpointError, match="is a int, not a text"):
        open_chat_template(write(tmp_path, chat_template=3))
    with pytest.raises(CorruptCheckpointError, match="cannot be used, line 2"):
        opened(write(tmp_path, chat_template="\n{% for %}")).render(MESSAGES, {})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "cannot take these messages"),
        ("{{ messages.append(1) }}", "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages"),
    ],
)
def test_what_a_template_refuses_is_an_input_error(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ChatTemplate(source, {}).render(MESSAGES, {})


def test_a_clients_variables_replace_neither_messages_nor_special_tokens() -> None:
    template = ChatTemplate("{{ messages | length }}{{ eos_token }}", {"eos_token": "<eos>"})
    assert template.render(MESSAGES, {"messages": [], "eos_token": "other"}) == "4<eos>"


def test_the_time_is_known() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render(MESSAGES, {}).isdigit()
