"""How many small faults in main.py do the tests notice? Run by hand: `python .ci/mutants.py results.jsonl`.

A mutant is main.py with one line changed, in a private copy of the tree. The test files that reach the line run on it,
quick ones first, until a test fails or hangs. Each verdict is a line of the results; the same command goes on with
them. With `--before FILE`, the mutants of an earlier version come again where their lines still stand.
"""

import argparse
import ast
import hashlib
import json
import os
import queue
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Files that test something else than main.py
LEFT_OUT = (
    "test_bench.py",
    "test_live.py",
    "test_sandbox.py",
)
QUICK_S = 5.0  # a failure in a file that takes longer is doubted: where time counts, a busy machine fails as well
# Plugins that take long to load
UNUSED = (
    "cacheprovider",
    "schemathesis",
    "hypothesispytest",
    "playwright",
    "base_url",
)
PYTEST = ("-m", "pytest", "-xq", "--tb=no", "--lanes=1", *(f"-pno:{plugin}" for plugin in UNUSED))
HANG = ("-o", "faulthandler_timeout=120", "-o", "faulthandler_exit_on_timeout=true")  # of one test
# In case a mutant grows without end
BOUND = partial(resource.setrlimit, resource.RLIMIT_DATA, (4 << 30,) * 2)

SWAPS = {
    **{
        ast.Lt: ("<", "<="),
        ast.LtE: ("<=", "<"),
        ast.Gt: (">", ">="),
        ast.GtE: (">=", ">"),
        ast.Div: ("/", "*"),
    },
    **{
        ast.Eq: ("==", "!="),
        ast.NotEq: ("!=", "=="),
        ast.Is: ("is", "is not"),
        ast.IsNot: ("is not", "is"),
    },
    **{
        ast.In: ("in", "not in"),
        ast.NotIn: ("not in", "in"),
        ast.And: ("and", "or"),
        ast.Or: ("or", "and"),
    },
    **{ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.BitAnd: ("&", "|")},
}
NAME_SWAPS = {"min": "max", "max": "min", "any": "all", "all": "any", "fullmatch": "match"}
UNWRAPPED = ("shield", "wait_for", "redact")  # calls that give way to their first argument
NO_POLICY = ("description", "examples", "example", "summary", "responses", "maxsize")  # arguments
# What is named so at the top
DOCUMENTATION = re.compile(r"(?i)example|^(job|head)_errors|event_stream")
WORD = re.compile(r"[\w./:;=*+-]+")  # a text with blanks is a message
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
# Writes each line of main.py's functions and the test it runs for, none in the service's own processes.
TRACER = """import os, sys, threading
main = os.path.join(os.path.dirname(__file__), "main.py")
output = os.open(__file__ + ".txt", os.O_CREAT | os.O_APPEND | 1)
test, seen = "", set()
def trace(frame, event, arg):
    global test
    if frame.f_code.co_filename == main:
        if event == "call" and test != (test := os.environ.get("PYTEST_CURRENT_TEST", "").partition("[")[0].split(" ")[0]):
            seen.clear()
        if frame.f_lineno not in seen:
            seen.add(frame.f_lineno)
            os.write(output, f"{frame.f_lineno} {test}\\n".encode())
        return trace
sys.settrace(trace)
threading.settrace(trace)
"""

# By test file: its seconds of CPU, and each test's lines
Cover = dict[str, tuple[float, dict[str, list[int]]]]
# Operator, line, first and last column in bytes, what stands there instead
Edit = tuple[str, int, int, int, str]
Row = dict[str, Any]  # a mutant; with its verdict, a line of the results


def key(row: Row) -> tuple[str, ...]:
    """The same in every version of main.py where the line still stands."""
    return row["function"], row["operator"], row["before"].strip(), row["after"].strip()


def show(row: Row) -> None:
    """A mutant, for people."""
    before, after = row["before"].strip(), row["after"].strip()
    print(f"{row['line']:5} {row['function']}: {row['operator']}\n    - {before}\n    + {after}")


