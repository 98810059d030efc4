"""Claims about completions, chats, their loss, generation, and multiple choice."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from tiny import tiny_llama
from torch.nn import functional
from transformers import GraniteConfig, GraniteForCausalLM

from rolora.algorithm.adapter import AdapterState
from rolora.algorithm.seeding import generator
from rolora.data.examples import Examples, collate
from rolora.data.readers import kept
from rolora.errors import ConfigError, DataError
from rolora.model.base import Base, load_base
from rolora.model.peft import LoraSettings
from rolora.tasks import causal_lm, generation
from rolora.tasks.causal_lm import TokenLoss, require_plain_logits, score
from rolora.tasks.causal_lm import causal_lm as build
from rolora.tasks.choice import choice
from rolora.tasks.choice import score as score_choices
from rolora.tasks.generation import answer_accuracy, answer_metrics, generate
from rolora.tasks.registry import Task
from rolora.tasks.spans import encode_marked, joined, last_span, masks

PAIRS = pa.table(
    {
        "ask": ["the cat sat on", "what is the capital of France?", "", "a good"],
        "say": [" the mat", " Paris", "no heart at all", " film with a warm heart and a plot"],
    }
)
CHAT = [
    {"role": "system", "content": "you answer"},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on the mat"},
    {"role": "user", "content": "the dog"},
    {"role": "assistant", "content": "looked"},
]
ROWS = torch.arange(4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tiny_llama(tmp_path_factory.mktemp("models") / "llama")
    return load_base(str(folder), "causal_lm", LoraSettings(rank=2), dtype=torch.float64)


@pytest.fixture
def task(base: Base) -> Task:
    return build(base, prompt="ask", completion="say", messages=None, max_length=64)


def chat_task(base: Base, max_length: int = 64) -> Task:
    return build(base, prompt=None, completion=None, messages="chat", max_length=max_length)


def adapter(base: Base, seed: int) -> AdapterState:
    rng = generator(seed, "test")
    tensors = {
        spec.name: torch.randn(spec.shape, generator=rng, dtype=torch.float64) * 0.3
        for spec in base.specs.tensors
    }
    return AdapterState(tensors, base.specs.scaling)


def trained_text(base: Base, examples: Examples, row: int = 0) -> str:
    shown = masks(examples, base.tokenizer)[row]
    return "".join(text if wanted else "·" for text, wanted in shown)


def predicted(batch: Any) -> torch.Tensor:
    """(rows, length) 1 where a token is to be predicted."""
    ids = batch.inputs["input_ids"]
    return torch.zeros(ids.numel()).index_fill(0, batch.targets, 1).view(ids.shape)


def full_loss(base: Base, batch: Any) -> torch.Tensor:
    """Per row, summed cross-entropy through the whole model's logits."""
    logits = base.model(**batch.inputs).logits[:, :-1]
    target = batch.inputs["input_ids"][:, 1:]
    each = functional.cross_entropy(logits.mT, target, reduction="none")
    summed: torch.Tensor = (each * predicted(batch)[:, 1:]).sum(dim=1)
    return summed


def test_the_loss_is_what_transformers_computes_with_labels_of_minus_100(
    base: Base, task: Task
) -> None:
    batch = collate(task.encode(PAIRS, "train"), ROWS, base.tokenizer.pad_token_id)
    labels = batch.inputs["input_ids"].masked_fill(predicted(batch) == 0, -100)
    base.bank.load([adapter(base, 1)])
    try:
        theirs = base.model(**batch.inputs, labels=labels)
        total, count = task.loss(base.model, batch)
    finally:
        base.bank.unload()
    assert count.tolist() == (labels != -100).sum(dim=1).tolist()
    ours = float(total.sum() / count.sum())
    assert ours == pytest.approx(float(theirs.loss), rel=1e-6)  # transformers rounds to float32
    exact = functional.cross_entropy(theirs.logits[:, :-1].mT, labels[:, 1:], ignore_index=-100)
    assert abs(ours - float(exact)) < 1e-10


