"""``rolora chat``: the base and the adapter each answer, in the form of the training."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from test_predict import written
from tiny_site import make_site

from rolora.cli.main import main
from rolora.config.load import load_config
from rolora.errors import ConfigError
from rolora.run import runs
from rolora.run.chat import AFTER, BEFORE, speakers
from rolora.run.prediction import predict

pytestmark = pytest.mark.usefixtures("quick")

# turns as the tokenizer's words, so that what is written can be read again
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} . {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory, quick: None) -> Path:
    """The folder of a run on chats."""
    with pytest.MonkeyPatch.context() as patch:
        # the model is saved by `written`, and its template must be there when the run starts
        start = runs.start

        def with_template(config: Any, path: Path) -> Any:
            (config.root / "model" / "chat_template.jinja").write_text(TEMPLATE)
            return start(config, path)

        patch.setattr("rolora.run.runs.start", with_template)
        return written(tmp_path_factory.mktemp("chats"), messages="chat")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, quick: None) -> Path:
    """The folder of a run on prompts and completions."""
    place = tmp_path_factory.mktemp("plain")
    return written(place, prompt="prompt", completion="completion", separator=" :")


def predicted(place: Path, row: dict[str, Any]) -> str:
    (place / "asked.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = predict(place / "run", str(place / "asked.jsonl"), max_new_tokens=8)
    return str(found["completion"])


def test_the_adapter_answers_a_conversation_as_predict_does(chats: Path) -> None:
    both = speakers(chats / "run", None)
    said = ["a good film", "the cat", "a bad film"]
    turns = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant", "user"), said, strict=True)
    ]
    pieces: list[str] = []
    answer = both.answer(AFTER, said, 8, pieces.append)
    assert answer == predicted(chats, {"chat": turns})
    assert "".join(pieces).strip() == answer.strip() != ""


def test_the_base_answers_as_before_training(chats: Path) -> None:
    both = speakers(chats / "run", None)
    before = both.answer(BEFORE, ["a good film"], 8)
    assert before != both.answer(AFTER, ["a good film"], 8)
    assert before == both.answer(BEFORE, ["a good film"], 8)  # and the adapter leaves no trace


def test_a_run_on_prompts_is_asked_as_it_was_trained(plain: Path) -> None:
    both = speakers(plain / "run", None)
    assert both.template is None
    answer = both.answer(AFTER, ["forgotten", "as well", "what is the capital of France?"], 8)
    assert answer == predicted(plain, {"prompt": "what is the capital of France?"})


def test_a_model_that_does_not_write_is_refused(tmp_path: Path) -> None:
    config = load_config(make_site(tmp_path), ["train.rounds=1"])
    list(runs.start(config, tmp_path / "run").rounds())
    with pytest.raises(ConfigError, match="classification, and its model does not write"):
        speakers(tmp_path / "run", None)


def chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: bytes, *words: Any
) -> tuple[int, str, str]:
    """Exit code and output of the command with this standard input."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
    monkeypatch.setattr("sys.argv", ["rolora", "chat", *map(str, words), "--max-new-tokens", "8"])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0), *capsys.readouterr()


def test_lines_that_are_piped_in_are_answered_until_their_end(
    chats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = b"a good film\n\nthe cat\n"
    code, out, _ = chat(monkeypatch, capsys, typed, chats / "run", "--json")
    first, second = map(json.loads, out.splitlines())
    both = speakers(chats / "run", None)
    for who in (BEFORE, AFTER):  # each remembers what it said itself
        assert second[who] == both.answer(who, ["a good film", first[who], "the cat"], 8)
    assert (code, second["prompt"]) == (0, "the cat")
    code, out, _ = chat(monkeypatch, capsys, typed, chats / "run")
    shown = [line[:8].strip() for line in out.splitlines() if line]
    assert (code, shown) == (0, ["you", "before", "after"] * 2)


def test_input_that_is_not_text_is_one_line_of_error(
    chats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = chat(monkeypatch, capsys, b"\xff\xfe\n", chats / "run")
    assert (code, err.splitlines()[-1]) == (3, "rolora: the prompt is not UTF-8 text")


@pytest.mark.parametrize("given", ["text", "input"])
def test_a_prompt_of_several_lines_is_answered_as_one(
    given: str, plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "the cat\n\na good film"
    words, data = (text, b"more\n") if given == "text" else ("-", f"{text}\n".encode())
    code, out, _ = chat(monkeypatch, capsys, data, plain / "run", "--json", "--prompt", words)
    (turn,) = map(json.loads, out.splitlines())
    both = speakers(plain / "run", None)
    assert code == 0
    assert turn == {"prompt": text, **{who: both.answer(who, [text], 8) for who in both.adapters}}
    code, out, _ = chat(monkeypatch, capsys, data, plain / "run", "--prompt", words)
    assert out.startswith(f"\nyou     {text}\nbefore  ")
    empty = chat(monkeypatch, capsys, b"\n", plain / "run", "--prompt", "-")
    assert (empty[0], empty[2]) == (2, "rolora: --prompt is empty\n")
