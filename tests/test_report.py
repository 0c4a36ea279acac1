"""The report: what it says first, its tables, its files, and earlier result files among new ones.

golden/report holds results of a small model and two reports on them: ``strict`` with no candidate that passes, ``wide`` with
gates at one of two lengths. Among the results are one that lacks a length and a token file, and one of the earlier shape.
The page itself is looked at in test_page.
"""

import csv
import gzip
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from test_results import edit, make_legacy, random_tokens, write

from eaftlib.errors import ResultError
from eaftlib.evaluation import results
from eaftlib.evaluation.gates import Check, Gates, Verdict, read_gates
from eaftlib.files import write_together
from eaftlib.report import candidates, figures, model, page, tables
from eaftlib.report import folder as report_folder
from eaftlib.report.candidates import Candidate, Recovered

GOLDEN = Path(__file__).parent / "golden" / "report"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
GATES = Gates(
    "test-gates",
    "UNION",
    (64, 128),
    {"ppl_absolute": 0.25, "ppl_relative": 0.05, "cc_rate": 0.02, "mean_prob": 0.02, "js2d": 0.5},
)


def shifted(tokens, factor):
    return {key: replace(part, nll=(part.nll * factor).astype(np.float32)) for key, part in tokens.items()}


def candidate(criterion, keep_n):
    chosen_by = {"criterion": criterion, "keep_n": keep_n, "ranking_rows": "calib"}
    return {"keep_set": chosen_by, "num_experts": 32, "bytes_total": 1000 + 100 * keep_n}


def recovered(keep_n, share=0.0357, tokens=2_097_152, rows="calib"):
    trained = {"trained": ["routers"], "parameters_share": share, "tokens": tokens, "text": {"rows": rows}}
    return candidate("reap_mass", keep_n) | {"num_experts": keep_n, "recovered": trained}


@pytest.fixture
def folder(tmp_path):
    """A baseline, one candidate that is nearly it and one that is far off, on two primary lengths and another pack."""
    tokens = {
        ("UNION", 64): random_tokens(seed=1),
        ("UNION", 128): random_tokens(seed=2),
        ("a", 64): random_tokens(seed=3),
    }
    write(tmp_path, "base", tokens, {"num_experts": 32, "bytes_total": 4200})
    write(tmp_path, "near-24", shifted(tokens, 1.001), candidate("reap_mass", 24))
    write(tmp_path, "far-16", shifted(tokens, 2.0), candidate("reap_mass", 16))
    return tmp_path


@pytest.fixture
def built(folder):
    return model.build(results.read_all([str(folder)]), "base", GATES)


def test_the_headline_names_the_smallest_model_that_passes(built):
    assert built.headline == (
        "near-24 passes test-gates with 24 of 32 experts per layer, 19.0% of the bytes gone; 1 of 2 candidates pass."
    )


def test_the_headline_says_when_none_passes(folder):
    strict = replace(GATES, limits=GATES.limits | {"ppl_absolute": 1e-6})
    built = model.build(results.read_all([str(folder)]), "base", strict)
    assert built.best is None and built.headline == "None of 2 candidates passes test-gates."


def test_a_missing_baseline_is_named(folder):
    with pytest.raises(ResultError, match=r"no result is labelled 'bass'; there are \['base', 'far-16', 'near-24'\]"):
        model.build(results.read_all([str(folder)]), "bass", GATES)


def test_the_files_agree_with_the_results(built, folder, tmp_path):
    report_folder.write(built, tmp_path / "out")
    entries = {r.label: r.entries for r in results.read_all([str(folder)])}
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = {(r["model"], r["pack"], int(r["seq_len"])): r for r in csv.DictReader(file)}
    assert len(rows) == 9
    for (label, pack, seq_len), row in rows.items():
        found, base = entries[label][pack, seq_len]["model"], entries["base"][pack, seq_len]["model"]
        assert float(row["ppl"]) == pytest.approx(found["ppl"])
        assert float(row["dppl"]) == pytest.approx(found["ppl"] - base["ppl"])
    assert rows["far-16", "UNION", 64]["gate"] == "FAIL" and rows["far-16", "a", 64]["gate"] == ""
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert {m: v["verdict"] for m, v in verdict["models"].items()} == {"near-24": "PASS", "far-16": "FAIL"}
    assert verdict["best"] == "near-24"


