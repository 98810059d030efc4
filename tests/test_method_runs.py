"""Claims about whole runs of every method: bytes by hand, resuming, PEFT's view of the adapter."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
import transformers
from method_rows import ROWS
from safetensors.torch import load_file

from rolora.config.load import load_config
from rolora.config.schema import RunConfig
from rolora.errors import ConfigError
from rolora.methods import get_method, method_names
from rolora.model.peft import read_adapter
from rolora.plan.needs import make_plan
from rolora.run import runs
from rolora.run.evaluation import evaluate_adapter
from rolora.run.experiment import Experiment
from rolora.training.rounds import RoundResult

pytestmark = pytest.mark.usefixtures("quick")
every_method = pytest.mark.parametrize("name", method_names())
MODULES, D, K, RANK = 4, 32, 32, 2  # query and value of two layers
HEAD = 3 * 32 + 3
ROUNDS = 3


def configuration(site: Path, name: str, *more: str) -> RunConfig:
    """A few rounds of this method; clients have ranks of their own where they may."""
    ranks = ["lora.rank=[2, 1]"] if get_method(name).heterogeneous_ranks else []
    few = [f"train.rounds={ROUNDS}", "eval.every=9", 'train.cache=""']
    return load_config(site, [f"method.name={name}", *few, *ranks, *more])


@dataclass(frozen=True)
class Finished:
    """A run that has ended."""

    run: runs.Run
    results: list[RoundResult]

    @property
    def folder(self) -> Path:
        return self.run.folder.path

    def rank(self, client: str) -> int:
        """Ranks are dealt out in the order of ids."""
        names = [entry["id"] for entry in self.run.experiment.partition["clients"]]
        own = get_method(self.run.experiment.config.method.name).heterogeneous_ranks
        return (2, 1)[sorted(names).index(client) % 2] if own else 2


@pytest.fixture(scope="module")
def finished(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Finished]:
    place, done = tmp_path_factory.mktemp("runs"), dict[str, Finished]()

    def finish(name: str) -> Finished:
        if name not in done:
            run = runs.start(configuration(site, name), place / name)
            done[name] = Finished(run, list(run.rounds()))
        return done[name]

    return finish


def numbers_up(name: str, rank: int, round: int) -> int:
    """Numbers of one module that a client of this rank sends in a round."""
    row = ROWS[name]
    parts, pieces = row.up[1 - round % 2].split("+"), row.pieces or rank
    return pieces * (D * ("B" in parts) + K * ("A" in parts)) + row.core * ("core" in parts)


@every_method
def test_a_client_sends_as_many_bytes_as_counted_by_hand(
    name: str, finished: Callable[[str], Finished]
) -> None:
    done = finished(name)
    for result in done.results[1:]:
        assert result.rejected == {}
        head = HEAD if ROWS[name].head else 0
        bits = MODULES + 2 if ROWS[name].pieces else 0  # a byte for each of its tensors
        assert result.bytes_up == sum(
            4 * (MODULES * numbers_up(name, done.rank(client), result.round) + head) + bits
            for client in result.cohort
        )


@every_method
def test_a_gradient_that_a_method_starts_from_is_counted_as_sent_by_every_client(
    name: str, finished: Callable[[str], Finished]
) -> None:
    done = finished(name)
    each = 4 * MODULES * D * K if get_method(name).needs_gradient else 0
    assert done.results[0].bytes_up == each * len(done.run.experiment.partition["clients"])


@every_method
def test_a_client_is_handed_as_many_bytes_as_counted_by_hand_when_it_first_takes_part(
    name: str, finished: Callable[[str], Finished]
) -> None:
    done, row = finished(name), ROWS[name]
    beside = row.core + D * K * ("delta" in row.down[0])
    ranks = [RANK if row.pieces else done.rank(client) for client in done.results[1].cohort]
    expected = sum(4 * (MODULES * (rank * (D + K) + beside) + HEAD) for rank in ranks)
    assert done.results[1].bytes_down == (0 if name == "centralized" else expected)


def kept(path: Path) -> dict[str, str]:
    """A hash of the adapter and of everything that clients keep, by file."""
    files = [path / "adapter" / "adapter_model.safetensors", *path.glob("clients/*/*.safetensors")]
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


def untimed(path: Path) -> list[dict[str, object]]:
    lines = [json.loads(text) for text in (path / "rounds.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@every_method
def test_a_stopped_run_resumes_to_the_bytes_of_one_that_was_not(
    name: str, site: Path, finished: Callable[[str], Finished], tmp_path: Path
) -> None:
    run = runs.start(configuration(site, name), tmp_path / "stopped")
    list(itertools.islice(run.rounds(), 1 + 1))  # after round 1
    list(runs.resume(tmp_path / "stopped").rounds())
    assert kept(tmp_path / "stopped") == kept(finished(name).folder)
    assert untimed(tmp_path / "stopped") == untimed(finished(name).folder)
    assert bool(list(tmp_path.glob("stopped/clients/*/round-*"))) == bool(
        get_method(name).personal(1)
    )


@every_method
def test_peft_loads_the_adapter_of_any_method_and_computes_the_same_logits(
    name: str, site: Path, finished: Callable[[str], Finished]
) -> None:
    done = finished(name)
    base, folder = done.run.experiment.base, done.folder / "adapter"
    texts = ["a good film and a dog", "the cat", "a bad plot"]
    inputs = base.tokenizer(texts, padding=True, return_tensors="pt")
    with base.holding(done.results[-1].state.server.adapter), torch.no_grad():
        ours = base.model(**inputs).logits
    with base.holding(read_adapter(folder, base.specs, any_rank=True)), torch.no_grad():
        again = base.model(**inputs).logits
    config = transformers.AutoConfig.from_pretrained(folder / "model_config.json")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(
        site.parent / "model", config=config
    )
    theirs = peft.PeftModel.from_pretrained(plain, folder).eval()
    with torch.no_grad():
        assert torch.allclose(theirs(**inputs).logits, ours, rtol=0, atol=1e-5)
    assert torch.allclose(again, ours, rtol=0, atol=1e-5)
    if get_method(name).shared(1) - {"A"}:
        with base.holding(done.run.experiment.start.server.adapter), torch.no_grad():
            assert not torch.allclose(base.model(**inputs).logits, ours, rtol=0, atol=1e-3)


@every_method
def test_the_adapter_of_any_method_is_evaluated_by_itself_as_in_its_run(
    name: str, site: Path, finished: Callable[[str], Finished]
) -> None:
    done = finished(name)
    test = str(site.parent / "test.csv")
    if get_method(name).personal(1):  # no client has what the folder holds
        with pytest.raises(ConfigError, match=f"holds only the server.s part of {name}"):
            evaluate_adapter(done.folder, test)
    else:
        metrics = evaluate_adapter(done.folder, test)
        assert metrics == pytest.approx(dict(done.results[-1].metrics), rel=1e-4)


# ranks of one's own


def test_ranks_in_a_list_are_dealt_out_by_id_and_a_table_goes_by_its_first_fit(site: Path) -> None:
    listed = load_config(site, ["lora.rank=[4, 1, 2]", "method.name=flora"]).lora
    assert listed.largest == 4
    assert listed.ranks(["d", "a", "c", "b"]) == {"a": 4, "b": 1, "c": 2, "d": 4}
    table = load_config(
        site, ['lora.rank={"big-*" = 8, "big-2" = 1, "*" = 2}', "method.name=flora"]
    ).lora
    assert table.largest == 8
    assert table.ranks(["big-1", "big-2", "small"]) == {"big-1": 8, "big-2": 8, "small": 2}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["method.name=fedit", "lora.rank=[2, 1]"],
            "fedit does not support clients of different ranks: .* flora",
        ),
        (["method.name=flora", 'lora.rank={"client-1" = 2, "x" = 1}'], r"has no rank for client"),
        (["method.name=flora", "lora.rank={}"], "Dictionary should have at least 1 item"),
        (["method.name=flora", "lora.rank=[]"], "lora.rank"),
        (["method.name=flora", "lora.rank=[2, 0]"], "lora.rank"),
        (["method.name=ravan", "lora.rank=3"], "heads = 2 does not divide lora.rank = 3"),
        (["method.name=ravan", "method.heads=0"], "heads = 0 does not divide"),
        (["method.name=fed_sb", "lora.rank=34"], "lora.rank = 34 is more than layer .* can use"),
        (
            ["method.name=la_lora", "train.local_steps=1"],
            "la_lora alternates .*local_steps to at least 2",
        ),
        *(
            (
                [*method, f"aggregate.reducer={rule}"],
                f"{name} averages pieces .* a vote for no change: set aggregate.reducer to 'mean'",
            )
            for name, method in {
                "lora_a2": ["method.name=lora_a2"],
                "hetlora": ["method.name=hetlora", "lora.rank=[2, 1]"],
                "raflora": ["method.name=raflora", "lora.rank=[2, 1]"],
            }.items()
            for rule in ("median", "trimmed_mean")
        ),
        (["method.name=hetlora", "method.gamma=0"], r"hetlora: gamma must be in \(0, 1\], not 0"),
        (["method.name=lora_a2", "method.keep=1.5"], r"lora_a2: keep must be in \(0, 1\], not 1.5"),
        (
            ["method.name=lora_fair", "method.ridge=-1"],
            "ridge must be at least 0, not -1",
        ),
        (["method.name=fedrot_lora", "method.softness=2"], r"softness must be in \[0, 1\], not 2"),
        (
            ["method.name=fedask", "method.oversampling=-1"],
            "oversampling must be at least 0, not -1",
        ),
        (["method.name=fedmomentum", "method.energy=0"], r"energy must be in \(0, 1\], not 0"),
    ],
)
def test_what_a_method_cannot_have_is_refused_in_one_line_before_the_run(
    overrides: list[str], said: str, site: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        runs.start(load_config(site, overrides), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["ravan", "fed_sb"])
def test_a_warm_start_is_refused_where_factors_are_of_the_method_s_own_making(
    name: str, site: Path, finished: Callable[[str], Finished], tmp_path: Path
) -> None:
    warm = f"lora.init_from={finished('fedit').folder / 'adapter'}"
    with pytest.raises(ConfigError, match=f"{name} trains cores, which no PEFT adapter has"):
        runs.start(configuration(site, name, warm), tmp_path / "run")


def test_nothing_is_remembered_of_what_rounding_took_from_factors_that_are_made_anew(
    site: Path, tmp_path: Path
) -> None:
    for name, factors in (("fedsvd", False), ("fedit", True)):
        run = runs.start(configuration(site, name, "wire.up=int8"), tmp_path / name)
        list(run.rounds())
        files = sorted((tmp_path / name / "clients").glob("*/residual-*.safetensors"))
        assert files
        for file in files:
            names = load_file(file).keys()
            assert any("classifier" in key for key in names)
            assert any("lora_" in key for key in names) == factors


@pytest.mark.parametrize(
    "overrides",
    [
        ["method.name=hetlora"],  # all of one rank, so all send every piece
        ["method.name=raflora"],
        ["method.name=flexlora", "lora.rank=[2, 1]"],  # products, which every client has whole
        ["method.name=rolora"],
    ],
)
def test_a_median_is_taken_where_every_client_sends_every_piece(
    overrides: list[str], site: Path, tmp_path: Path
) -> None:
    config = load_config(
        site, [*overrides, "aggregate.reducer=median", "train.rounds=1", "eval.every=9"]
    )
    results = list(runs.start(config, tmp_path / "run").rounds())
    before, after = (result.state.server.adapter for result in results)
    assert before != after


def test_a_client_of_one_step_a_round_is_refused_where_factors_take_turns_between_steps(
    site: Path, tmp_path: Path
) -> None:
    config = load_config(site, ["method.name=la_lora", "train.batch_size=16"])

    def epochs(count: int) -> RunConfig:
        train = config.train.model_copy(update={"local_steps": None, "local_epochs": count})
        return config.model_copy(update={"train": train})

    said = r"la_lora alternates .* client '[^']*' with \d+ rows takes one a round: .*local_epochs"
    with pytest.raises(ConfigError, match=said):
        runs.start(epochs(1), tmp_path / "run")
    with pytest.raises(ConfigError, match=said):
        make_plan(Experiment(epochs(1)))
    assert runs.start(epochs(2), tmp_path / "run").experiment.federation
