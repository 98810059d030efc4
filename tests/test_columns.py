"""The columns of tables as people have them are recognised."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from rolora.data.columns import (
    Column,
    describe,
    guess_clients,
    guess_columns,
    names_client,
)
from rolora.errors import DataError

STORY = "a story that goes on for a while, number {}"
LONG = [STORY.format(number) for number in range(8)]
SHORT = [f"short {number}" for number in range(8)]
YES_NO = ["yes", "no"] * 4
CHAT = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]] * 8


def test_each_kind_of_column_is_told_apart() -> None:
    table = pa.table(
        {
            "text": LONG,
            "class": YES_NO,
            "grade": [1, 2, 3, 1, 2, 3, 1, 2],
            "quoted": ["0", "1"] * 4,
            "price": [0.5 * number for number in range(8)],
            "id": list(range(8)),
            "messages": CHAT,
            "options": [["a", "b", "c"]] * 8,
            "place": [{"x": 1}] * 8,
            "spans": [[{"start": 1}]] * 8,
            "ratio": [0.5, 1.5] * 4,
            "essay": [STORY * 2, STORY * 3] * 4,
            "same": ["x"] * 8,
        }
    )
    kinds = {column.name: column.kind for column in describe(table)}
    assert kinds == {
        "text": "text",
        "class": "category",
        "grade": "category",
        "quoted": "category",
        "price": "number",
        "id": "number",
        "messages": "messages",
        "options": "list",
        "place": "other",
        "spans": "list",
        "ratio": "number",
        "essay": "text",
        "same": "text",
    }


def test_a_column_is_described_by_its_values_without_the_missing_ones() -> None:
    table = pa.table({"t": ["ab\ncd", None, "x" * 99], "m": [None, [1, 2], [3, 4, 5, 6]]})
    assert describe(table) == [
        Column("t", "text", 2, "ab cd", 52.0),
        Column("m", "list", 2, "[1, 2]", 3.0),
    ]
    assert describe(pa.table({"t": ["y" * 99]}))[0].example == "y" * 60


def test_the_example_shows_numbers_as_written() -> None:
    assert describe(pa.table({"t": ["007", "008"]}))[0].example == "007"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"text": LONG, "label": YES_NO}, ("classification", {"text": "text", "label": "label"})),
        (
            {"premise": LONG, "hypothesis": SHORT, "idx": list(range(8)), "label": [0, 1] * 4},
            ("classification", {"text": ["premise", "hypothesis"], "label": "label"}),
        ),
        (
            {"question": SHORT, "passage": LONG, "answer": [True, False] * 4},
            ("classification", {"text": ["question", "passage"], "label": "answer"}),
        ),
        (
            {"notes": LONG, "Review": SHORT, "Sentiment": YES_NO, "ok": YES_NO},
            ("classification", {"text": "Review", "label": "Sentiment"}),
        ),
        (
            {"first": YES_NO, "words": LONG, "last": YES_NO},
            ("classification", {"text": "words", "label": "last"}),
        ),
        (
            {"prompt": SHORT, "response": LONG, "label": YES_NO},
            ("classification", {"text": "response", "label": "label"}),
        ),
        (
            {"speaker": YES_NO, "text": LONG, "label": list("abcdefgh")},
            ("classification", {"text": "text", "label": "label"}),
        ),
        (
            {"uid": SHORT, "fulltext": LONG, "group": ["a", "b", "c", "d"] * 2, "ok": YES_NO},
            ("classification", {"text": "fulltext", "label": "ok"}),
        ),
        (
            {"text": LONG, "labels": [["a"], ["a", "b"]] * 4, "kind": YES_NO},
            ("multi_label", {"text": "text", "label": "labels"}),
        ),
        (
            {"sentence1": LONG, "sentence2": SHORT, "score": [0.5, 1.0, 2.25, 3.0] * 2},
            ("regression", {"text": ["sentence1", "sentence2"], "label": "score"}),
        ),
        (
            {"text": LONG, "label": ["1.5", "2", "3", "4.5", "5", "6", "7", "8"]},
            ("regression", {"text": "text", "label": "label"}),
        ),
        (
            {"instruction": SHORT, "input": [""] * 8, "output": LONG},
            ("causal_lm", {"prompt": ["instruction", "input"], "completion": "output"}),
        ),
        (
            {"instruction": SHORT, "context": LONG, "response": LONG, "category": YES_NO},
            ("causal_lm", {"prompt": ["instruction", "context"], "completion": "response"}),
        ),
        (
            {"text": LONG, "kind": ["a", "b", "c", "d"] * 2, "split": ["train", "test"] * 4},
            ("classification", {"text": "text", "label": "kind"}),
        ),
        (
            {"id": SHORT, "conversations": [[{"from": "human", "value": "hi"}]] * 8},
            ("causal_lm", {"messages": "conversations"}),
        ),
        (
            {"question": SHORT, "answer": LONG},
            ("causal_lm", {"prompt": "question", "completion": "answer"}),
        ),
        (
            {"prompt": SHORT, "topic": YES_NO, "completion": LONG},
            ("causal_lm", {"prompt": "prompt", "completion": "completion"}),
        ),
        (
            {"messages": CHAT, "tools": [[{"type": "function"}], None] * 4},
            ("causal_lm", {"messages": "messages", "tools": "tools"}),
        ),
        ({"source": YES_NO, "messages": CHAT}, ("causal_lm", {"messages": "messages"})),
        ({"turns": CHAT, "label": YES_NO}, ("causal_lm", {"messages": "turns"})),
        (
            {"prompt": SHORT, "chosen": LONG, "rejected": SHORT, "score": [0.5, 1.5] * 4},
            ("preference", {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}),
        ),
        (
            {"prompt": SHORT, "prompt_id": SHORT, "chosen": CHAT, "rejected": CHAT},
            ("preference", {"chosen": "chosen", "rejected": "rejected"}),
        ),
        (
            {"prompt": CHAT, "chosen": CHAT, "rejected": CHAT, "messages": CHAT},
            ("preference", {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}),
        ),
        (
            {"prompt": SHORT, "completion": LONG, "label": [True, False] * 4},
            ("preference", {"prompt": "prompt", "completion": "completion", "label": "label"}),
        ),
        (
            {"prompt": CHAT, "completion": CHAT, "label": [0, 1] * 4},
            ("preference", {"prompt": "prompt", "completion": "completion", "label": "label"}),
        ),
        (
            {"prompt": SHORT, "completion": YES_NO},
            ("causal_lm", {"prompt": "prompt", "completion": "completion"}),
        ),
        (
            {"instruction": ["Classify."] * 8, "input": LONG, "output": YES_NO},
            ("causal_lm", {"prompt": ["instruction", "input"], "completion": "output"}),
        ),
        ({"text": LONG, "url": SHORT}, ("causal_lm", {"completion": "text"})),
        (
            {"prompt": CHAT, "completion": CHAT},
            ("causal_lm", {"prompt": "prompt", "completion": "completion"}),
        ),
        (
            {
                "question_stem": LONG,
                "choices": [{"text": ["x", "y"], "label": ["A", "B"]}] * 8,
                "answerKey": ["A", "B"] * 4,
            },
            (
                "choice",
                {"prompt": "question_stem", "choices": "choices", "answer": "answerKey"},
            ),
        ),
        (
            {"ctx": LONG, "endings": [["a", "b"]] * 8, "label": ["0", "1"] * 4},
            ("choice", {"prompt": "ctx", "choices": "endings", "answer": "label"}),
        ),
        (
            {"question": SHORT, "choices": [["a", "b"]] * 8, "answer": [0, 1] * 4},
            ("choice", {"prompt": "question", "choices": "choices", "answer": "answer"}),
        ),
        (  # Amazon's: what people gave, not the column with the fewest values
            {"rating": [1, 2, 3, 4] * 8, "text": LONG * 4, "verified": ["True", "False"] * 16},
            ("classification", {"text": "text", "label": "rating"}),
        ),
    ],
)
def test_the_task_and_its_columns_are_guessed(
    columns: dict[str, Any], expected: tuple[str, Any]
) -> None:
    assert guess_columns(pa.table(columns)) == expected


@pytest.mark.parametrize(
    ("name", "values", "found"),
    [
        ("hospital", ["a", "b"] * 16, True),
        ("userId", list(range(4)) * 8, True),
        ("Speakers", [f"s{n}" for n in range(4)] * 8, True),
        ("hospital", list(range(8)) * 4, False),  # too few rows each
        ("hospital", ["a"] * 32, False),
        ("hospital", ["a", "b", ""] * 10 + ["a", "b"], False),
        ("hospital", ["a", "b", None] * 10 + ["a", "b"], False),
        ("split", ["train", "test"] * 16, False),
        ("statement", ["a", "b"] * 16, False),
        ("country_code", ["a", "b"] * 16, True),
        ("user_ids", ["a", "b"] * 16, True),
        ("person_age", [30, 40] * 16, False),
        ("source_text", ["a", "b"] * 16, False),
        ("kind", ["a", "b"] * 16, False),
    ],
)
def test_a_client_s_column_is_told_by_a_word_of_its_name_and_several_rows_a_value(
    name: str, values: list[Any], found: bool
) -> None:
    table = pa.table({"text": LONG * 4, "label": YES_NO * 4, name: values})
    own = guess_clients(table, ["text", "label"])
    assert (own[:1] != [] and names_client(own[0].name)) == found


def test_a_client_s_column_is_never_one_that_is_learned() -> None:
    table = pa.table({"text": LONG * 4, "language": YES_NO * 4})
    assert guess_clients(table, ["text", "language"]) == []


def test_a_table_that_fits_no_task_is_refused_with_what_was_seen() -> None:
    with pytest.raises(DataError):
        guess_columns(pa.table({"label": LONG}))
    with pytest.raises(DataError) as caught:
        guess_columns(pa.table({"id": list(range(8)), "blob": LONG}))
    assert "id (number), blob (text); rename columns so, or write" in str(caught.value)


def test_a_column_for_each_class_is_a_label_and_none_of_them_is_left_out() -> None:
    hot = {"anger": [1, 0] * 4, "joy": ["0", "1"] * 4, "fear": [False, True] * 4}
    task, chosen = guess_columns(pa.table({"text": LONG, **hot}))
    assert (task, chosen) == ("multi_label", {"text": "text", "label": ["anger", "joy", "fear"]})
    task, chosen = guess_columns(pa.table({"text": LONG, **hot, "label": YES_NO}))
    assert (task, chosen["label"]) == ("classification", "label")