def judged(label, keep_n, checks, missing=(), criterion="reap_mass", recovered=None):
    """A candidate with (gate, value in limits, evidence, blocks) at 64 tokens; its v1 answer follows from the values."""
    made = tuple(
        Check(gate, 64, value, 1.0, "PASS" if abs(value) <= 1 else "FAIL", (value, value), shown, blocks)
        for gate, value, shown, blocks in checks
    )
    status = "FAIL" if any(c.status == "FAIL" for c in made) else "INCOMPLETE" if missing else "PASS"
    answers = {c.evidence for c in made}
    shown = next((a for a in ("DIFFERENT", "UNDECIDED", "EQUIVALENT") if a in answers), None)
    verdict = Verdict(label, status, shown, made, missing, (), {})
    return Candidate(label, criterion, keep_n, 32, recovered, None, None, {}, verdict)


EQUAL, FAR = [("dPPL", 0.2, "EQUIVALENT", None)], [("dPPL", 3.0, "DIFFERENT", None)]
OPEN = [("dPPL", 0.9, "UNDECIDED", 700), ("JS2D", 0.8, "UNDECIDED", 900), ("dCC", 0.0, "EQUIVALENT", None)]


def test_blocks_that_decide_are_those_of_the_gate_that_needs_most():
    assert judged("a", 24, OPEN).blocks_to_decide == {64: 900}
    assert judged("a", 24, OPEN + FAR).blocks_to_decide == {}  # decided already


def test_methods_that_pass_with_fewer_experts_come_first_then_those_nearest_to_passing():
    found = [
        judged("far", 24, FAR), judged("near", 20, [("dPPL", 1.5, "DIFFERENT", None)], criterion="ean"),
        judged("small", 16, EQUAL, criterion="recon"), judged("large", 24, EQUAL, criterion="reap"),
        judged("unknown", None, [], missing=(64,), criterion=None), judged("smaller", 12, FAR, criterion="recon"),
    ]  # fmt: skip
    groups = candidates.grouped(found)
    assert [g.method for g in groups] == ["recon", "reap", "ean", "reap_mass", "other checkpoints"]
    assert [c.label for c in groups[0].candidates] == ["small", "smaller"]
    assert candidates.best_of(found).label == "small" and candidates.nearest_of(found).label in ("large", "small")


@pytest.mark.parametrize(
    "found, said",
    [
        ([judged("a", 24, EQUAL)], ["a passes and its differences are shown to be within the limits"]),
        ([judged("a", 24, OPEN)], ["its intervals reach past a limit: evaluate it on more blocks. 900 blocks of 64 tokens"]),
        ([judged("a", 24, EQUAL), judged("b", 16, FAR)], ["passes with 24 experts and fails with 16: try a count", "With 16"]),
        ([judged("a", 24, EQUAL), judged("b", 23, FAR)], ["a passes", "With 23 experts nothing passes untrained"]),
        ([judged("a", 24, FAR), judged("b", 20, OPEN, missing=(128,))], ["one candidate is undecided", "for b", "With 24"]),
        ([judged("a", 24, FAR, recovered=Recovered(0.1, 5))], []),
    ],
)  # fmt: skip
def test_what_comes_next_is_what_is_open(found, said):
    steps = candidates.next_steps(tuple(found), GATES)
    for words in said:
        assert any(words in step for step in steps), (words, steps)
    assert said or not steps


