"""Results that say what is not so: every field, every byte. What becomes of a report on them, counted.

``python tests/faults/result_files.py`` runs every case in a process of its own, with a time limit, and prints the table; with a
number n, every n-th.
"""

import copy
import json
import math
import os
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from eaftlib.errors import EaftError
from eaftlib.evaluation import results
from eaftlib.evaluation.gates import Gates
from eaftlib.evaluation.statistics import Tokens, aggregate
from eaftlib.files import sha256
from eaftlib.report import model, tables

SECONDS = 20
OWN, FOREIGN, HANG, RIGHT, WRONG = "own error", "foreign exception", "hang", "accepted and right", "accepted and wrong"
KEY = ("UNION", 64)
GATES = Gates("test", *KEY[:1], KEY[1:], {
    "ppl_absolute": 0.25, "ppl_relative": 0.05, "cc_rate": 0.02, "mean_prob": 0.02, "js2d": 0.5,
})  # fmt: skip
META = {
    "model_id": "a/b", "model_sha256": "m", "tokenizer_sha256": "t", "eos_token_id": 1, "num_experts": 32, "top_k": 4,
    "bytes_total": 1000, "keep_set": {"criterion": "reap", "keep_n": 16, "ranking_rows": "calib"}, "recovered": None,
    "dataset_repo": "p", "pack_files": ["a.parquet"], "engine": "e", "code_sha256": "c", "device": "cpu", "dtype": "float32",
    "torch": "2", "transformers_version": "5", "python": "3", "num_blocks": 8, "entropy_topk": 20, "cc_quantile": 0.15,
    "rows": "eval", "seq_lens": [64], "scored_with": ["base", "cand"], "gpu_name": None,
}  # fmt: skip


class Case(NamedTuple):
    """group: the table's row; change: of a folder with ``base`` and ``cand``, each with both files."""

    group: str
    name: str
    change: Callable[[Path], object]


def tokens_of(hardness: float) -> Tokens:
    """400 kept tokens of 40 conversations in 8 blocks, the same ones whatever the model."""
    rng = np.random.default_rng(0)
    index = np.arange(400, dtype=np.int32)
    nll = (rng.exponential(1.0, 400) * hardness).astype(np.float32)
    return Tokens(index // 50, index % 50 + 1, nll, rng.random(400, np.float32) ** 2, index // 10)


def make(folder: Path) -> None:
    """The whole model, and a candidate that fails."""
    for label, hardness in (("base", 1.0), ("cand", 1.5)):
        tokens = tokens_of(hardness)
        entry = {"rows_seen": 41, "rows_sha256": "r", "input_sha256": "i", "model": aggregate(tokens, 8, 0.15)}
        entry["model"]["tok_s_pred"] = 10.0
        meta = META | {"label": label, "keep_set": None if label == "base" else META["keep_set"]}
        results.write(folder, label, meta, {KEY: entry}, {KEY: tokens})


def shown(folder: Path) -> dict:
    """Every number that a report on the folder shows or judges by; its text is made too."""
    report = model.build(results.read_all([str(folder)]), "base", GATES)
    tables.markdown(report), tables.csv(report), json.dumps(report.content(), allow_nan=False)
    rows = [
        [
            row.is_baseline, row.ppl, row.cc_rate, row.mean_prob, row.mean_entropy, row.kept_tokens, row.entry["p_thr"],
            row.entry["h_thr"],
        ]
        for row in report.rows
    ]  # fmt: skip
    return {"rows": rows, "judged": [[c.status, c.evidence, c.checks] for c in report.candidates]}


def outcome(folder: Path, expected: dict) -> tuple[str, str]:
    """(what became of a report on the folder, why). Right: every number that it shows is; what was not there is INCOMPLETE."""
    try:
        found = shown(folder)
    except EaftError as error:
        return OWN, str(error)
    except Exception:
        return FOREIGN, traceback.format_exc()
    judged = zip(found["judged"], expected["judged"], strict=False)
    right = len(found["judged"]) == len(expected["judged"])
    right &= all(mine[0] == "INCOMPLETE" or _same(mine, other) for mine, other in judged)
    right &= all(any(_same(row, other) for other in expected["rows"]) for row in found["rows"])
    return (RIGHT, "") if right else (WRONG, f"{found} against {expected}")


def _same(found: object, expected: object) -> bool:
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and found.keys() == expected.keys()
            and all(_same(found[k], expected[k]) for k in found)
        )
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(_same, found, expected))
    if isinstance(expected, float) and isinstance(found, float):
        return math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-6)
    if hasattr(expected, "__dataclass_fields__"):
        return type(found) is type(expected) and _same(vars(found), vars(expected))
    return found == expected