def test_gradients_of_a_bank_of_two_are_those_through_all_logits(
    base: Base, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        causal_lm, "CHUNK_LOGITS", 3 * len(base.tokenizer)
    )  # three tokens at a time
    batch = collate(task.encode(PAIRS, "train"), ROWS, base.tokenizer.pad_token_id)
    weights = torch.tensor([1.0, 0.5, 2.0, 0.25], dtype=torch.float64)
    base.bank.load([adapter(base, 1), adapter(base, 2)])
    leaves = [leaf.requires_grad_() for leaf in base.bank.leaves.values()]
    try:
        total, _ = task.loss(base.model, batch)
        ours = torch.autograd.grad((total * weights).sum(), leaves)
        theirs = torch.autograd.grad((full_loss(base, batch) * weights).sum(), leaves)
    finally:
        base.bank.unload()
    for mine, other in zip(ours, theirs, strict=True):
        assert float(other.abs().max()) > 1e-3
        assert float((mine - other).abs().max()) < 1e-10


def test_a_row_s_loss_does_not_depend_on_the_rows_beside_it(base: Base, task: Task) -> None:
    examples = task.encode(PAIRS, "train")
    pad = base.tokenizer.pad_token_id
    together, _ = task.loss(base.model, collate(examples, ROWS, pad))
    for row in ROWS:
        alone, _ = task.loss(base.model, collate(examples, row.view(1), pad))
        assert abs(float(alone - together[row])) < 1e-10


def test_an_output_embedding_s_bias_counts_in_loss_and_gradient() -> None:
    rng = generator(0, "test")
    hidden, weight, bias = (
        torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((5, 4), (9, 4), (9,))
    )
    target = torch.tensor([0, 8, 3, 3, 1])
    hidden.requires_grad_()
    ours = TokenLoss.apply(hidden, weight, bias, target)  # type: ignore[no-untyped-call]
    theirs = functional.cross_entropy(hidden @ weight.T + bias, target, reduction="none")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    factors = torch.arange(5.0, dtype=torch.float64)
    (mine,) = torch.autograd.grad((ours * factors).sum(), hidden)
    (other,) = torch.autograd.grad((theirs * factors).sum(), hidden)
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_logits_of_a_bfloat16_model_are_raised_to_float32() -> None:
    rng = generator(0, "test")
    hidden, weight = (torch.randn(s, generator=rng).bfloat16() for s in ((5, 64), (300, 64)))
    target = torch.arange(5)
    ours = TokenLoss.apply(hidden.requires_grad_(), weight, None, target)  # type: ignore[no-untyped-call]
    logits = functional.linear(hidden, weight).float()
    theirs = functional.cross_entropy(logits, target, reduction="none")
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(ours.sum(), hidden)
    assert gradient.dtype == torch.bfloat16


def test_only_the_completion_and_the_end_of_text_are_trained_on(base: Base, task: Task) -> None:
    examples = task.encode(PAIRS, "train")
    assert trained_text(base, examples).lstrip("·") == " the mat<|im_end|>"
    shown = masks(examples, base.tokenizer)[0]
    assert "".join(text for text, wanted in shown if not wanted) == "the cat sat on"


def test_a_token_across_the_border_belongs_to_the_completion(base: Base) -> None:
    rows = [joined("the cat sat on the ", "mat")]  # the space is part of the token " mat"
    examples = encode_marked(base.tokenizer, rows, ["row 1"], 64, special=True, end=False)
    assert trained_text(base, examples).lstrip("·") == " mat"


def test_a_row_s_first_token_is_never_predicted(base: Base, task: Task) -> None:
    examples = task.encode(PAIRS, "train")
    assert examples.targets[examples.offsets[:-1]].tolist() == [0, 0, 0, 0]
    assert trained_text(base, examples, 2) == "· heart at all<|im_end|>"


def test_a_chat_is_trained_on_assistant_turns_with_their_end_marks(base: Base) -> None:
    examples = chat_task(base).encode(pa.table({"chat": [CHAT]}), "train")
    shown = masks(examples, base.tokenizer)[0]
    assert "".join(text for text, _ in shown) == base.tokenizer.apply_chat_template(
        CHAT, tokenize=False
    )
    turns = trained_text(base, examples).split("·")
    assert [turn for turn in turns if turn] == ["sat on the mat<|im_end|>\n", "looked<|im_end|>\n"]