class Source:
    """main.py, and what can be changed in it."""

    def __init__(self) -> None:
        self.text = (ROOT / "main.py").read_text(encoding="utf-8")
        self.lines, self.tree = self.text.splitlines(keepends=True), ast.parse(self.text)
        banners = re.finditer(r"^# ---- (\w[^\n:-]+)", self.text, re.MULTILINE)
        self.sections = {
            0: "Start",
            **{self.text.count("\n", 0, at.start()) + 1: at[1] for at in banners},
        }
        self.mutants: list[Row] = []
        for part in self.tree.body:
            name = getattr(part, "name", re.split(r"\W", ast.unparse(part))[0])
            if not DOCUMENTATION.search(name):
                self.collect(part, name, range(0))

    def collect(self, node: Any, where: str, here: range) -> None:
        """Find the mutants of a piece of code that belongs to `where`; it runs with the lines `here`, none at the top."""
        if isinstance(node, FUNCTION):
            here = range(node.body[0].lineno, node.end_lineno + 1)
        elif here and isinstance(node, (ast.stmt, ast.excepthandler)):
            body = getattr(node, "body", None)  # a block has mutants of its own
            here = range(
                node.lineno, max(node.lineno + 1, body[0].lineno) if body else node.end_lineno + 1
            )
        for operator, line, start, end, text in edits(node, self.segment):
            old = self.lines[line - 1]
            new = (old.encode()[:start] + text.encode() + old.encode()[end:]).decode()
            section = self.sections[max(first for first in self.sections if first <= line)]
            mutant = {"section": section, "function": where, "operator": operator, "line": line}
            self.mutants.append(
                {**mutant, "before": old, "after": new, "here": [here.start, here.stop]}
            )
        for child in children(node):
            is_named = isinstance(child, (*FUNCTION, ast.ClassDef))
            self.collect(child, f"{where}.{child.name}" if is_named else where, here)

    def segment(self, node: Any) -> str:
        """The text of a node that stands on one line."""
        return self.lines[node.lineno - 1].encode()[node.col_offset : node.end_col_offset].decode()

    def mutated(self, mutant: Row) -> str:
        """The whole file with the one line changed."""
        return "".join(
            [*self.lines[: mutant["line"] - 1], mutant["after"], *self.lines[mutant["line"] :]]
        )

    def sample(self, number: int, seed: int, used: set[int]) -> Iterator[Row]:
        """So many mutants, evenly spread over the lines that have any; on each line every operator is as likely."""
        rng, by_line = random.Random(seed), defaultdict(list)
        for mutant in self.mutants:
            if mutant["line"] not in used:
                by_line[mutant["line"]].append(mutant)
        places, shift = sorted(by_line), rng.random()
        step = max(1.0, len(places) / max(1, number))
        for place in range(min(number, len(places))):
            options = by_line[places[int((place + shift) * step)]]
            ranks = {mutant["operator"]: rng.random() for mutant in options}
            yield min(options, key=lambda mutant: (ranks[mutant["operator"]], rng.random()))

    def tests(self, mutant: Row, cover: Cover) -> list[str]:
        """The tests that may notice a mutant, then whole files, the quickest first; all if no trace leads to it."""
        names = mutant["function"].split(".")[0]
        for (
            part
        ) in self.tree.body:  # what is defined by another name at the top counts as that name
            if isinstance(part, (ast.Assign, ast.AnnAssign)) and re.search(
                rf"\b({names})\b", text := ast.unparse(part)
            ):
                names += "|" + re.split(r"\W", text)[0]
        named = [
            number
            for number, line in enumerate(self.lines, 1)
            if re.search(rf"\b({names})\b", line)
        ]
        # What stands at the top runs everywhere: who names it counts
        here = set(range(*mutant["here"]) or named)
        single, whole, is_reached = list[str](), list[str](), False
        for file, (seconds, lines) in sorted(cover.items(), key=lambda item: item[1][0]):
            reaching = [test for test, its_lines in lines.items() if here & set(its_lines)]
            is_read = re.search(rf"\bmain\.({names})\b", (ROOT / file).read_text(encoding="utf-8"))
            if (
                is_read or seconds < QUICK_S / 2 or "" in reaching
            ):  # "": in a process of the service
                whole.append(file)
            else:
                single += reaching
            is_reached |= bool(reaching)
        return [*single, *whole] if is_reached else [*cover]