def edited(change: Callable[[dict, dict], object], label: str = "cand") -> Callable[[Path], None]:
    """change: of the file's content, given the other file's too."""

    def apply(folder: Path) -> None:
        contents = [json.loads((folder / f"{name}.json").read_text()) for name in ("base", "cand")]
        mine, other = reversed(contents) if label == "cand" else contents
        change(mine, other)
        (folder / f"{label}.json").write_text(json.dumps(mine))

    return apply


def without_tokens(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for file in folder.glob("*.tokens.parquet"):
            file.unlink()
        change(folder)

    return apply


def entry_of(content: dict) -> dict:
    return content["packs"][0]["seq"]["64"]["model"]


def leaves(content: object, path: tuple = ()) -> Iterator[tuple[tuple, object]]:
    """(path, value) of everything in it; of a list, its first and a middle element."""
    if path:
        yield path, content
    if isinstance(content, dict):
        for name, value in content.items():
            yield from leaves(value, (*path, name))
    elif isinstance(content, list):
        for i in sorted({0, len(content) // 2} & set(range(len(content)))):
            yield from leaves(content[i], (*path, i))


def put(path: tuple, value: object) -> Callable[[dict, dict], None]:
    def change(content: dict, _other: dict) -> None:
        *parents, last = path
        for name in parents:
            content = content[name]
        if value is ...:
            del content[last]
        else:
            content[last] = copy.deepcopy(value)

    return change


def others_of(value: object) -> Iterator[object]:
    """Other values for a field: of its type, beyond its range, and of other types; ... removes it."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield from (
            value * 1.01 + (1e-3 if isinstance(value, float) else 1),
            -value - 1,
            0,
            value * 1000 + 7,
            1e30,
            1e308,
        )
        yield from (math.nan, math.inf, -math.inf, 10**30, int(value) + 1, float(value) / 2, str(value), True)
    elif isinstance(value, str):
        yield from (
            f"{value}x",
            "",
            "a" * 5000,
            "../x",
            "<img src=x onerror=alert(1)>",
            "a|b\n| c |",
            "=1+1",
            "\ud800",
            3,
        )
    yield from (None, [], {}, [[1]], {"a": {"b": 1}}, "x", ...)


def json_cases() -> Iterator[Case]:
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        whole = {label: json.loads((Path(folder) / f"{label}.json").read_text()) for label in ("cand", "base")}
    for label, content in whole.items():
        for path, value in leaves(content):
            for other in others_of(value):
                name = f"{label} {'.'.join(map(str, path))}: {str(other)[:20]!r}"
                change = edited(put(path, other), label)
                if label == "base" and "model" not in path:
                    continue  # as the candidate's
                yield Case("a field of the JSON", name, change)
                if "model" in path:
                    yield Case("a field, without tokens", name, without_tokens(change))
    for names in FROM_BASE:
        change = edited(lambda mine, other, names=names: entry_of(mine).update({n: entry_of(other)[n] for n in names}))
        yield Case("copied from the base", ", ".join(names), change)
        yield Case("copied, without tokens", ", ".join(names), without_tokens(change))
    for name, change in STRUCTURE.items():
        yield Case("packs and settings", name, edited(change))
        yield Case("packs and settings", f"{name}, without tokens", without_tokens(edited(change)))


FROM_BASE = [
    ["ppl"], ["mean_nll"], ["ppl", "mean_nll"], ["mean_prob"], ["ppl", "mean_nll", "mean_prob"], ["hist2d_x_H"], ["blocks"],
    ["hist2d_x_H", "hist1d_x", "hist1d_H"], ["p_thr"], ["h_thr"], ["cc_rate", "cc_count"], ["quadrants"],
    ["ppl", "mean_nll", "mean_prob", "hist2d_x_H", "hist1d_x", "hist1d_H"],
    ["ppl", "mean_nll", "mean_prob", "blocks", "cc_rate", "cc_count", "quadrants"],
]  # fmt: skip


def pack_twice(mine: dict, other: dict) -> None:
    mine["packs"] += copy.deepcopy(other["packs"])


def edges(axis: str, low: float, high: float) -> Callable[[dict, dict], None]:
    def change(mine: dict, _other: dict) -> None:
        count = len(entry_of(mine)["hist2d_x_H"][f"{axis}_edges"])
        entry_of(mine)["hist2d_x_H"][f"{axis}_edges"] = np.linspace(low, high, count).tolist()

    return change


def fewer_blocks(name: str) -> Callable[[dict, dict], object]:
    return lambda mine, _: entry_of(mine)["blocks"][name].pop()


def between_blocks(name: str) -> Callable[[dict, dict], None]:
    def change(mine: dict, _other: dict) -> None:
        values = entry_of(mine)["blocks"][name]
        values[0], values[1] = values[0] + 30, values[1] - 30

    return change


def between_cells(mine: dict, _other: dict) -> None:
    """One token in another cell: all sums agree, but for the margins."""
    counts = entry_of(mine)["hist2d_x_H"]["counts"]
    used = next(i for i, count in enumerate(counts) if count)
    counts[used] -= 1
    counts[used + 121 if used + 121 < len(counts) else 0] += 1


STRUCTURE = {
    "a pack twice": pack_twice,
    "no packs": lambda mine, _: mine.update(packs=[]),
    "no lengths": lambda mine, _: mine["packs"][0].update(seq={}),
    "another length": lambda mine, _: mine["packs"][0].update(seq={"065": mine["packs"][0]["seq"]["64"]}),
    "a length of 5,000 digits": lambda mine, _: mine["packs"][0].update(
        seq={"6" * 5000: mine["packs"][0]["seq"]["64"]}
    ),
    "x edges of log10 p": edges("x", -12.0, 0.0),
    "y edges to 2": edges("y", 0.0, 2.0),
    "x edges that fall": edges("x", 1.0, 0.0),
    "num_blocks by length": lambda mine, _: mine["meta"].update(num_blocks={"128": 8}),
    "cells moved": between_cells,
    **{f"fewer {name}": fewer_blocks(name) for name in ("kept", "nll_sum", "conflicts")},
    **{f"moved {name}": between_blocks(name) for name in ("kept", "nll_sum", "prob_sum", "entropy_sum", "conflicts")},
}


def byte_cases(kind: str, count: int) -> Iterator[Case]:
    """Bytes flipped, files cut short. Of a token file also with a JSON that has the changed file's hash."""
    rng = random.Random(1)
    for _ in range(count):
        share, bit, cut = rng.random(), rng.randrange(8), rng.random() < 0.2
        for vouched in (False, True) if kind == "tokens.parquet" else (False,):

            def change(folder: Path, share=share, bit=bit, cut=cut, vouched=vouched) -> None:
                file = folder / f"cand.{kind}"
                content = bytearray(file.read_bytes())
                at = int(share * len(content))
                content[at] ^= 1 << bit
                file.write_bytes(content[:at] if cut else content)
                if vouched:
                    vouch(folder)

            group = f"bytes of the {'token file' if vouched or 'parquet' in kind else 'JSON'}"
            yield Case(f"{group}, its hash renewed" if vouched else group, f"{share:.4f} {bit} {cut}", change)


def vouch(folder: Path) -> None:
    """Let the JSON say that its tokens are those that lie beside it."""
    digest = sha256(folder / "cand.tokens.parquet")
    edited(lambda mine, _: mine["meta"].update(tokens_sha256=digest))(folder)


def column(
    name: str, change: Callable[[np.ndarray], object], kind: pa.DataType | None = None
) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "cand.tokens.parquet"
        table = pq.read_table(file)
        at = table.column_names.index(name)
        values = change(table[name].to_numpy(zero_copy_only=False).copy())
        pq.write_table(table.set_column(at, name, pa.array(values, kind or table[name].type)), file)
        vouch(folder)

    return apply


def at_first(value: object) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[0] = value
        return values

    return change


def rows(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "cand.tokens.parquet"
        pq.write_table(change(pq.read_table(file)), file)
        vouch(folder)

    return apply


PARQUET = {
    **{f"{name} {value}": column(name, at_first(value)) for name, values in {
        "block": (10**9, -1, 8, 1, 2**31 - 1), "position": (-5, 0, 64, 2), "nll": (math.nan, math.inf, -3.0, 9.0, 3e38),
        "entropy": (math.nan, -0.1, 1.1, 0.5), "row": (-1, 2**31 - 1), "seq_len": (128,), "pack": ("other",),
    }.items() for value in values},
    **{f"{name} as {kind}": column(name, lambda x: x, kind) for name, kind in (
        ("nll", pa.float64()), ("block", pa.int64()), ("position", pa.float32()), ("entropy", pa.float16()),
    )},
    "pack as text": column("pack", lambda x: x, pa.string()),
    "nll as text": column("nll", lambda x: [str(v) for v in x], pa.string()),
    "a null": column("nll", lambda x: [None, *x[1:].tolist()]),
    "lists": column("nll", lambda x: [[v] for v in x.tolist()], pa.list_(pa.float32())),
    "no rows": rows(lambda table: table.slice(0, 0)),
    "a row less": rows(lambda table: table.slice(1)),
    "a row twice": rows(lambda table: pa.concat_tables([table, table.slice(0, 1)])),
    "rows in another order": rows(lambda table: table.take(list(range(table.num_rows))[::-1])),
    "no nll": rows(lambda table: table.drop_columns(["nll"])),
    "no row": rows(lambda table: table.drop_columns(["row"])),
    "a column twice": rows(lambda table: table.append_column("nll", table["nll"])),
    "a column more": rows(lambda table: table.append_column("more", table["nll"])),
    "a pack more": rows(lambda table: pa.concat_tables([table, table.set_column(0, "pack", pa.array(["b"] * 400).cast(
        table["pack"].type))])),
}  # fmt: skip


def instead(name: str, make_it: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make_it(folder / name)

    return apply


ENTRIES = {
    f"{what} named {name}": instead(name, make_it)
    for name in ("x.json", "cand.tokens.parquet", "cand.json")
    for what, make_it in (
        ("a folder", Path.mkdir), ("a FIFO", os.mkfifo), ("a link to nothing", lambda p: p.symlink_to("nowhere")),
        ("a link to itself", lambda p: p.symlink_to(p.name)), ("an empty file", Path.touch),
        ("deep JSON", lambda p: p.write_text("[" * 100_000)), ("null", lambda p: p.write_text("null")),
        ("bytes", lambda p: p.write_bytes(b"\xff\xfe")), ("packs that are no list", lambda p: p.write_text('{"packs": 3}')),
    )
}  # fmt: skip


# What a file cannot tell: sums moved from one block to another where no tokens are beside it; a token file without ``row``,
# which earlier versions wrote, and whose intervals are over blocks; and JSON that is no result, which is passed over.
CANNOT_BE_KNOWN = {f"moved {name}, without tokens" for name in ("nll_sum", "prob_sum")} | {
    "no row",
    "null named cand.json",
}


def cases() -> Iterator[Case]:
    yield from json_cases()
    yield from byte_cases("json", 150)
    yield from byte_cases("tokens.parquet", 300)
    for group, found in (("columns of the token file", PARQUET), ("what lies in the folder", ENTRIES)):
        for name, change in found.items():
            yield Case(group, name, change)


def in_a_process(case: Case, files: dict[str, bytes], expected: dict[bool, dict]) -> tuple[str, str]:
    """The outcome of a case, of ``files`` by name, in a process of its own, which has SECONDS."""
    with tempfile.TemporaryDirectory() as name:
        folder, (read, write) = Path(name), os.pipe()
        for file, content in files.items():
            (folder / file).write_bytes(content)
        case.change(folder)
        if (process := os.fork()) == 0:
            signal.alarm(SECONDS)
            whole = (folder / "cand.tokens.parquet").exists() or (folder / "base.tokens.parquet").exists()
            found, why = outcome(folder, expected[whole])
            os.write(write, json.dumps([found, why[-2000:]]).encode())
            os._exit(0)
        os.close(write)
        with open(read, "rb") as pipe:
            answer = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if status == -signal.SIGALRM:
            return HANG, ""
        return tuple(json.loads(answer)) if status == 0 else (FOREIGN, f"ended by signal {-status}")


def made() -> tuple[dict[str, bytes], dict[bool, dict]]:
    """The unchanged files by name; what a report on them shows, with tokens and without."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        whole = shown(folder)
        without_tokens(lambda _: None)(folder)
        return files, {True: whole, False: shown(folder)}


def main() -> None:
    (files, expected), counts, told = made(), {}, {FOREIGN: [], HANG: [], WRONG: []}
    every = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    for case in list(cases())[::every]:
        found, why = in_a_process(case, files, expected)
        counts.setdefault(case.group, Counter())[found] += 1
        if found in told:
            told[found].append(f"{case.group}: {case.name}\n    {why}")
    order = (OWN, FOREIGN, HANG, RIGHT, WRONG)
    print("| input | cases |", " | ".join(order), "|\n|---|---:|" + "---:|" * len(order))
    for group, found in counts.items():
        print(f"| {group} | {sum(found.values())} |", " | ".join(str(found[kind]) for kind in order), "|")
    for kind, lines in told.items():
        print(f"\n{kind}: {len(lines)}", *lines[:400], sep="\n")


if __name__ == "__main__":
    main()