def test_of_chats_in_two_columns_only_the_completion_s_turns_are_trained_on(base: Base) -> None:
    """As if the answers in the prompt had weight 0."""
    before = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "a film"},
        {"role": "user", "content": "and now?"},
    ]
    after = [{"role": "assistant", "content": "the dog"}]
    silent = [before[0], {**before[1], "weight": 0}, before[2]]
    two = causal_lm.causal_lm(base, prompt="prompt", completion="completion", max_length=64)
    one = causal_lm.causal_lm(base, messages="messages", max_length=64)
    found = two.encode(pa.table({"prompt": [before], "completion": [after]}), "rows")
    expected = one.encode(pa.table({"messages": [[*silent, *after]]}), "rows")
    assert found.tokens.equal(expected.tokens)
    assert found.targets.equal(expected.targets)


def test_a_text_without_a_prompt_is_trained_on_whole_and_cannot_be_continued(base: Base) -> None:
    task = causal_lm.causal_lm(base, completion="text", max_length=64)
    table = pa.table({"text": ["the cat sat"]})
    found = task.encode(table, "rows")
    assert found.targets[1:].all()
    assert task.predict is not None
    with pytest.raises(ConfigError, match="nothing to continue"):
        task.predict(table, "rows", lambda examples: examples.tokens, 8)


def test_a_row_too_long_keeps_its_end_and_is_counted(base: Base) -> None:
    table = pa.table({"chat": [CHAT, CHAT[:3][-2:]]})
    whole = chat_task(base).encode(table, "train")
    cut = chat_task(base, max_length=30).encode(table, "train")
    assert (whole.truncated, cut.truncated) == (0, 1)
    assert int(whole.lengths[0]) > 30
    first = int(whole.lengths[0])
    assert cut.tokens[:30].tolist() == whole.tokens[first - 30 : first].tolist()
    assert trained_text(base, cut).endswith("looked<|im_end|>\n")


def test_keys_that_only_other_chats_have_do_not_reach_the_template(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages %}{{ m.content }}{% if 'name' in m %}!{% endif %}{% endfor %}"
    monkeypatch.setattr(base.tokenizer, "chat_template", template)
    loud = [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "hi"}]
    examples = chat_task(base).encode(pa.table({"chat": [loud, CHAT[:3]]}), "train")
    texts = ["".join(text for text, _ in row) for row in masks(examples, base.tokenizer)]
    assert texts == ["a!hi", "you answerthe catsat on the mat"]


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([{"role": "user", "content": "a"}], "row 2: no message with role 'assistant'"),
        ([CHAT[1], {"role": "assistant", "content": " "}], "row 2: no message with role 'assist"),
        (CHAT[2:], "row 2: the first message is the assistant's"),
        ([{"role": "assistant"}], "row 2: message 1 has no text under 'content'"),
        ([{"content": "a"}], "row 2: message 1 has no text under 'role'"),
        (None, "row 2: messages must be a list"),
    ],
)
def test_a_chat_that_cannot_be_learned_is_named_by_row(base: Base, chat: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        chat_task(base).encode(pa.table({"chat": [CHAT, chat]}), "train")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages | length }}{{ messages[-1].content }}", "row 1: .* message 3 differently"),
        ("{{ raise_exception('no system turns') }}", "row 1: .* refuses .*no system turns"),
    ],
)
def test_a_template_that_breaks_the_prefix_or_refuses_is_named_by_row(
    base: Base, monkeypatch: pytest.MonkeyPatch, template: str, message: str
) -> None:
    monkeypatch.setattr(base.tokenizer, "chat_template", template)
    with pytest.raises(DataError, match=message):
        chat_task(base).encode(pa.table({"chat": [CHAT]}), "train")


def test_an_empty_completion_is_named_by_row(task: Task) -> None:
    with pytest.raises(DataError, match="data, row 2: 'say' is empty"):
        task.encode(pa.table({"ask": ["a", "b"], "say": ["a", " "]}), "data")


