"""Claims about preferences: their rows, their losses, and the model that they are measured from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from make_trl import ALPHA, LR, RANK, STEPS, fixed, fixed_model, rows
from states import relative
from test_bank import SETTINGS
from tiny import tiny_llama
from tiny_clients import SHARDS, preferences

from rolora.algorithm.adapter import AdapterState
from rolora.algorithm.method import lora_init
from rolora.algorithm.seeding import generator
from rolora.data.examples import Examples, collate
from rolora.errors import ConfigError, DataError
from rolora.methods import get_method
from rolora.model.base import Base, load_base
from rolora.model.peft import LoraSettings
from rolora.model.prefix import kept_below
from rolora.run.experiment import ready
from rolora.tasks.preference import losses, preference
from rolora.tasks.registry import Task
from rolora.training.local import Work, evaluate, outputs, outputs_of, train_group
from rolora.training.reference import references
from rolora.training.settings import LocalSettings

ORACLE = json.loads(Path(__file__).with_name("trl.json").read_text())["cases"]
LOSSES = ("dpo", "ipo", "kto")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixed_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(str(folder), "causal_lm", LoraSettings(rank=RANK, alpha=ALPHA))


def made(base: Base, given: list[dict[str, Any]], start: Any = None, **options: Any) -> Task:
    """The task that reads these rows, with the reference of the base or of the adapter."""
    columns: dict[str, Any] = {name: name for name in given[0]}
    defaults = {"loss": "dpo", "beta": 0.5, "label_smoothing": 0.0, "max_length": 64}
    task = preference(base, **(columns | defaults | options))
    compared = references(base, task, start)
    return ready(task, lambda found, source: compared(found))


def texts(examples: Examples, base: Base) -> list[str]:
    """Each token sequence as text."""
    one = examples.sequences
    parts = torch.split(one.tokens, one.lengths.tolist())
    return [base.tokenizer.decode(part) for part in parts]


@pytest.mark.parametrize("case", ORACLE, ids=lambda c: f"{c['rows']}, {c['loss']} {c['beta']}")
def test_one_client_trains_as_with_trl(base: Base, case: dict[str, Any]) -> None:
    given = rows()[case["rows"]]
    loss = {"sigmoid": "dpo"}.get(case["loss"], case["loss"])
    task = made(base, given, loss=loss, beta=case["beta"])
    examples = task.encode(pa.Table.from_pylist(given), "rows")
    one = examples.sequences
    ids = [
        " ".join(map(str, part.tolist())) for part in torch.split(one.tokens, one.lengths.tolist())
    ]
    assert ids == [text for pair in case["ids"] for text in pair]

    start = lora_init(base.specs, generator(0, "init"))
    factors = sorted(name for name in start if "lora_A" in name)
    start |= {name: fixed(start[name], number) for number, name in enumerate(factors)}
    summed, ours = 0.0, []
    for steps in range(1, STEPS + 1):
        settings = LocalSettings(steps=steps, batch_size=len(given), optimizer="sgd")
        work = [Work("one", torch.arange(len(given)), start, steps)]
        method = get_method("fedit")
        (end,) = train_group(base, task, examples, work, method, settings, lr=LR, seed=0, round=1)
        ours.append(end.loss * steps - summed)
        summed = end.loss * steps
    assert ours == pytest.approx(case["losses"], abs=1e-4)
    assert abs(ours[0] - ours[-1]) > 0.01
    found, theirs = evaluate(base, task, examples, end.adapter), case["end"]
    assert found["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    if loss != "kto":  # TRL's are those of completions, not of what the loss compares them with
        assert found["accuracy"] == theirs["rewards/accuracies"]
        assert found["margin"] == pytest.approx(theirs["rewards/margins"], abs=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("loss", LOSSES)
def test_clients_in_one_bank_learn_preferences_as_each_does_alone(
    folder: Path, loss: str, dropout: float
) -> None:
    bench, settings = preferences(folder, loss=loss, dropout=dropout), SETTINGS["epochs"]
    work = bench.work(settings)
    together = bench.train(work, settings)
    alone = [bench.train([w], settings)[0] for w in work]
    for w, one, other in zip(work, together, alone, strict=True):
        assert relative(one.adapter, other.adapter) <= 1e-9
        assert one.loss == pytest.approx(other.loss, rel=1e-9)
        assert one.steps == other.steps == settings.num_steps(len(SHARDS[w.client]))
        assert relative(one.adapter, w.start) > 1e-3


def test_the_reference_is_the_base_whatever_the_bank_holds(folder: Path) -> None:
    bench = preferences(folder)
    base, task = bench.base, bench.task
    for name in ("fedit", "flora", "fedex_lora"):
        method = get_method(name)
        adapter = bench.start_of(method)
        if name != "fedit":
            assert adapter.only(frozenset({"delta"}))
        with base.holding(adapter):
            before = dict(base.bank.leaves)
            again = task.encode(TABLE, "rows")
            assert base.bank.leaves == before
            moved = outputs(base, task, again)
        assert not base.bank.leaves
        plain = task.encode(TABLE, "rows")
        assert plain.reference is not None
        assert again.reference is not None
        assert torch.equal(again.reference, plain.reference)
        assert float(outputs(base, task, plain)[:, :2].abs().max()) < 1e-6
        assert float(moved[:, :2].abs().max()) > 0.1


TABLE = pa.Table.from_pylist(
    [
        {"ask": "the cat", "yes": " sat on the mat", "no": " is a dog"},
        {"ask": "a good film", "yes": " with a warm heart", "no": " with no heart"},
        {"ask": "Paris", "yes": " of course", "no": " at all"},
    ]
)


def test_the_reference_of_a_warm_start_is_its_adapter(base: Base) -> None:
    given = rows()["texts"]
    start = lora_init(base.specs, generator(0, "init"))
    start |= {name: fixed(tensor, 3) for name, tensor in start.items()}
    task = made(base, given, start)
    found = evaluate(base, task, task.encode_test(pa.Table.from_pylist(given), "rows"), start)
    assert found["accuracy"] == 0.5
    assert found["margin"] == pytest.approx(0, abs=1e-6)


def test_the_reference_is_computed_once_for_the_same_rows(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, calls = rows()["texts"], list[int]()

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return outputs_of(*arguments)

    monkeypatch.setattr("rolora.training.reference.outputs_of", counted)
    task, table = made(base, given), pa.Table.from_pylist(given)
    one, again = (task.encode(table, "rows").reference for _ in range(2))
    assert one is not None
    assert one is again
    task.encode_test(table.slice(1), "rows")
    assert len(calls) == 2


def test_the_reference_of_many_rows_is_kept_for_other_runs_with_the_same_rows_base_and_threads(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, told, calls = rows()["texts"], list[str](), list[int]()
    table = pa.Table.from_pylist(given * (100 // len(given)))
    start = lora_init(base.specs, generator(0, "init"))

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return outputs_of(*arguments)

    def tracked(items: Any, what: str) -> Any:
        told.append(what)
        return items

    monkeypatch.setattr("rolora.training.reference.outputs_of", counted)

    def found(table: Any, adapter: Any = None, folder: Path = tmp_path / "cache") -> torch.Tensor:
        """As a run finds it, which knows of none before."""
        task = made(base, given)
        compared = references(base, task, adapter, folder, tracked)
        reference = compared(task.encode(table, "rows")).reference
        assert reference is not None
        return reference

    once = made(base, given).encode(table, "rows").reference
    assert once is not None
    calls.clear()
    assert torch.equal(found(table), once)
    assert told == [f"running {len(table)} rows through the model before training, once"]
    file = next((tmp_path / "cache").iterdir())
    assert torch.equal(found(table), once)
    assert len(calls) == 1 + 2  # the task's own
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert torch.equal(found(table), once), "a damaged file is not believed"
    assert len(calls) == 2 + 3
    found(table.slice(1))
    found(table, start)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 7)
        found(table)
    assert len(list((tmp_path / "cache").iterdir())) == 4
    few = found(table.slice(0, 3))
    assert torch.equal(few, found(table.slice(0, 3)))
    assert len(list((tmp_path / "cache").iterdir())) == 4, "a batch is not worth a file"
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert torch.equal(found(table, folder=tmp_path / "open"), once)
    assert not list((tmp_path / "open").iterdir())


def test_smoothed_labels_mix_the_losses_of_both_orders() -> None:
    ratio = torch.tensor([[1.0, -0.5], [0.2, 0.7], [0.0, 0.0]], dtype=torch.float64)
    count = torch.ones_like(ratio)

    def loss(ratio: torch.Tensor, smoothing: float) -> torch.Tensor:
        return losses(ratio, count, None, (), "dpo", 0.7, smoothing)

    mixed = 0.8 * loss(ratio, 0.0) + 0.2 * loss(ratio.flip(1), 0.0)
    assert torch.allclose(loss(ratio, 0.2), mixed, atol=1e-12, rtol=0)


def test_the_metrics_are_means_over_rows_and_no_difference_is_half_right(base: Base) -> None:
    task = made(base, rows()["texts"], beta=0.5)
    examples = task.encode(pa.Table.from_pylist(rows()["texts"]), "rows")
    found = torch.tensor([[1.0, 0, 3, 3], [0, 2, 3, 3], [1, 1, 3, 3], [4, 0, 3, 3]])
    scores = task.score(found, examples)
    assert scores["accuracy"] == 2.5 / 4
    assert scores["margin"] == pytest.approx(0.5 * (1 - 2 + 0 + 4) / 4)
    assert scores["loss"] == pytest.approx(
        sum(torch.log1p(torch.tensor(-0.5 * gap).exp()) for gap in (1, -2, 0, 4)) / 4
    )


def test_kto_measures_each_client_from_its_own_rows() -> None:
    ratio = torch.tensor([[1.0, 0.5], [1.0, 1.5], [0.3, -2.0]], dtype=torch.float64)
    answers, count = torch.tensor([1, 0, 1]), torch.ones_like(ratio)
    found = losses(ratio, count, answers, (2, 1), "kto", 2.0, 0.0)
    gaps = torch.tensor([1.0 - 1.0, 1.0 - 1.0, 0.3 - 0.0], dtype=torch.float64)
    assert torch.allclose(found, 1 - torch.sigmoid(2.0 * gaps))


def test_the_frozen_layers_run_once_for_both_completions(folder: Path, tmp_path: Path) -> None:
    settings = LoraSettings(rank=2, layers=(1,))
    base = load_base(str(folder), "causal_lm", settings)
    task = made(base, rows()["texts"])
    examples = task.encode(pa.Table.from_pylist(rows()["texts"]), "rows")
    kept, note = kept_below(base, examples, tmp_path)
    assert "the layers below the adapters (1)" in note
    order = torch.tensor([2, 0, 3])
    adapter = AdapterState(
        {s.name: fixed(torch.empty(s.shape), 5) for s in base.specs.tensors}, base.specs.scaling
    )
    found = []
    for given in (examples, kept):
        batch = collate(given, order, base.tokenizer.pad_token_id)
        with base.holding(adapter), base.running(batch) as running:
            found.append(task.loss(base.model, running)[0])
    assert kept.prefix is not None
    assert float((found[0] - found[1]).abs().max()) < 1e-5


def test_a_prompt_that_is_left_out_is_what_both_begin_with(base: Base) -> None:
    each = {
        name: texts(made(base, given).encode(pa.Table.from_pylist(given), "rows"), base)
        for name, given in rows().items()
    }
    assert each["whole texts"] == each["texts"]
    assert each["whole chats"] == each["chats"]
    assert each["chats"][0].startswith("<|im_start|>user\nthe cat sat on<|im_end|>")


USER, BOT = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}
DOG = {"role": "assistant", "content": "the dog"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": " a", "rejected": " a"}, "'chosen' and 'rejected' are the same"),
        ({"chosen": " ", "rejected": " a"}, "'chosen' is empty"),
        ({"chosen": "a", "rejected": ""}, "'rejected' is empty"),
        ({"chosen": "a", "rejected": None}, "'rejected' is missing in row 2"),
        ({"chosen": [USER, BOT], "rejected": [USER, BOT]}, "are the same"),
        ({"chosen": [USER, BOT], "rejected": [USER]}, "'rejected' must end with one message"),
        ({"chosen": [USER, BOT], "rejected": [BOT]}, "'chosen' must end with one message"),
        ({"chosen": [USER, BOT], "rejected": [USER, USER]}, "'rejected' must end with one"),
        ({"chosen": [USER, BOT], "rejected": [USER, {**BOT, "content": " "}]}, "'rejected' is e"),
        ({"chosen": [USER, BOT], "rejected": "text"}, "'rejected' is not a list of messages"),
        ({"chosen": [USER, BOT], "rejected": [USER, {"role": "assistant"}]}, "message 2 has no"),
        ({"chosen": [BOT], "rejected": [DOG]}, "'chosen' must end with one message"),
    ],
)
def test_a_row_that_is_no_preference_is_named(base: Base, row: dict[str, Any], said: str) -> None:
    talks = isinstance(row["chosen"], list)
    good = {
        "chosen": [USER, BOT] if talks else "a b",
        "rejected": [USER, DOG] if talks else "a c",
    }
    columns = {key: [good[key], row[key]] for key in row}
    table = pa.table(columns) if not talks or row["rejected"] != "text" else mixed(columns)
    with pytest.raises(DataError) as caught:
        made(base, [row]).encode(table, "rows")
    assert said in str(caught.value)
    assert "row 2" in str(caught.value)
    assert "\n" not in str(caught.value)


def mixed(columns: dict[str, list[Any]]) -> Any:
    """A table of values that have no one type, as a JSON file's can."""
    from rolora.data.readers import KEPT

    kept = {
        name: pa.ExtensionArray.from_storage(KEPT, pa.array([json.dumps(v) for v in values]))
        for name, values in columns.items()
    }
    return pa.table(kept)


@pytest.mark.parametrize("label", ["maybe", "2", None])
def test_a_label_that_is_neither_true_nor_false_is_named(base: Base, label: Any) -> None:
    given = [{"prompt": "a", "completion": " b", "label": value} for value in ("true", label)]
    with pytest.raises(DataError, match=r"'label' is .* row 2"):
        made(base, given, loss="kto").encode(pa.Table.from_pylist(given), "rows")


def test_chats_need_a_template_and_one_column_of_prompts(base: Base, tmp_path: Path) -> None:
    given = rows()["chats"]
    table = pa.Table.from_pylist(given)
    task = made(base, given, prompt=["prompt", "prompt"])
    with pytest.raises(ConfigError, match="the completions are chats: name one"):
        task.encode(table, "rows")
    other = load_base(str(tiny_llama(tmp_path / "m")), "causal_lm", LoraSettings(rank=2))
    other.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template, so the chats in 'chosen'"):
        made(other, given).encode(table, "rows")