def children(node: Any) -> Iterator[Any]:
    """What can be mutated below a node: of annotations their limits, no log lines, no texts for /docs."""
    is_list = isinstance(node, (ast.Tuple, ast.List, ast.Set))
    for child in ast.iter_child_nodes(node):
        if child in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            yield from (part for part in ast.walk(child) if isinstance(part, ast.Call))
        elif isinstance(child, ast.Call) and re.match(
            r"logger\.|TypeVar|ContextVar", ast.unparse(child.func)
        ):
            continue
        elif isinstance(child, ast.JoinedStr) or (isinstance(child, ast.Constant) and is_list):
            continue
        elif not isinstance(child, ast.keyword) or child.arg not in NO_POLICY:
            yield child


def constant(value: object, text: str) -> str | None:
    """Another value: the truth turned, a small number plus one, a large one doubled, a word with a letter more."""
    if isinstance(value, bool):
        return str(not value)
    if isinstance(value, (int, float)):
        is_large = value >= 1000 or (isinstance(value, float) and value > 0)
        return str(value * 2 if is_large else value + 1)
    is_policy = isinstance(value, str) and WORD.fullmatch(value) and text[0] in "\"'"
    return f"{text[:-1]}x{text[-1]}" if is_policy else None


def edits(node: Any, segment: Any) -> Iterator[Edit]:
    """Every small fault of one node."""

    def put(operator: str, text: str | None, at: Any = node) -> Iterator[Edit]:
        if text is not None and at.lineno == at.end_lineno:
            yield operator, at.lineno, at.col_offset, at.end_col_offset, text

    def swap(operator: ast.AST, left: Any, right: Any) -> Iterator[Edit]:
        old, new = SWAPS.get(type(operator), ("", ""))
        if old and left.end_lineno == right.lineno:
            gap = ast.Name(
                lineno=right.lineno, col_offset=left.end_col_offset, end_col_offset=right.col_offset
            )
            yield (
                old,
                gap.lineno,
                gap.col_offset,
                gap.end_col_offset,
                segment(gap).replace(old, new, 1),
            )

    match node:
        case ast.Compare(left=left, comparators=others, ops=operators):
            for operator, pair in zip(operators, pairwise([left, *others]), strict=True):
                yield from swap(operator, *pair)
        case ast.BoolOp(op=operator, values=values):
            for pair in pairwise(values):
                yield from swap(operator, *pair)
        case ast.BinOp(left=left, op=operator, right=right):
            yield from swap(operator, left, right)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield from put("not", f"({segment(operand)})")
        case ast.Constant(value=value):
            yield from put("constant", constant(value, segment(node)))
        case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts) if len(parts) > 1:
            for gone, other in pairwise([*parts, parts[0]]):
                if isinstance(gone, ast.Constant) and isinstance(other, ast.Constant):
                    yield from put("one less", repr(other.value), gone)
        case ast.Expr(value=ast.Call() | ast.Await()) | ast.Raise():
            yield from put("drop", "pass")
        case ast.Return(value=ast.AST() as value) if getattr(value, "value", "") is not None:
            yield from put("return", "return None")
        case ast.ExceptHandler(type=ast.AST() as kind):
            for one in getattr(kind, "elts", [kind]):
                yield from put("except", "ZeroDivisionError", one)
        case ast.Call(func=ast.Name(id="suppress"), args=classes):
            for one in classes:
                yield from put("suppress", "ZeroDivisionError", one)
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name) as called):
            if name in NAME_SWAPS:
                yield from put(name, segment(called).removesuffix(name) + NAME_SWAPS[name], called)
            if name in UNWRAPPED and node.args:
                yield from put("unwrap", segment(node.args[0]))
    test = getattr(node, "test", None)
    if isinstance(test, (ast.Name, ast.Attribute, ast.Call, ast.NamedExpr)):
        yield from put("negate", f"not ({segment(test)})", test)