def test_a_completion_of_which_no_token_can_be_predicted_is_named_by_row(base: Base) -> None:
    task = build(base, prompt="ask", completion="say", messages=None, max_length=1)
    with pytest.raises(DataError, match="data, row 1: there is no token to learn"):
        task.encode(PAIRS, "data")


def test_a_tokenizer_that_cannot_serve_is_refused(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base.tokenizer, "chat_template", None)
    with pytest.raises(ConfigError, match=r"no chat template.*use data\.prompt"):
        chat_task(base)
    monkeypatch.setattr(type(base.tokenizer), "is_fast", False)
    with pytest.raises(ConfigError, match="slow tokenizer"):
        chat_task(base)


def test_models_that_scale_or_cap_their_logits_are_refused(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 20}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.random.fork_rng():
        plain = GraniteForCausalLM(GraniteConfig(**small, **heads, logits_scaling=1.0))
        scaled = GraniteForCausalLM(GraniteConfig(**small, **heads, logits_scaling=8.0))
    require_plain_logits(plain)
    with pytest.raises(ConfigError, match="GraniteForCausalLM scales or caps"):
        require_plain_logits(scaled)
    monkeypatch.setattr(base.model.config, "final_logit_softcapping", 30.0, raising=False)
    with pytest.raises(ConfigError, match="LlamaForCausalLM scales or caps"):
        require_plain_logits(base.model)


