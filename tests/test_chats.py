"""Claims about chats: whatever the template makes of them, the assistant's turns are learnt as the
model will see them; and chats as other programs store them."""

from __future__ import annotations

import datetime
import json
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from tiny import tiny_llama
from transformers.utils import chat_template_utils

from rolora.data.examples import Examples
from rolora.errors import DataError
from rolora.model.base import Base, load_base, tokenizer_digest
from rolora.model.peft import LoraSettings
from rolora.tasks.causal_lm import causal_lm
from rolora.tasks.generation import answer_metrics
from rolora.tasks.spans import masks

# Templates that treat earlier turns as those of known models do, in few lines.
# Qwen3: reasoning only in the last answer, empty if there is none.
QWEN3 = """\
{%- set last = namespace(user=0) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- set content = m.content %}
{%- set thought = '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > last.user %}
{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
{%- endif %}
{{- content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# Phi-3: the end of the text after the last turn, whichever that is.
PHI3 = """\
{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
# gpt-oss: the date; reasoning and another end mark in the last answer only; calls of tools.
GPT_OSS = """\
{{- '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{%- if tools %}{{ '<|start|>developer<|message|>' + tools | tojson + '<|end|>' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls %}
{%- set call = m.tool_calls[0].function %}
{{- '<|start|>assistant to=' + call.name + '<|message|>' + call.arguments | tojson + '<|call|>' }}
{%- elif m.role == 'assistant' and loop.last and not add_generation_prompt %}
{%- if m.thinking %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
{%- endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
{%- elif m.role == 'assistant' %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
{%- else %}
{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""
# DeepSeek-R1: asks for reasoning, which no turn is then written with.
DEEPSEEK = """\
{{- '<begin>' }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<User>' + m.content }}{% endif %}
{%- if m.role == 'assistant' %}
{{- '<Assistant>' + m.content.split('</think>')[-1] + '<end>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<Assistant><think>\\n' }}{% endif %}"""

FIRST = "<think>\nhm\n</think>\n\nsat"
CHAT = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": FIRST},
    {"role": "user", "content": "the dog"},
    {"role": "assistant", "content": "looked"},
]
PLAIN = [{**turn, "content": turn["content"].split("\n")[-1]} for turn in CHAT]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tiny_llama(tmp_path_factory.mktemp("models") / "llama")
    found = load_base(str(folder), "causal_lm", LoraSettings(rank=2), dtype=torch.float64)
    model: Any = found.model
    found.tokenizer.model_max_length = model.config.max_position_embeddings = 1024
    return found


@pytest.fixture
def template(base: Base, monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(text: str) -> None:
        monkeypatch.setattr(base.tokenizer, "chat_template", text)

    return use


def encode(base: Base, *chats: Any, tools: list[Any] | None = None, **keys: Any) -> Examples:
    table = pa.table({"chat": chats, **({"tools": tools} if tools else {})})
    named = {"messages": "chat", "tools": "tools" if tools else None, "max_length": 500, **keys}
    return causal_lm(base, **named).encode(table, "rows")


def shown(base: Base, examples: Examples) -> list[tuple[str, list[str]]]:
    """Each row's text, and the parts of it that are trained on."""
    return [
        ("".join(text for text, _ in row), [text for text, wanted in row if wanted])
        for row in masks(examples, base.tokenizer)
    ]


def rendered(base: Base, turns: Any, **more: Any) -> str:
    """The oracle: transformers' own rendering."""
    text: str = base.tokenizer.apply_chat_template(turns, tokenize=False, **more)
    return text


def test_qwen3_each_answer_is_learnt_with_its_reasoning_after_a_history_without(
    base: Base, template: Any
) -> None:
    template(QWEN3)
    found = shown(base, encode(base, CHAT))
    assert [text for text, _ in found] == [rendered(base, CHAT[:2]), rendered(base, CHAT)]
    assert [parts for _, parts in found] == [
        ["<think>\nhm\n</think>\n\nsat<|im_end|>\n"],
        ["<think>\n\n</think>\n\nlooked<|im_end|>\n"],
    ]
    assert "hm" not in found[1][0]


def test_phi3_each_answer_is_learnt_with_the_end_of_the_text(base: Base, template: Any) -> None:
    template(PHI3)
    found = shown(base, encode(base, PLAIN))
    assert found == [
        (rendered(base, PLAIN[:2]), ["sat<|end|>\n<|im_end|>"]),
        (rendered(base, PLAIN), ["looked<|end|>\n<|im_end|>"]),
    ]


def test_gpt_oss_calls_and_answers_are_learnt_with_the_marks_that_end_them(
    base: Base, template: Any
) -> None:
    template(GPT_OSS)
    call = {"type": "function", "function": {"name": "seek", "arguments": {"of": "cat"}}}
    chat = [
        PLAIN[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "on the mat"},
        {"role": "assistant", "content": "sat", "thinking": "hm"},
        *PLAIN[2:],
    ]
    tools = [{"type": "function", "function": {"name": "seek"}}]
    for given in (tools, json.dumps(tools)):
        found = shown(base, encode(base, chat, tools=[given], date=datetime.date.today()))
        assert [parts for _, parts in found] == [
            [
                "<|channel|>analysis<|message|>hm<|end|>"
                "<|start|>assistant<|channel|>final<|message|>sat<|return|>"
            ],
            [
                ' to=seek<|message|>{"of": "cat"}<|call|>',
                "<|channel|>final<|message|>looked<|return|>",
            ],
        ]
        assert [text for text, _ in found] == [
            rendered(base, chat[:4], tools=tools),
            rendered(base, chat, tools=tools),
        ]


@pytest.mark.parametrize("writes", ["call.arguments | tojson", "'' + call.arguments"])
def test_arguments_that_are_json_text_are_not_written_as_json_once_more(
    base: Base, template: Any, writes: str
) -> None:
    """OpenAI's rows hold text; most templates want an object, DeepSeek's the text."""
    template(GPT_OSS.replace("call.arguments | tojson", writes))
    call = {"type": "function", "function": {"name": "seek", "arguments": '{"of": "cat"}'}}
    turns = [PLAIN[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    (found,) = shown(base, encode(base, turns, date=datetime.date.today()))
    assert found[1] == [' to=seek<|message|>{"of": "cat"}<|call|>']


def test_deepseek_an_answer_is_learnt_where_the_template_asks_for_more_than_it_writes(
    base: Base, template: Any
) -> None:
    template(DEEPSEEK)
    for chat in (CHAT[:2], CHAT, [CHAT[0], {"role": "assistant", "content": "<think"}]):
        (found,) = shown(base, encode(base, chat))
        answers = [
            turn["content"].split("</think>")[-1] for turn in chat if turn["role"] == "assistant"
        ]
        assert found == (rendered(base, chat), [f"{answer}<end>" for answer in answers])


def test_an_answer_in_a_row_of_its_own_is_of_the_client_that_has_the_chat(
    base: Base, template: Any
) -> None:
    template(QWEN3)
    examples = encode(base, CHAT, CHAT[2:], CHAT)
    assert examples.made_of(torch.tensor([2, 1])).tolist() == [3, 4, 2]
    texts = [shown(base, examples)[row][1][0] for row in (3, 4, 2)]
    assert ["sat" in text for text in texts] == [True, False, False]
    assert encode(base, CHAT[2:]).made_of(torch.tensor([0])).tolist() == [0]


def test_generated_answers_are_counted_by_chat_and_compared_with_its_last(
    base: Base, template: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template(PHI3)
    asked: list[str] = []

    def written(base: Base, prompts: list[list[int]], most: int) -> list[str]:
        asked.extend(base.tokenizer.decode(prompt) for prompt in prompts)
        return ["looked<|end|>\n", "sat<|end|>\n"][: len(prompts)]

    monkeypatch.setattr("rolora.tasks.generation.generate", written)
    examples = encode(base, PLAIN, PLAIN[:2], PLAIN)
    assert answer_metrics(base, examples, 2) == {"exact_match": 1.0}
    assert asked == [rendered(base, PLAIN[:end], add_generation_prompt=True) for end in (3, 1)]


def test_a_turn_of_weight_0_is_read_and_not_learnt(base: Base) -> None:
    quiet = [PLAIN[0], {**PLAIN[1], "weight": 0}, PLAIN[2], {**PLAIN[3], "weight": 1}]
    assert shown(base, encode(base, quiet)) == [(rendered(base, PLAIN), ["looked<|im_end|>\n"])]
    opened = [{"role": "assistant", "content": "a", "weight": 0}, *PLAIN]
    assert shown(base, encode(base, opened))[0][0] == rendered(base, opened)


def test_chats_of_other_programs_are_the_same_rows(base: Base) -> None:
    names = {"user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[t["role"]], "value": t["content"]} for t in PLAIN]
    parts = [
        {"role": t["role"], "content": [{"type": "text", "text": x} for x in (t["content"], "")]}
        for t in PLAIN
    ]
    wanted = shown(base, encode(base, PLAIN))
    assert shown(base, encode(base, sharegpt)) == wanted
    assert shown(base, encode(base, parts)) == wanted


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "assistant", "content": "b", "weight": 2.0}, "message 2 has weight 2.0: use 0"),
        ({"role": "assistant", "content": "b", "weight": 0}, "no message with role 'assistant'"),
        ({"from": "gtp", "value": "b"}, "message 2 is from 'gtp': did you mean 'gpt'"),
        ({"from": "gpt"}, "message 2 has no text under 'content'"),
        ({"role": "assistant", "content": None}, "message 2 has no text under 'content'"),
        ({"role": "assistant", "content": [{"type": "image"}]}, "message 2 has a part 'image'"),
        ({"role": "assistant", "content": ["b"]}, "message 1 has a part 'a'"),
    ],
)
def test_a_turn_that_cannot_be_learnt_is_named(base: Base, turn: Any, message: str) -> None:
    asked: dict[str, Any] = {"role": "user", "content": "a"}
    if "from" in turn:
        asked = {"from": "human", "value": "a"}
    if isinstance(turn.get("content"), list):
        asked["content"] = ["a"] if turn["content"] == ["b"] else [{"type": "text", "text": "a"}]
    with pytest.raises(DataError, match=message):
        encode(base, [asked, turn])


@pytest.mark.parametrize(
    ("tools", "message"),
    [("[{", "row 1: its tools are not valid JSON"), ("{}", "row 1: tools must be a list of JSON")],
)
def test_tools_that_are_none_are_named(base: Base, tools: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode(base, PLAIN, tools=[tools])


def test_a_template_that_writes_today_writes_the_date_of_the_run(
    base: Base, template: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is transformers on a machine whose clock shows that day."""
    template(GPT_OSS)
    run = datetime.date(2025, 2, 28)
    (found,) = shown(base, encode(base, PLAIN[:2], date=run))
    then = datetime.datetime(2025, 2, 28, 17, 5)
    monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: then))
    assert found[0] == rendered(base, PLAIN[:2])
    assert "Current date: 2025-02-28" in found[0]


def test_sites_with_another_chat_template_have_another_tokenizer(base: Base, template: Any) -> None:
    before = tokenizer_digest(base)
    template(PHI3)
    assert tokenizer_digest(base) != before
