"""Claims about runs across sites: the same bits as on one machine, and little that travels."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
from calls import calls, configuration, make_place, remote
from tiny_site import write_rows

from rolora.algorithm.adapter import tensor_hash
from rolora.config.load import load_config
from rolora.errors import ConfigError
from rolora.flower.message import SiteMessage
from rolora.flower.transport import poll_interval
from rolora.run import runs
from rolora.run.runs import Run
from rolora.sites.coordinator import across
from rolora.sites.site import Site
from rolora.training.rounds import RoundResult

pytestmark = pytest.mark.usefixtures("quick")

FEW = "train.rounds=3"
RANKS = 'lora.rank={"site-ann" = 2, "site-b*" = 1, "*" = 3}'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("sites"))


def bits(run: Run, last: RoundResult) -> dict[str, str]:
    return {name: tensor_hash(t) for name, t in last.state.server.adapter.items()}


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("method.name=fedit",),
        ("method.name=local",),
        ("wire.up=int8",),
        ("lora.dropout=0.3", "train.local_epochs=1"),
        ("data.client_test=0.3",),
        ("train.b_lr_ratio=4", "aggregate.optimizer=fedavgm", "method.b_rounds=2"),
        ("aggregate.optimizer=fedadam", "method.orthogonal_a=true"),
        ("method.name=fedex_lora", FEW),
        ("method.name=flora", RANKS, FEW),
        ("method.name=hetlora", "method.gamma=0.5", RANKS, FEW),
        ("method.name=flexlora", RANKS, "wire.up=int8", FEW),
        ("method.name=ravan", FEW),
        ("method.name=fedsa_lora", "data.client_test=0.3", FEW),
        ("method.name=la_lora", "train.optimizer=sgd", "train.momentum=0.9", FEW),
        ("method.name=lora_a2", "method.keep=0.3", RANKS, FEW),
        ("method.name=lora_a2", "wire.up=int8", FEW),
        ("aggregate.max_share=0.4", FEW),
        ("method.turn=1.0", "method.b_rounds=2", "wire.up=int8"),
        ("method.turn=0.5", FEW),
        ("train.keep_moments=true", "train.head_lr_ratio=2", "train.participation=0.6"),
    ],
    ids=" ".join,
)
def test_a_run_across_sites_ends_with_the_bits_of_one_on_one_machine(
    overrides: tuple[str, ...], place: Path, tmp_path: Path
) -> None:
    changed = [o for o in overrides if not o.startswith("train.local_epochs")]
    config = configuration(place, *changed)
    if len(changed) < len(overrides):
        train = config.train.model_copy(update={"local_steps": None, "local_epochs": 1})
        config = config.model_copy(update={"train": train})
    here = runs.start(config, tmp_path / "here")
    *_, mine = here.rounds()
    there = remote(config, tmp_path / "there", calls(place, tmp_path))
    *_, theirs = there.rounds()
    assert bits(there, theirs) == bits(here, mine)
    assert theirs.cohort == mine.cohort
    assert theirs.clients == mine.clients
    assert (theirs.bytes_up, theirs.bytes_down) == (mine.bytes_up, mine.bytes_down)
    assert theirs.rejected == {}
    assert theirs.client_metrics == mine.client_metrics


def test_second_test_rows_are_measured_across_sites_as_on_one_machine(
    place: Path, tmp_path: Path
) -> None:
    config = configuration(place, FEW, "data.second_test=site-ann.csv")
    *_, mine = runs.start(config, tmp_path / "here").rounds()
    *_, theirs = remote(config, tmp_path / "there", calls(place, tmp_path)).rounds()
    assert "accuracy/second" in mine.metrics
    assert theirs.metrics == mine.metrics


def test_a_site_that_claims_more_than_half_of_all_rows_is_named_unless_that_is_limited(
    tmp_path: Path,
) -> None:
    place = make_place(tmp_path)
    write_rows(place / "site-bob.csv", 60)
    for number, limits in enumerate([(), ("aggregate.max_share=0.5",)]):
        transport = calls(place, tmp_path / str(number))
        remote(
            configuration(place, *limits), tmp_path / f"out-{number}", transport
        ).experiment.prepare()
        said = [line for line in transport.notified if "more than half" in line]
        assert len(said) == (0 if limits else 1)
        assert limits or "site-bob" in said[0]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("method.name=fed_sb",), "fed_sb starts from a gradient .* use ravan"),
        (
            ("method.name=centralized",),
            "centralized trains on all rows in one place, .* or use fedit",
        ),
        (("method.name=flora", "lora.rank=[2, 4]"), "lora.rank is one number or a table of names"),
        ((RANKS,), "rolora does not support clients of different ranks"),
    ],
)
def test_what_sites_cannot_have_is_refused_in_one_line_before_anyone_is_waited_for(
    overrides: tuple[str, ...], said: str, place: Path, tmp_path: Path
) -> None:
    transport = calls(place, tmp_path)
    with pytest.raises(ConfigError, match=said) as caught:
        remote(configuration(place, *overrides), tmp_path / "run", transport)
    assert "\n" not in str(caught.value)
    assert transport.passed == []
    assert not (tmp_path / "run").exists()


def test_cohorts_come_from_the_server_s_seed_which_no_site_and_no_page_is_shown(
    place: Path, tmp_path: Path
) -> None:
    drawn = {}
    for seed in (7341998265, 5120377481):
        transport, out = calls(place, tmp_path / f"{seed}"), tmp_path / f"run-{seed}"
        run = remote(configuration(place, f"server_seed={seed}", FEW), out, transport)
        drawn[seed] = [result.cohort for result in run.rounds()]
        sent = [f"{question.head} {question.body!r}" for _, question, _ in transport.passed]
        assert sent
        assert not [text for text in sent if str(seed) in text]
        assert load_config(out / "config.toml").server_seed == seed
        for shown in ("report.html", "adapter/rolora.json", "rounds.jsonl"):
            assert str(seed) not in (out / shown).read_text()
    assert len({str(cohorts) for cohorts in drawn.values()}) == 2


def test_a_server_s_seed_that_is_not_set_is_drawn_once_for_a_run_and_kept(
    place: Path, tmp_path: Path
) -> None:
    config = configuration(place, FEW).model_copy(update={"server_seed": None})
    seeds = []
    for name in ("one", "two"):
        remote(config, tmp_path / name, calls(place, tmp_path / f"{name}-sites"))
        seeds.append(load_config(tmp_path / name / "config.toml").server_seed)
    assert None not in seeds
    assert len(set(seeds)) == 2
    build = across(calls(place, tmp_path / "one-sites"), print)
    assert runs.resume(tmp_path / "one", build=build).experiment.config.server_seed == seeds[0]


def test_a_run_whose_folder_has_moved_is_the_same_run_at_its_sites(
    place: Path, tmp_path: Path
) -> None:
    transport = calls(place, tmp_path / "sites")
    config = configuration(place, FEW)
    next(remote(config, tmp_path / "run", transport).rounds())
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    build = across(transport, print)
    list(runs.resume(tmp_path / "elsewhere", build=build).rounds())
    remote(config, tmp_path / "run", transport)  # a new run that has the old one's place
    ids = [str(question.head["run"]) for _, question, _ in transport.passed]
    assert len(dict.fromkeys(ids)) == 2
    assert ids[0] == ids[ids.index(ids[-1]) - 1]


def test_validation_rows_of_the_coordinator_do_not_go_with_parts_that_stay_at_the_sites(
    place: Path, tmp_path: Path
) -> None:
    config = configuration(place, "method.name=fedsa_lora", "data.validation=test.csv")
    with pytest.raises(ConfigError, match="fedsa_lora keeps a part of each adapter at its site"):
        remote(config, tmp_path / "run", calls(place, tmp_path))


def test_a_site_that_the_table_of_ranks_leaves_out_is_refused_and_the_others_go_on(
    place: Path, tmp_path: Path
) -> None:
    transport = calls(place, tmp_path)
    table = 'lora.rank={"site-ann" = 2, "site-bob" = 1}'
    config = configuration(
        place,
        "method.name=flora",
        table,
        "federation.sites=2",
        "train.rounds=2",
        "train.participation=1.0",
    )
    *_, last = remote(config, tmp_path / "run", transport).rounds()
    assert last.cohort == ("site-ann", "site-bob")
    (said,) = (line for line in transport.notified if "refused" in line)
    assert "lora.rank has no rank for client 'site-cy': add \"*\" = RANK" in said


def test_only_what_a_site_lacks_is_sent_and_its_rows_never_are(place: Path, tmp_path: Path) -> None:
    transport = calls(place, tmp_path)
    run = remote(configuration(place), tmp_path / "run", transport)
    down = [result.bytes_down for result in run.rounds()][1:]
    asked = [q for _, q, _ in transport.passed if q.head["ask"] == "train"]
    assert sum(len(q.body) for q in asked) <= sum(down) + 200 * len(asked)
    words = b"warm heart"
    assert not any(words in reply.body for _, _, reply in transport.passed)
    lines = (tmp_path / "ann" / "outgoing.log").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    mine = [reply for name, _, reply in transport.passed if name == "site-ann"]
    assert [entry["bytes"] for entry in told] == [reply.size for reply in mine]
    trained = [entry for entry in told if entry["asked"] == "train"]
    assert all(entry["tensors"] and entry["left"]["round"] for entry in trained)


def test_a_site_lets_go_of_one_run_s_model_before_it_loads_another_s(
    place: Path, tmp_path: Path
) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(place / "model"))

    def told_of(seed: int) -> None:
        transport = calls(place, tmp_path / str(seed))
        remote(configuration(place, f"seed={seed}"), tmp_path / f"run{seed}", transport)
        asked.append([question for name, question, _ in transport.passed if name == "site-ann"])

    asked: list[list[SiteMessage]] = []
    told_of(0)
    told_of(1)
    site = next(iter(calls(place, tmp_path / "own").sites.values()))
    gc.collect()
    gc.disable()  # so that nothing but the site's own care lets go
    try:
        before = mapped()
        counts, served = [], []
        for questions in asked:
            for question in questions:
                assert "error" not in site.answer(question).head
            counts.append(mapped() - before)
            served.append(site.opened and site.opened.experiment.config.seed)
    finally:
        gc.enable()
    assert served == [0, 1]
    assert counts[0] > 0
    assert counts[1] == counts[0]


def test_a_site_that_lost_what_it_held_is_sent_everything(place: Path, tmp_path: Path) -> None:
    config = configuration(place, "train.participation=1.0")
    *_, whole = remote(config, tmp_path / "a", calls(place, tmp_path / "1")).rounds()
    transport = calls(place, tmp_path / "2")
    run = remote(config, tmp_path / "b", transport)
    for result in run.rounds():
        last = result
        if result.round == 2:
            for file in (tmp_path / "2" / "bob").rglob("*.safetensors"):
                file.unlink()
    lacked = [q.head["round"] for _, q, r in transport.passed if r.head.get("lacks")]
    assert lacked == [3]
    assert bits(run, last) == {n: tensor_hash(t) for n, t in whole.state.server.adapter.items()}


def test_a_training_loss_that_stays_at_its_site_is_left_out_of_the_mean_and_of_nothing_else(
    place: Path, tmp_path: Path
) -> None:
    settings = (FEW, "train.participation=1.0", "data.client_test=0.3", "eval.every=1")
    ended = []
    for silent in ((), (11,), (10, 11, 12)):
        transport, out = calls(place, tmp_path / f"{len(silent)}"), tmp_path / f"run{len(silent)}"
        for node in silent:
            config = transport.sites[node].config.model_copy(update={"metrics": ["accuracy"]})
            transport.sites[node] = Site(config)
        run = remote(configuration(place, *settings), out, transport)
        *_, last = run.rounds()
        ended.append((bits(run, last), last))
        told = [
            json.loads(line)["loss"] for line in (out / "rounds.jsonl").read_text().splitlines()
        ]
        assert told[-1] == last.loss
    (every, last), (fewer, without_bob), (none, without_any) = ended
    assert every == fewer == none
    clients = dict(last.clients)
    assert without_any.loss is None
    assert not any("loss" in metrics for metrics in without_any.clients.values())
    assert sorted(without_any.client_metrics["site-ann"]) == ["accuracy"]
    del clients["site-bob"]
    assert without_bob.loss == replace(last, clients=clients).loss


def test_a_message_is_found_late_by_a_tenth_of_the_waiting_and_not_looked_for_all_the_time() -> (
    None
):
    waited, looks = 0.0, 0
    while waited < 60:
        late = poll_interval(waited, longest=1.0)
        assert late <= min(max(0.2, waited / 10), 1.0)
        waited, looks = waited + late, looks + 1
    assert looks < 80


def test_a_site_that_takes_one_step_a_round_is_refused_where_factors_take_turns_between_steps(
    place: Path, tmp_path: Path
) -> None:
    config = configuration(place, "method.name=la_lora", "train.batch_size=16", FEW)
    train = config.train.model_copy(update={"local_steps": None, "local_epochs": 1})
    transport = calls(place, tmp_path / "state")
    run = remote(config.model_copy(update={"train": train}), tmp_path / "run", transport)
    assert list(run.experiment.engine.clients()) == ["site-ann"]
    refused = [line for line in transport.notified if "it takes one step a round" in line]
    assert len(refused) == 2


@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
@pytest.mark.parametrize("more", [(), ("data.client_test=0.3", "eval.every=1")], ids=" ".join)
def test_a_site_grows_its_deltas_by_what_it_is_sent_and_lacks_nothing(
    name: str, more: tuple[str, ...], place: Path, tmp_path: Path
) -> None:
    asked: list[tuple[int, int, bool]] = []

    def watch(site: str, question: SiteMessage, reply: SiteMessage) -> SiteMessage:
        if question.head["ask"] == "train":
            growth, lacks = question.integer("growth"), "lacks" in reply.head
            asked.append((question.integer("round"), growth, lacks))
        return reply

    config = configuration(place, f"method.name={name}", "train.participation=1.0", FEW, *more)
    run = remote(config, tmp_path / "run", calls(place, tmp_path / "state", watch))
    *_, last = run.rounds()
    assert last.rejected == {}
    assert sorted(asked) == [
        (round, 0 if round == 1 else 6, False) for round in (1, 2, 3) for _ in "abc"
    ]
