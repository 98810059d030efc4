"""Each validation is taken out in turn, and a test must fail.

``python -m tests.mutants [NAME ...]`` does so for the files of ``GUARDED`` that have one of these
names in their path, or for all. A validation is an ``if`` that ends in a refusal (``raise``, a
reason that is returned, a rejected client), an ``except``, or a call of a function that checks. Its
mutant lacks one condition: each operand of ``or``, and each link of ``not a < b < c``, is one. What
is written in another way is listed in ``OTHERS``.

The tests that reach a validation's refusal are found by running them once; only these can tell that
it is missing, and each mutant is tried on them in a process of its own. It exists there alone: the
functions of the imported program get the mutant's code, and no file changes. So a test that starts
a process of its own notices no mutant. Exit code 1 if one survives, 2 if the tests fail as it is.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # as pytest does

import pytest
import torch
from figures import record

import rolora

TESTS = Path(__file__).parent
SOURCE = Path(rolora.__file__).parent
# A mutant's tests may take five times their usual seconds and these: one that waits for ever is
# noticed, too
LONGEST = 60.0


@dataclass(frozen=True)
class Guarded:
    """A file with validations: the functions that hold them (none: all), and its tests."""

    tests: tuple[str, ...]
    functions: tuple[str, ...] = ()


SITES = (
    *("hostile_sites", "hostile_coordinator", "joining", "site_faults", "sites"),
    "wrong_questions",
)
FILES = ("corpus", "hostile_files", "hostile_models")
GUARDED: Mapping[str, Guarded] = {
    "algorithm/step.py": Guarded(("step", "hostile_updates", "robust")),
    "algorithm/codec.py": Guarded(("wire",)),
    "config/load.py": Guarded(
        ("config", "robust", "robust_runs", "attacks"),
        ("make_config", "_check_reducers", "_check_byzantine", "check_options"),
    ),
    "data/readers.py": Guarded(
        ("readers", "data", *FILES),
        (
            "read_csv",
            "read_json",
            "read_parquet",
            "_unpacked",
            "named_classes",
            "_array",
            "_lines",
            "_object",
            "_column",
            "read_file",
            "_contents",
        ),
    ),
    "flower/engine.py": Guarded((*SITES, "robust_runs")),
    "flower/membership.py": Guarded(SITES),
    "flower/message.py": Guarded(SITES),
    "flower/records.py": Guarded(("flower_strategy",)),
    "model/base.py": Guarded(("hostile_models", "base"), ("load_base",)),
    "model/checkpoint.py": Guarded(
        ("hostile_models", "base", "tables_of_tokens"),
        ("read_config", "_kernel", "load_tokenizer"),
    ),
    "model/peft.py": Guarded(
        ("peft_round_trip",),
        ("read_adapter", "_plain_lora", "_scaling", "_by_layer"),
    ),
    "model/kept.py": Guarded(("prefix",)),
    "run/folder.py": Guarded(("record",)),
    "sites/folder.py": Guarded(("federation_folder",), ("open", "add_site", "_known")),
    "sites/gate.py": Guarded(("hostile_coordinator",)),
    "sites/policy.py": Guarded(("hostile_coordinator",)),
    "sites/site.py": Guarded(SITES),
    "sites/site_config.py": Guarded(("federation_folder", "hostile_network")),
    "training/client_store.py": Guarded(("hostile_files", "site_faults")),
}
# Validations that are no statement of their own: the text, and what it is without them
OTHERS: Mapping[str, Sequence[tuple[str, str]]] = {
    "algorithm/step.py": [
        ("for update, share in _shared_out(weighed(weight), aggregation.max_share):",
         "for update, share in weighed(weight):"),
        ("sent = AdapterState(update.adapter, assigned.received.scaling)", "sent = update.adapter"),
    ],
    "flower/membership.py": [
        ("return use(checked(reply))", "return use(reply)"),
        ("reply = bounded(reply.head, reply.body)", "pass"),
        ("due &= known.names.keys()", "pass"),
        ("if asked.labels != known.labels or", "if"),
    ],
    "model/base.py": [
        ('use_safetensors=None if "gguf_file" in place else True', "use_safetensors=None"),
    ],
    "model/peft.py": [
        ('if name not in shapes and spec.role == "head"', "if name not in shapes"),
        ("_with_rank(spec, shapes) if any_rank else spec.shape", "_with_rank(spec, shapes)"),
    ],
    "model/kept.py": [
        ("found if fits and _hash(found) == hash else None", "found if fits else None"),
        ("found if fits and _hash(found) == hash else None",
         "found if _hash(found) == hash else None"),
        ("found.st_uid in (os.getuid(), 0) and not others", "not others"),
        ("found.st_uid in (os.getuid(), 0) and not others",
         "found.st_uid in (os.getuid(), 0)"),
    ],
    "sites/gate.py": [
        ("for k, v in found if k in metrics_of(site)", "for k, v in found"),
    ],
    "sites/site.py": [
        ("request = bounded(request.head, request.body)", "pass"),
        ('labels=tuple(read_labels(labels))', 'labels=tuple(json.loads(labels))'),
        ('and digest(view) == request.text("view")', ""),
        ("view.keys() == like.keys() and", ""),
    ],
}  # fmt: skip
# What looks like a validation and is none, or is one twice: file and text -> why
LEFT_OUT: Mapping[tuple[str, str], str] = {
    ("data/readers.py", "if table.num_rows != count - 1"): "no file is known of which two readers "
    "make different numbers of rows; 60,000 random ones were tried",
    ("data/readers.py", "if sum(sizes) > most"): "sizes are added up again as rows are read; this "
    "is what a file says of itself, and quick",
    ("sites/site.py", "if code == 'failed'"): "it only sends a traceback to the site's own log",
}

CHECKS = re.compile(r"_?(check|require|validate)\w*|class_labels|read_labels|admit|count|ranks")
REASONS = {"Failure", "Unusable", "SiteMessage", "lost", "_failed"}  # what stands for a refusal
NO_VALUE = {"read", "_scaling", "examples_in", "_layout"}  # functions whose None is a refusal


@dataclass(frozen=True)
class Mutant:
    """A file without one of its validations.

    ``function``: the path of the outermost function that holds it. ``refusal``: the first line of
    what runs when the validation refuses something, or of the function.
    """

    file: str
    line: int
    function: tuple[str, ...]
    removed: str
    refusal: int
    code: CodeType

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.removed}"


@dataclass(frozen=True)
class Text:
    """The text of a file, as syntax counts in it."""

    file: str
    source: bytes

    def without(self, node: ast.AST, instead: str) -> bytes:
        """The text with something else in the place of a node."""
        assert isinstance(node, ast.expr | ast.stmt)
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self._at(node.lineno, node.col_offset)
        end = self._at(node.end_lineno, node.end_col_offset)
        return self.source[:start] + instead.encode() + self.source[end:]

    def _at(self, line: int, column: int) -> int:
        return sum(map(len, self.source.splitlines(keepends=True)[: line - 1])) + column


def mutants(file: str) -> list[Mutant]:
    """All mutants of a file."""
    text = Text(file, (SOURCE / file).read_bytes())
    tree, found = ast.parse(text.source), []
    wanted = GUARDED[file].functions
    for function, body in functions(tree):
        if wanted and function[-1] not in wanted:
            continue
        for line, removed, refusal, changed in removals(text, body):
            code = inner(compile(changed, str(SOURCE / file), "exec"), function)
            found.append(Mutant(file, line, function, removed, refusal, code))
        for old, new in OTHERS.get(file, ()):
            own = ast.get_source_segment(text.source.decode(), body) or ""
            if old in own:
                assert text.source.decode().count(old) == 1, old
                line = text.source.decode().partition(old)[0].count("\n") + 1
                changed = text.source.replace(old.encode(), new.encode())
                code = inner(compile(changed, str(SOURCE / file), "exec"), function)
                found.append(Mutant(file, line, function, old, body.lineno, code))
    missing = {old for old, _ in OTHERS.get(file, ())} - {mutant.removed for mutant in found}
    assert not missing, missing
    return found


def functions(tree: ast.Module) -> Iterator[tuple[tuple[str, ...], ast.FunctionDef]]:
    """The functions of a module and the methods of its classes, by path."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield (node.name,), node
        if isinstance(node, ast.ClassDef):
            yield from (
                ((node.name, one.name), one)
                for one in node.body
                if isinstance(one, ast.FunctionDef)
            )