def test_the_folder_holds_the_page_tables_and_pictures(built, tmp_path):
    tmp_path = tmp_path / "out"
    written = report_folder.write(built, tmp_path)
    names = {str(path.relative_to(tmp_path)) for path in written}
    pictures = {
        f"figures/{name}.{end}" for name in ("keep_curve", "landscape-64", "landscape-128") for end in ("png", "svg")
    }
    assert names == {"report.html", "report.md", "results.csv", "verdict.json"} | pictures
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == names
    assert all((tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for name in names if name.endswith("png"))


def test_a_folder_that_cannot_be_written_whole_stays_as_it_was(built, tmp_path, monkeypatch):
    report_folder.write(built, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changed = replace(built, headline="another")
    monkeypatch.setattr(figures.Picture, "svg", lambda self: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        report_folder.write(changed, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_files_written_together_are_all_new_or_all_old(tmp_path, monkeypatch):
    write_together(tmp_path, {"a": b"old", "in/b": b"old"})
    with pytest.raises(TypeError):
        write_together(tmp_path, {"a": b"new", "in/b": "no bytes"})
    assert {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == {"a": b"old", "b": b"old"}


HOSTILE = "<img src=x onerror=alert(1)>|`**_x_**`\n# [y](z)"


@pytest.fixture
def hostile(folder):
    """A model and a criterion whose names are markup, a table's bar, a new line; and one that is a formula.

    Labels of today are names of files; earlier files may hold anything.
    """
    tokens = {("UNION", 64): random_tokens(seed=1), ("UNION", 128): random_tokens(seed=2)}
    for name, label, criterion in (("x", HOSTILE, HOSTILE), ("y", "=1+1", "$\\frac_")):
        path = write(folder, name, tokens, candidate(criterion, 20))
        make_legacy(path)
        edit(path, lambda content, label=label: content["meta"].update(label=label))
    return model.build(results.read_all([str(folder)]), "base", GATES)


def test_a_name_in_the_markdown_is_text_and_nothing_else(hostile):
    text = tables.markdown(hostile)
    tokens = [t for token in MarkdownIt().enable("table").parse(text) for t in (token, *(token.children or ()))]
    assert not {t.type for t in tokens} & {
        "html_inline",
        "html_block",
        "link_open",
        "strong_open",
        "em_open",
        "code_inline",
        "image",
    }
    cells = [t.children for i, t in enumerate(tokens) if t.type == "inline" and tokens[i - 1].type == "td_open"]
    words = ["".join(child.content for child in cell) for cell in cells]
    assert " ".join(HOSTILE.split()) in words, [w for w in words if "img" in w]
    assert len(cells) == 4 * len(tables.VERDICTS) + len(hostile.rows) * len(tables.SCORES)


def test_a_name_in_the_csv_is_no_formula_and_a_number_stays_one(hostile, tmp_path):
    report_folder.write(hostile, tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"'=1+1", HOSTILE, "base"} <= {row["model"] for row in rows}
    assert all(float(row["dmean_prob"]) < 0 for row in rows if row["model"] == "far-16")


def test_a_name_in_the_page_is_text(hostile):
    text = page.html(hostile)
    assert "<img" not in text and "&lt;img src=x onerror=alert(1)&gt;" in text
    assert len(re.findall(r"</?script", text)) == 8  # its own four, and no other


def test_the_summary_is_a_table_of_criteria_by_keep_counts(built):
    text = tables.summary(built.content()).splitlines()
    base, near = (
        next(r for r in built.rows if (r.label, r.seq_len, r.pack) == (m, 64, "UNION")) for m in ("base", "near-24")
    )
    assert text[1].split() == ["keep", "24", "keep", "16"]
    name, cell, _ = text[2].split()
    assert name == "reap_mass" and cell.endswith("*")
    worst = max(c.value for v in built.candidates if v.label == "near-24" for c in v.checks if c.gate == "dPPL")
    assert float(cell[:-1]) == pytest.approx(worst, abs=5e-4) and near.ppl > base.ppl


def change_of_means(content):
    """Of a pack that decides nothing, and everything that a JSON alone would be found out by."""
    entry = content["packs"][1]["seq"]["64"]["model"]
    half = len(entry["blocks"]["nll_sum"]) // 2
    entry["blocks"]["prob_sum"][0] += 0.5
    entry["blocks"]["prob_sum"][half] -= 0.5


def forget_a_pack(content):
    del content["packs"][1]


@pytest.mark.parametrize("label", ["base", "near-24"])
@pytest.mark.parametrize(
    "change, words",
    [(change_of_means, r"a at 64.*prob_sum"), (forget_a_pack, r"tokens\.parquet has a at 64, .* has not")],
)
def test_every_number_in_a_report_is_that_of_the_tokens(folder, label, change, words):
    path = folder / f"{label}.json"
    content = json.loads(path.read_text())
    assert content["packs"][1]["pack"] == "a"
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ResultError, match=words):
        model.build(results.read_all([str(folder)]), "base", GATES)


def test_a_result_that_shares_nothing_with_the_baseline_is_incomplete_and_every_file_is_there(folder, tmp_path):
    write(folder, "quick", {("b", 256): random_tokens(seed=9)}, candidate("ean", 12))
    found = model.build(results.read_all([str(folder)]), "base", GATES)
    report_folder.write(found, tmp_path / "report")
    verdict = json.loads((tmp_path / "report" / "verdict.json").read_text())
    assert verdict["models"]["quick"]["verdict"] == "INCOMPLETE" and verdict["models"]["near-24"]["verdict"] == "PASS"
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"report.html", "report.md", "results.csv", "verdict.json"} <= names


def test_an_earlier_result_file_is_compared_and_marked_binned(folder):
    path = folder / "far-16.json"
    content = json.loads(path.read_text())
    del content["schema"]
    content["meta"] = {"model_id": "old", "num_blocks": 8}
    for pack in content["packs"]:
        for entry in pack["seq"].values():
            del entry["rows_sha256"], entry["model"]["blocks"]
    (folder / "old.json").write_text(json.dumps(content))
    path.unlink()
    built = model.build(results.read_all([str(folder)]), "base", GATES)
    old = next(r for r in built.rows if r.label == "old")
    assert old.binned and old.comparison.ppl.interval is None and old.keep_n is None
    assert "(binned)" in tables.markdown(built) and "not recorded" in tables.markdown(built)


def test_a_candidate_that_shares_no_length_with_the_baseline_is_incomplete(tmp_path):
    write(tmp_path, "base", {("UNION", 64): random_tokens()}, {"num_experts": 32})
    write(tmp_path, "other", {("UNION", 128): random_tokens()}, candidate("reap", 24))
    built = model.build(results.read_all([str(tmp_path)]), "base", GATES)
    assert built.content()["models"]["other"]["verdict"] == "INCOMPLETE"
    assert built.content()["models"]["other"]["criterion"] == "reap" and built.curve is None
    report_folder.write(built, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "report.html",
        "report.md",
        "results.csv",
        "verdict.json",
        "figures",
    }
    with (tmp_path / "out" / "results.csv").open() as file:
        other = next(row for row in csv.DictReader(file) if row["model"] == "other")
    assert float(other["ppl"]) > 1 and other["dppl"] == other["js2d"] == other["cc_rate_at_base"] == ""


@pytest.mark.parametrize("dtype, said", [("bfloat16", True), ("float32", False)])
def test_a_difference_of_types_is_said_in_verdict_and_notes(folder, dtype, said):
    tokens = {("UNION", 64): random_tokens(seed=1), ("UNION", 128): random_tokens(seed=2)}
    write(folder, "base", tokens, {"num_experts": 32, "dtype": "float32"})
    write(folder, "half-24", tokens, candidate("reap", 24) | {"dtype": dtype})
    (folder / "near-24.json").unlink(), (folder / "far-16.json").unlink()
    built = model.build(results.read_all([str(folder)]), "base", GATES)
    note = "was scored in float32, half-24 in bfloat16."
    assert any("bfloat16" in warning for warning in built.candidates[0].verdict.warnings) == said
    for text in (tables.markdown(built), page.html(built)):
        assert (note in text) == said
    assert built.candidates[0].status == "PASS"  # said, not judged


@pytest.fixture
def with_recovered(folder):
    """Two recovered models more: one passes where its untrained twin far-16 fails; one, of routers alone, is worse than it."""
    tokens = {("UNION", 64): random_tokens(seed=1), ("UNION", 128): random_tokens(seed=2)}
    write(folder, "recovered-16", shifted(tokens, 1.002), recovered(16))
    write(folder, "routers-only-16", shifted(tokens, 2.5), recovered(16, share=0.000112, tokens=655_360))
    return model.build(results.read_all([str(folder)]), "base", GATES)


def test_the_headline_says_what_was_trained(with_recovered):
    assert with_recovered.headline == (
        "recovered-16 passes test-gates with 16 of 32 experts per layer, every kept expert matrix as it was, 3.6% of the "
        "parameters trained on 2.1 M tokens; 38.1% of the bytes gone; 2 of 4 candidates pass."
    )


def test_every_table_shows_a_recovered_model_beside_an_untouched_one(with_recovered, tmp_path):
    report_folder.write(with_recovered, tmp_path)
    with (tmp_path / "results.csv").open() as file:
        found = {r["model"]: (r["trained_parameters_share"], r["trained_tokens"]) for r in csv.DictReader(file)}
    numbers = {label: [float(x) for x in pair if x] for label, pair in found.items()}
    assert numbers == {
        "base": [], "near-24": [], "far-16": [], "recovered-16": [0.0357, 2097152], "routers-only-16": [0.000112, 655360],
    }  # fmt: skip
    text = (tmp_path / "report.md").read_text()
    tables_of = {
        title: part.splitlines() for title, part in re.findall(r"^## (.*?)\n\n(.*?)\n\n", text, re.DOTALL | re.M)
    }
    for title in ("Verdicts", "UNION, 64 tokens"):
        header, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables_of[title]]
        shown = {line[0]: line[header.index("trained")] for line in lines}
        expected = {"near-24": "-", "far-16": "-", "recovered-16": "3.6%", "routers-only-16": "0.011%"}
        assert shown == expected | ({} if title == "Verdicts" else {"base": "-"})
    verdict = json.loads((tmp_path / "verdict.json").read_text())["models"]
    assert verdict["recovered-16"]["recovered"] == {"parameters_share": 0.0357, "tokens": 2097152}
    assert verdict["far-16"]["recovered"] is None


def test_a_recovered_model_has_a_line_of_its_own_in_the_summary(with_recovered):
    lines = tables.summary(with_recovered.content()).splitlines()
    (row,) = [line for line in lines if line.startswith("reap_mass")]
    worst = {c.label: max(k.value for k in c.checks if k.gate == "dPPL") for c in with_recovered.candidates}
    assert float(row.split()[2]) == pytest.approx(
        worst["far-16"], abs=5e-4
    )  # untrained, as if nothing had been recovered
    assert lines[3] == "" and lines[4].startswith("recovered-16") and lines[5].startswith("routers-only-16")
    assert re.search(r"\d\*\??  +3\.6% trained on 2\.1 M tokens$", lines[4])
    assert re.search(r"\d\??  +0\.011% trained on 655,360 tokens$", lines[5])
    for line, label in zip(lines[4:6], ("recovered-16", "routers-only-16"), strict=True):
        assert float(line.split()[1].strip("*?")) == pytest.approx(worst[label], abs=5e-4)
    ends = [re.search(r"[+-]\d+\.\d{3}", line[30:]).end() for line in (row, *lines[4:6])]
    assert len(set(ends)) == 1  # in the column of its keep count


EARLIER = {
    "schema": "eaft-verdict/1",
    "gates": "test-gates",
    "baseline": "base",
    "headline": "None of 3 candidates passes test-gates.",
    "best": None,
    "models": {
        label: {
            "verdict": verdict,
            "keep_n": keep_n,
            "criterion": "ean",
            "reasons": [],
            "checks": [{"gate": "dPPL", "seq_len": 64, "value": value, "limit": 0.1, "status": "PASS", "reason": ""}],
        }
        for label, verdict, keep_n, value in (
            ("a", "UNDECIDED", 24, 0.05),
            ("b", "FAIL", 16, 0.5),
            ("c", "FAIL", 12, 2.0),
        )
    },
}


def test_a_verdict_of_an_earlier_version_is_summarised():
    lines = tables.summary(EARLIER).splitlines()
    assert lines[2].split() == ["ean", "+0.050?", "+0.500", "+2.000"]
    assert lines[-1] == "None of 3 candidates passes test-gates."


def test_several_verdicts_end_in_one_sentence_for_the_best_of_all(built, with_recovered):
    text = tables.summary(EARLIER, built.content(), with_recovered.content())
    (last,) = [line for line in text.splitlines() if "passes" in line and "*" not in line]
    assert text.endswith(last) and last.startswith("recovered-16 passes test-gates with 16 of 32 experts per layer")
    assert last.endswith("; 38.1% of the bytes gone; 3 of 9 candidates pass.")


def test_several_verdicts_without_a_pass_say_so_once():
    assert tables.summary(EARLIER, EARLIER).splitlines()[-1] == "None of 6 candidates passes test-gates."


def test_the_curve_draws_recovered_models_as_stars_off_every_line(with_recovered):
    rows = [r for r in with_recovered.rows if r.pack == "UNION" and not r.is_baseline]
    for axes, seq_len in zip(figures.keep_curve(with_recovered.curve).axes, (64, 128), strict=True):
        drawn = {line.get_label(): line for line in axes.lines}
        points = {label: sorted(zip(*drawn[label].get_data(), strict=True)) for label in ("reap_mass", "recovered")}
        here = {r.label: (r.keep_n, r.comparison.ppl.value) for r in rows if r.seq_len == seq_len}
        assert points["reap_mass"] == [here["far-16"], here["near-24"], (32, 0.0)]
        assert points["recovered"] == sorted([here["recovered-16"], here["routers-only-16"]])
        stars = drawn["recovered"]
        assert (stars.get_marker(), stars.get_linestyle(), stars.get_fillstyle()) == ("*", "None", "full")


def test_a_recovered_model_below_the_baseline_is_inside_the_picture(folder):
    tokens = {("UNION", 64): random_tokens(seed=1), ("UNION", 128): random_tokens(seed=2)}
    write(folder, "better-16", shifted(tokens, 0.7), recovered(16))
    curve = model.build(results.read_all([str(folder)]), "base", GATES).curve
    lowest = min(r.comparison.ppl.value for r in curve.rows)
    assert lowest < -0.25 and all(axes.get_ylim()[0] < lowest for axes in figures.keep_curve(curve).axes)


def test_a_column_formats_what_it_takes_and_leaves_nothing_empty():
    column = tables.Column("x", lambda row: row.get("x"), "+.2f")
    assert (column.text({"x": 1.0}), column.text({"x": None}), column.text({})) == ("+1.00", "", "")


def test_importing_the_report_model_loads_no_renderer_and_no_torch():
    code = "import sys, eaftlib.report.model, eaftlib.report.tables; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in loaded and not {"matplotlib", "torch", "transformers", "jinja2", "pandas"} & set(loaded)


@pytest.fixture(scope="module")
def golden_results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    for path in (GOLDEN / "results").iterdir():
        if path.suffix == ".gz":
            (folder / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        else:
            shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture(scope="module", params=["strict", "wide"])
def golden(request, golden_results, tmp_path_factory):
    """(the golden folder, the folder written now)"""
    gates = read_gates(GOLDEN / request.param / "gates.json")
    out = tmp_path_factory.mktemp(request.param)
    report_folder.write(model.build(results.read_all([str(golden_results)]), "base", gates), out)
    return GOLDEN / request.param, out


def assert_same(found, expected):
    """Equal text; numbers printed in full may differ by the rounding of another processor's exp and log."""
    assert NUMBER.split(found) == NUMBER.split(expected)
    for x, y in zip(NUMBER.findall(found), NUMBER.findall(expected), strict=True):
        in_full = max(len(x), len(y)) >= 15
        assert x == y or (in_full and math.isclose(float(x), float(y), rel_tol=1e-12, abs_tol=1e-15)), (x, y)


@pytest.mark.parametrize("name", ["report.md", "results.csv", "verdict.json"])
def test_a_report_is_that_of_the_earlier_version(golden, name):
    assert_same((golden[1] / name).read_bytes().decode(), (golden[0] / name).read_bytes().decode())


def test_a_summary_is_that_of_the_earlier_version(golden):
    text = tables.summary(json.loads((golden[1] / "verdict.json").read_text()))
    assert text + "\n" == (golden[0] / "summary.txt").read_text()


def test_two_processes_write_the_same_bytes(golden, golden_results, tmp_path):
    code = (
        "import sys; from eaftlib.evaluation import gates, results; from eaftlib.report import folder, model; "
        "found = model.build(results.read_all(sys.argv[1:2]), 'base', gates.read_gates(sys.argv[2])); "
        "folder.write(found, sys.argv[3])"
    )
    command = [sys.executable, "-c", code, golden_results, golden[0] / "gates.json", tmp_path]
    subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "7"}, check=True)
    expected = {p.relative_to(golden[1]): p.read_bytes() for p in golden[1].rglob("*") if p.is_file()}
    assert (
        len(expected) > 6
        and {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == expected
    )