class Tree:
    """A private copy of the tree in which tests run on any main.py."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="mutants-"))
        self.root, self.scratch = self.home / "tree", self.home / "scratch"
        shutil.copytree(
            ROOT,
            self.root,
            ignore=shutil.ignore_patterns(".git", ".env", ".venv", "*_cache", "__pycache__"),
        )

    def __enter__(self) -> "Tree":
        return self

    def __exit__(self, *exc: object) -> None:
        self.end_all()
        shutil.rmtree(self.home, ignore_errors=True)

    def run(self, text: str, *arguments: str, limit_s: float = 600) -> tuple[str, str]:
        """How pytest ends on this main.py, and the first test or file that failed."""
        shutil.rmtree(self.root / "__pycache__", ignore_errors=True)
        (self.root / "main.py").write_text(text, encoding="utf-8")
        self.scratch.mkdir()
        command = [
            sys.executable,
            *PYTEST,
            *HANG,
            f"--basetemp={self.scratch / 'tests'}",
            *arguments,
        ]
        variables, output = {**os.environ, "TMPDIR": str(self.scratch)}, self.home / "output"
        with output.open("wb") as file, suppress(subprocess.TimeoutExpired):
            files: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            process = subprocess.Popen(
                command, cwd=self.root, env=variables, preexec_fn=BOUND, **files
            )
            process.wait(limit_s)
        self.end_all()
        is_hanging = process.wait() < 0 or "Timeout (" in output.read_text(errors="replace")
        shutil.rmtree(self.scratch)
        failed = re.search(
            r"^(?:FAILED|ERROR) ([^\s\[]+)", output.read_text(errors="replace"), re.MULTILINE
        )
        if process.returncode in (0, 5):  # 5: every test was left out
            return "survived", ""
        return ("killed", failed[1]) if failed else ("timeout" if is_hanging else "killed", "")

    def end_all(self) -> None:
        """Kill what still runs in this copy, such as the services of a run that was cut short."""
        for folder in Path("/proc").glob("[0-9]*/cwd"):
            with suppress(OSError):
                if folder.readlink().is_relative_to(self.home):
                    os.kill(int(folder.parent.name), signal.SIGKILL)

    def verdict(self, text: str, original: str, tests: list[str], cover: Cover) -> tuple[str, str]:
        """What becomes of a mutant, and by which test; a doubted failure must come again, and only with the mutant."""
        doubted: list[str] = []
        while tests:
            files = [test.partition("::")[0] for test in tests]
            limit_s = 120 + 4 * sum(cover[file][0] for file in set(files))
            result, failed = self.run(text, *tests, *doubted, limit_s=limit_s)
            file = failed.partition("::")[0]
            if result != "killed" or file not in files or cover[file][0] < QUICK_S:
                return result, failed
            if (
                self.run(text, failed)[0] != "survived"
                and self.run(original, failed)[0] == "survived"
            ):
                return result, failed
            doubted.append(f"--deselect={failed}")
            tests = tests[files.index(file) :]
        return "survived", ""

    def cover(self, source: Source) -> Iterator[tuple[str, tuple[float, dict[str, list[int]]]]]:
        """The seconds of CPU of every test file and the lines of functions that each of its tests runs."""
        traced = list(source.lines)
        lines_run = self.root / "lines.py.txt"
        last = int(source.tree.body[0].end_lineno or 1) - 1  # of the introduction
        traced[last] = traced[last].rstrip() + "; import lines as _\n"
        (self.root / "lines.py").write_text(TRACER)
        for name in sorted(
            path.name for path in (ROOT / "tests").glob("test_*.py") if path.name not in LEFT_OUT
        ):
            file, before = f"tests/{name}", resource.getrusage(resource.RUSAGE_CHILDREN)
            lines_run.write_text("")
            result, failed = self.run("".join(traced), "--maxfail=1000", file)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)
            if (
                result != "survived"
                and seconds < QUICK_S
                and self.run(source.text, file)[0] != "survived"
            ):
                raise SystemExit(f"{failed or file} fails without any mutant")
            lines: dict[str, set[int]] = defaultdict(set)
            for line, _, test in (row.partition(" ") for row in lines_run.read_text().splitlines()):
                lines[test].add(int(line))
            yield file, (seconds, {test: sorted(some) for test, some in lines.items()})
            print(f"{file}: {seconds} s", flush=True)


def judge(
    mutant: Row, source: Source, trees: "queue.Queue[Tree]", cover: Cover, most: float
) -> Row:
    """One line of the results: the verdict of the files that take at most so long, and have not been passed yet."""
    tests = source.tests(mutant, cover)
    tests = [
        test
        for test in tests
        if mutant.get("most", -1.0) < cover[test.partition("::")[0]][0] <= most
    ]
    tree, started = trees.get(), time.monotonic()
    try:
        result, by = tree.verdict(source.mutated(mutant), source.text, tests, cover)
    finally:
        trees.put(tree)
    return {
        **mutant,
        "most": most,
        "result": result,
        "by": by,
        "seconds": round(time.monotonic() - started, 1),
    }


def run(source: Source, chosen: list[Row], results: Path, jobs: int, most: float) -> None:
    """Judge the mutants that are not in the results yet; the first line there is what was measured."""
    tested = [ROOT / "main.py", *sorted((ROOT / "tests").rglob("*.py"))]
    version = hashlib.sha256(b"".join(path.read_bytes() for path in tested)).hexdigest()
    first, rows = read(results)
    if first.get("version", version) != version:
        raise SystemExit(f"{results} is of another main.py or other tests; name a new file")
    known = {key(row): row for row in rows}
    chosen = [known.get(key(one), one) for one in chosen]
    chosen = [
        one
        for one in chosen
        if one.get("result", "survived") == "survived" and one.get("most", -1) < most
    ]
    trees: queue.Queue[Tree] = queue.Queue()
    with (
        ThreadPoolExecutor(jobs) as pool,
        results.open("a", encoding="utf-8") as file,
        ExitStack() as homes,
    ):
        for _ in range(jobs):
            trees.put(homes.enter_context(Tree()))
        if not first:
            first = {"version": version, "cover": dict(trees.queue[0].cover(source))}
            print(json.dumps(first), file=file, flush=True)
        work = partial(judge, source=source, trees=trees, cover=first["cover"], most=most)
        for number, row in enumerate(pool.map(work, chosen), 1):
            print(json.dumps(row), file=file, flush=True)
            print(
                f"{number}/{len(chosen)} {row['result']} in {row['seconds']} s: {row['after'].strip()}",
                flush=True,
            )


def read(file: Path | None) -> tuple[Row, list[Row]]:
    """The first line of some results, which holds what was measured, and the last of each mutant."""
    rows = (
        [json.loads(row) for row in file.read_text(encoding="utf-8").splitlines()]
        if file and file.exists()
        else []
    )
    return (rows[0], list({key(row): row for row in rows[1:]}.values())) if rows else ({}, [])


def report(rows: list[Row], earlier: list[Row]) -> None:
    """The share of mutants noticed, by section and in all, beside the earlier one; and every survivor."""
    tally: dict[str, tuple[list[bool], list[bool]]] = defaultdict(lambda: ([], []))
    same = set(map(key, rows)) & set(map(key, earlier))
    for side, some in enumerate((rows, earlier)):
        for row in some:
            for group in (
                row["section"],
                "= all",
                *(["= the same mutants"] if key(row) in same else []),
            ):
                tally[group][side].append(row["result"] != "survived")
    print(f"\n{'noticed':20}{'earlier' if earlier else ''}")
    for group in sorted(tally, key=lambda group: group.startswith("=")):
        shares = [
            f"{sum(some)} of {len(some)} ({sum(some) / max(1, len(some)):.0%})"
            for some in tally[group]
            if some
        ]
        print("".join(f"{share:20}" for share in shares) + group)
    print(f"{sum(row['result'] == 'timeout' for row in rows)} by a hang. Survivors:")
    for row in sorted(rows, key=lambda row: int(row["line"])):
        if row["result"] == "survived":
            show(row)


def main() -> None:
    """Take the mutants that are not in the results yet, then report what became of all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="a file of JSON lines, new or to go on with")
    parser.add_argument(
        "--before", type=Path, help="results of an earlier version, to compare with"
    )
    parser.add_argument("--mutants", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="test runs at once")
    parser.add_argument(
        "--most", type=float, default=1e6, help="only test files of so many seconds; the rest later"
    )
    parser.add_argument("--only", help="every mutant of this function, class, constant or line")
    parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
    wanted = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and everything it has started
    source, earlier = Source(), read(wanted.before)[1]
    if wanted.only:
        chosen = [
            one
            for one in source.mutants
            if wanted.only in (str(one["line"]), *one["function"].split("."))
        ]
    else:
        chosen = [one for one in source.mutants if key(one) in set(map(key, earlier))]
        chosen += source.sample(
            wanted.mutants - len(chosen), wanted.seed, {one["line"] for one in chosen}
        )
    if wanted.list:
        for one in chosen:
            show(one)
        return
    run(source, chosen, wanted.results, wanted.jobs, wanted.most)
    report(read(wanted.results)[1], earlier)


if __name__ == "__main__":
    main()