def removals(text: Text, function: ast.FunctionDef) -> Iterator[tuple[int, str, int, bytes]]:
    """Line, removed text, where it refuses, and the text without it, of each validation."""
    for node in ast.walk(function):
        if isinstance(node, ast.If) and refuses(node.body, function.name):
            for condition, part, instead in parts(node.test):
                changed = text.without(part, instead)
                yield part.lineno, f"if {condition}", node.body[0].lineno, changed
        elif isinstance(node, ast.ExceptHandler) and not is_raise(node.body[-1]):
            changed = text.without(node.body[-1], "raise")
            caught = "Exception" if node.type is None else ast.unparse(node.type)
            yield node.lineno, f"except {caught}", node.body[0].lineno, changed
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = ast.unparse(node.value.func).rpartition(".")[2]
            if CHECKS.fullmatch(called):
                yield node.lineno, ast.unparse(node), function.lineno, text.without(node, "pass")


def refuses(body: Sequence[ast.stmt], function: str) -> bool:
    """Whether these statements end by refusing something."""
    last = body[-1]
    if isinstance(last, ast.Continue) and len(body) > 1:
        last = body[-2]
    match last:
        case ast.Raise(exc=exc):
            return exc is not None
        case ast.Return(value=ast.Constant(value=str(text))):
            return bool(text)
        case ast.Return(value=None | ast.Constant(value=None) | ast.Dict(keys=[])):
            return function in NO_VALUE
        case ast.Return(value=ast.JoinedStr()):
            return True
        case ast.Return(value=ast.Call(func=called)):
            return ast.unparse(called) in REASONS
        case ast.Expr(value=ast.Call(func=called)):
            return ast.unparse(called).rpartition(".")[2] == "_refuse"
        case ast.Assign(targets=[ast.Subscript(value=ast.Name(id=name))]):
            return name == "rejected"
    return False