def test_perplexity_is_per_token_over_all_rows_and_infinite_on_overflow(
    base: Base, task: Task
) -> None:
    examples = task.encode(PAIRS, "train")
    batch = collate(examples, ROWS, base.tokenizer.pad_token_id)
    with torch.inference_mode():
        metrics = task.score(task.outputs(base.model, batch), examples)
        expected = float(full_loss(base, batch).sum() / len(batch.targets))
    assert metrics["loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert score(torch.tensor([[1e6, 1.0]]), examples)["perplexity"] == math.inf


def test_generation_is_greedy_and_reads_the_loaded_client(base: Base) -> None:
    prompts = [base.tokenizer(text)["input_ids"] for text in ("the cat", "a", "what is the dog")]
    plain = generate(base, prompts, 6, batch_size=2)
    base.bank.load([adapter(base, 3)])
    try:
        tuned = generate(base, prompts, 6, batch_size=2)
        expected = [greedy(base, prompt, 6) for prompt in prompts]
    finally:
        base.bank.unload()
    assert tuned == expected
    assert plain != tuned


def greedy(base: Base, prompt: list[int], steps: int) -> str:
    """One row at a time, no padding, no cache."""
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == base.tokenizer.eos_token_id:
            break
    text: str = base.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    return text


def test_exact_match_compares_the_last_completion_but_not_white_space(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = encode_marked(
        base.tokenizer,
        [joined("the cat", " sat on"), joined("a bad film", " and a plot")],
        ["row 1", "row 2"],
        64,
        special=True,
        end=False,
    )
    lengths: list[int] = []

    def written(base: Base, prompts: list[list[int]], most: int) -> list[str]:
        lengths.append(most)
        return ["sat  on\n", "and aplot"][: len(prompts)]

    monkeypatch.setattr(generation, "generate", written)
    assert answer_metrics(base, examples, 1) == {"exact_match": 1.0}
    assert answer_metrics(base, examples, 2) == {"exact_match": 0.5}
    assert lengths == [len(last_span(examples, row)[1]) for row in (0, 1)]


def test_an_answer_is_what_the_pattern_finds_first_in_the_text() -> None:
    pattern = "true|false|answer[1-5]"
    right = "the correct answer is answer2"
    written = ["answer2", "It is answer2, not answer1.", "answer1 or answer2", "I cannot say", ""]
    assert answer_accuracy([(text, right) for text in written], pattern) == 2 / 5
    with pytest.raises(DataError, match=r"eval\.answer = .* finds nothing in .* 'solution1'"):
        answer_accuracy([("answer1", "solution1")], pattern)


def test_a_prompt_without_room_for_an_answer_is_refused_and_a_long_one_cut(base: Base) -> None:
    long = base.tokenizer("the cat sat on the mat " * 40)["input_ids"]
    assert generate(base, [long], 8) == [greedy(base, long[-120:], 8)]
    with pytest.raises(ConfigError, match="no room for 128 new tokens"):
        generate(base, [long], 128)


QUESTIONS = pa.table(
    {
        "q": ["the cat sat on", "what is the capital of France?", "a film with"],
        "options": [["the mat", "the dog"], ["heart", "Paris", "plot"], ["B", "A"]],
        "right": ["A", "Paris", "A"],
    }
)


def choice_task(base: Base) -> Task:
    return choice(base, prompt="q", choices="options", answer="right", max_length=64)


def test_training_takes_one_row_per_question_and_a_test_one_per_choice(base: Base) -> None:
    task = choice_task(base)
    trained, tested = task.encode(QUESTIONS, "train"), task.encode_test(QUESTIONS, "test")
    assert len(trained) == 3
    shown = [trained_text(base, trained, row).lstrip("·") for row in range(3)]
    assert shown == [" the mat", " Paris", " A"]
    assert tested.groups is not None
    assert tested.groups.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert tested.answers is not None
    assert tested.answers.tolist() == [0, 1, 1]
    assert trained_text(base, tested, 4).lstrip("·") == " plot"


def test_the_likeliest_choice_is_picked_by_sum_and_by_mean_per_token(base: Base) -> None:
    examples = choice_task(base).encode_test(QUESTIONS, "test")
    answers = [[3.0, 1], [2.0, 1], [4.0, 4], [3.0, 1], [9.0, 1], [2.0, 2], [1.0, 1]]
    metrics = score_choices(torch.tensor(answers), examples)
    assert metrics["choice_accuracy"] == pytest.approx(1 / 3 + 1 / 3)
    assert metrics["choice_accuracy_norm"] == 0.0
    assert metrics["loss"] == pytest.approx((3.0 + 3.0 + 1.0) / 3)


def test_the_right_choice_is_told_by_its_letter_its_name_its_number_or_its_text(
    base: Base,
) -> None:
    named: list[Any] = [{"text": ["heart", "Paris"], "label": ["1", "2"]}] * 2
    listed: list[Any] = [["heart", "Paris"]] * 5
    right: list[list[Any]] = [["2", "1"], ["B", "1", 1, "Paris", "heart"]]
    found = []
    for options, answers in zip((named, listed), right, strict=True):
        table = pa.table(
            {
                "q": ["the capital"] * len(answers),
                "options": kept(options),
                "right": kept(answers),
            }
        )
        tested = choice_task(base).encode_test(table, "test")
        assert tested.answers is not None
        found.append(tested.answers.tolist())
    assert found == [[1, 0], [1, 1, 1, 1, 0]]


@pytest.mark.parametrize(
    ("options", "right", "message"),
    [
        ([["a", "b"]], [2], "row 1: answer 2 is not one of the 2 choices"),
        ([["a", "b"]], ["C"], "row 1: answer 'C' is not one"),
        ([["a", "a"]], ["a"], "row 1: answer 'a' is not one"),
        ([["a", "b"]], [None], "row 1: answer None is not one"),
        ([["a"]], [0], "row 1: 'options' must be a list of at least two"),
        (["a b"], [0], "row 1: 'options' must be a list of at least two"),
    ],
)
def test_a_question_without_one_right_choice_is_named_by_row(
    base: Base, options: list[Any], right: list[Any], message: str
) -> None:
    table = pa.table({"q": ["x"], "options": options, "right": right})
    with pytest.raises(DataError, match=message):
        choice_task(base).encode(table, "train")


def test_a_float32_base_gives_float32_losses(tmp_path: Path) -> None:
    base = load_base(str(tiny_llama(tmp_path)), "causal_lm", LoraSettings())
    task = build(base, prompt="ask", completion="say", messages=None, max_length=64)
    batch = collate(task.encode(PAIRS, "train"), ROWS, base.tokenizer.pad_token_id)
    assert task.loss(base.model, batch)[0].dtype == torch.float32