def is_raise(statement: ast.stmt) -> bool:
    """Whether this passes an error on as it is."""
    return isinstance(statement, ast.Raise) and statement.exc is None


def parts(test: ast.expr) -> Iterator[tuple[str, ast.expr, str]]:
    """Each condition of several that refuses by itself, as text; and what takes the place of which
    part, so that it is never met."""
    match test:
        case ast.BoolOp(op=ast.Or(), values=values):
            for value in values:
                yield from parts(value)
        case ast.UnaryOp(op=ast.Not(), operand=ast.BoolOp(op=ast.And(), values=values)):
            yield from ((f"not {ast.unparse(value)}", value, "True") for value in values)
        case ast.UnaryOp(
            op=ast.Not(), operand=ast.Compare(left=left, ops=ops, comparators=right)
        ) if len(ops) > 1:
            ends = [left, *right]
            links = [ast.Compare(ends[i], [ops[i]], [ends[i + 1]]) for i in range(len(ops))]
            for gone in range(len(links)):
                kept = (ast.unparse(link) for at, link in enumerate(links) if at != gone)
                yield f"not {ast.unparse(links[gone])}", test, f"not ({' and '.join(kept)})"
        case _ if any(isinstance(node, ast.NamedExpr) for node in ast.walk(test)):
            yield ast.unparse(test), test, f"(({ast.unparse(test)}) and False)"
        case _:
            yield ast.unparse(test), test, "False"


def inner(code: CodeType, path: Sequence[str]) -> CodeType:
    """The code of a function in that of its module."""
    for name in path:
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)
    return code


def live(file: str, path: Sequence[str]) -> FunctionType:
    """The function of the imported program."""
    found: Any = importlib.import_module("rolora." + file.removesuffix(".py").replace("/", "."))
    for name in path:
        found = vars(found)[name]
    for way in ("fget", "func", "__func__", "__wrapped__"):
        found = getattr(found, way, found)
    assert isinstance(found, FunctionType)
    return found


PROBE = "_reached"


def probed(file: str) -> Iterator[tuple[tuple[str, ...], CodeType]]:
    """The functions of a file; they tell where they begin, and where ``if`` or ``except`` runs."""
    tree = ast.parse((SOURCE / file).read_bytes())
    for _, function in functions(tree):
        for node in ast.walk(function):
            if isinstance(node, ast.If | ast.ExceptHandler):
                node.body.insert(0, told(f"{file}:{node.body[0].lineno}"))
        function.body.insert(0, told(f"{file}:{function.lineno}"))
    code = compile(ast.fix_missing_locations(tree), str(SOURCE / file), "exec")
    yield from ((path, inner(code, path)) for path, _ in functions(tree))


def told(place: str) -> ast.stmt:
    """A statement that tells that this place was reached."""
    return ast.parse(f"{PROBE}({place!r})").body[0]


class Watch:
    """A pytest plugin: which places each test reaches, its seconds, and who fails."""

    def __init__(self, place: Path | None = None) -> None:
        self.test, self.place = "", place
        self.seconds: dict[str, float] = defaultdict(float)
        self.reached: dict[str, set[str]] = defaultdict(set)
        self.failed: list[str] = []

    def reach(self, place: str) -> None:
        self.reached[place].add(self.test)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.test = nodeid
        if self.place:
            (self.place / "running").write_text(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.append(report.nodeid)


def apart(work: Callable[[Path], object], limit: float) -> Any:
    """What ``work`` returns in a process of its own; or what stands in ``running`` if it does not
    end well in time.

    ``work`` is given a folder of its own, which is gone afterwards.
    """
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.json"
        if (child := os.fork()) == 0:
            code = 1
            try:
                os.setsid()
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, limit)
                silent = os.open(os.devnull, os.O_RDWR)
                for stream in (0, 1, 2):
                    os.dup2(silent, stream)
                told.write_text(json.dumps(work(Path(folder))))
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if status:
            return (Path(folder) / "running").read_text()
        return json.loads(told.read_text())


PYTEST = (
    *("-q", "-m", "not slow and not flower and not browser and not soak", "--assert=plain"),
    *("-p", "no:cacheprovider"),
)


def baseline(files: Sequence[str]) -> Watch:
    """The tests of these files as the program is. SystemExit if one fails."""
    names = sorted({name for file in files for name in GUARDED[file].tests})
    paths = [str(TESTS / f"test_{name}.py") for name in names]
    with open(os.devnull, "w") as silent, contextlib.redirect_stdout(silent):
        # imports the tests, and with them the program, once for all processes
        pytest.main([*PYTEST, "--collect-only", *paths])

    def run(place: Path) -> object:
        watch = Watch(place)
        for file in files:
            for path, code in probed(file):
                function = live(file, path)
                function.__code__, function.__globals__[PROBE] = code, watch.reach
        pytest.main([*PYTEST, f"--basetemp={place / 'tests'}", *paths], plugins=[watch])
        reached = {place: sorted(tests) for place, tests in watch.reached.items()}
        return watch.failed, watch.seconds, reached

    found = apart(run, 3600)
    if isinstance(found, str) or found[0] or not found[1]:
        print(f"the tests fail as it is: {found if isinstance(found, str) else found[0]}")
        raise SystemExit(2)
    watch = Watch()
    watch.seconds.update(found[1])
    watch.reached.update({place: set(tests) for place, tests in found[2].items()})
    return watch


def killer(mutant: Mutant, known: Watch) -> str | None:
    """The first test that fails on this mutant; None if none does."""
    tests = known.reached.get(f"{mutant.file}:{mutant.refusal}", set())
    if not tests:
        return None
    chosen = sorted(tests, key=lambda test: (known.seconds[test], test))

    def run(place: Path) -> object:
        live(mutant.file, mutant.function).__code__ = mutant.code
        watch = Watch(place)
        pytest.main([*PYTEST, f"--basetemp={place / 'tests'}", "-x", *chosen], plugins=[watch])
        return watch.failed

    failed = apart(run, LONGEST + 5 * sum(known.seconds[test] for test in chosen))
    if isinstance(failed, str):
        return f"{failed} (the process ended, or took too long)"
    return failed[0] if failed else None


def judge(file: str, known: Watch) -> list[tuple[Mutant, str | None]]:
    """Each mutant of a file, and the test that fails on it."""
    began = time.monotonic()
    found = []
    for mutant in mutants(file):
        if (file, mutant.removed) in LEFT_OUT:
            continue
        test = killer(mutant, known)
        print(f"  {mutant}\n    {test or 'SURVIVED'}", flush=True)
        found.append((mutant, test))
    print(f"{file}: {len(found)} mutants, {time.monotonic() - began:.0f} s", flush=True)
    return found


def write_down(file: str, tests: Sequence[str | None]) -> None:
    """The file's row in ``docs/reliability/mutants.json``, from who noticed each mutant."""
    columns = ["file", "validations", "tests that notice one", "survived"]
    noticed = {test for test in tests if test}
    row = [f"src/rolora/{file}", len(tests), len(noticed), tests.count(None)]
    record("mutants", "make test-mutants", columns, [row])


def main() -> int:
    parser = argparse.ArgumentParser(description="Take out each validation; a test must fail.")
    parser.add_argument("names", nargs="*", help="only files whose path contains one of these")
    parser.add_argument("--list", action="store_true", help="only list the mutants")
    parser.add_argument("--record", action="store_true", help="write docs/reliability/mutants.json")
    chosen = parser.parse_args()
    files = [f for f in GUARDED if not chosen.names or any(name in f for name in chosen.names)]
    if chosen.list:
        print(*(mutant for file in files for mutant in mutants(file)), sep="\n")
        return 0
    os.chdir(TESTS.parent)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    torch.set_num_threads(1)
    began = time.monotonic()
    known = baseline(files)
    print(f"{len(known.seconds)} tests as it is: {time.monotonic() - began:.0f} s", flush=True)
    found = {}
    for file in files:
        found[file] = judge(file, known)
        if chosen.record:  # at once: all files take an hour
            write_down(file, [test for _, test in found[file]])
    survivors = [mutant for each in found.values() for mutant, test in each if test is None]
    print(f"{sum(map(len, found.values()))} mutants, {len(survivors)} survived")
    print(*survivors, sep="\n")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
