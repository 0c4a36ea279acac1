"""The report: what it says first, its tables, its files, and earlier result files among new ones.

golden/report holds results of a small model and two reports on them, written by version 0.1.0 before it had a report model:
``strict`` with no candidate that passes, ``wide`` with gates at one of two lengths. Since then they were given the column
``trained``, its style and its note, and nothing else. In its pages every picture is cut down
to ``<svg/>``. Among the results are one that lacks a length and a token file, and one of the earlier shape.
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
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_results import random_tokens, write

from eaftlib.errors import ResultError
from eaftlib.evaluation import results
from eaftlib.evaluation.gates import Gates, read_gates
from eaftlib.report import figures, model, page, tables
from eaftlib.report import folder as report_folder

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


def test_the_page_shows_headline_curve_and_every_model(built, tmp_path):
    report_folder.write(built, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert built.headline in page and page.count("<svg") == 3 and 'class="FAIL"' in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")  # nothing is fetched: only names inside the pictures


def test_a_label_cannot_inject_markup(built):
    script = "<script>alert(1)</script>"
    candidates = tuple(replace(c, label=script, reasons=(script,)) for c in built.candidates)
    rows = tuple(replace(r, label=script, gate=script) for r in built.rows)
    assert "<script>" not in page.html(replace(built, headline=script, candidates=candidates, rows=rows))


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
    assert old.comparison.binned and old.comparison.ppl.interval is None and old.keep_n is None
    assert "(binned)" in tables.markdown(built) and "no blocks" in tables.markdown(built)


def test_a_candidate_that_shares_no_length_with_the_baseline_is_incomplete(tmp_path):
    write(tmp_path, "base", {("UNION", 64): random_tokens()}, {"num_experts": 32})
    write(tmp_path, "other", {("UNION", 128): random_tokens()}, candidate("reap", 24))
    built = model.build(results.read_all([str(tmp_path)]), "base", GATES)
    assert built.content()["models"]["other"]["verdict"] == "INCOMPLETE"
    assert built.content()["models"]["other"]["criterion"] == "reap" and built.curve is None
    assert "<svg" in page.html(built)


@pytest.mark.parametrize("dtype, said", [("bfloat16", True), ("float32", False)])
def test_a_difference_of_types_is_said_in_verdict_and_notes(folder, dtype, said):
    tokens = {("UNION", 64): random_tokens(seed=1), ("UNION", 128): random_tokens(seed=2)}
    write(folder, "base", tokens, {"num_experts": 32, "dtype": "float32"})
    write(folder, "half-24", tokens, candidate("reap", 24) | {"dtype": dtype})
    (folder / "near-24.json").unlink(), (folder / "far-16.json").unlink()
    built = model.build(results.read_all([str(folder)]), "base", GATES)
    reason, note = "scored in bfloat16, the baseline in float32", "was scored in float32, half-24 in bfloat16."
    assert (reason in built.candidates[0].reasons) == said
    for text in (tables.markdown(built), page.html(built)):
        assert (reason in text) == (note in text) == said
    assert built.candidates[0].status == "PASS"  # said, not judged


@pytest.fixture
def with_recovered(folder):
    """Two recovered models more: one that passes where its untrained twin far-16 fails, and one of routers alone."""
    tokens = {("UNION", 64): random_tokens(seed=1), ("UNION", 128): random_tokens(seed=2)}
    write(folder, "recovered-16", shifted(tokens, 1.002), recovered(16))
    write(folder, "routers-only-16", shifted(tokens, 1.5), recovered(16, share=0.000112, tokens=655_360))
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
    html = (tmp_path / "report.html").read_text()
    assert html.count('<tr class="recovered">') == 2 * 3 and "<td>16 of 32</td><td>3.6%</td>" in html
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
    assert lines[4].endswith("*  3.6% trained on 2.1 M tokens")
    assert lines[5].endswith("   0.011% trained on 655,360 tokens")
    for line, label in zip(lines[4:6], ("recovered-16", "routers-only-16"), strict=True):
        assert float(line.split()[1].strip("*")) == pytest.approx(worst[label], abs=5e-4)
    ends = [re.search(r"[+-]\d+\.\d{3}", line[30:]).end() for line in (row, *lines[4:6])]
    assert len(set(ends)) == 1  # in the column of its keep count


def test_a_verdict_of_an_earlier_version_is_summarised(built):
    content = built.content()
    expected = tables.summary(content)
    for found in content["models"].values():
        del found["recovered"]
    assert tables.summary(content) == expected


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
            # Of an earlier shape, so its name is its label; not every system has such a name for a file of a repository.
            name = path.stem.replace("one-length", "one <length>")
            (folder / name).write_bytes(gzip.decompress(path.read_bytes()))
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


def test_a_page_is_that_of_the_earlier_version_but_for_its_pictures(golden):
    found = re.sub(r"<svg.*?</svg>", "<svg/>", (golden[1] / "report.html").read_text(), flags=re.DOTALL)
    assert found == (golden[0] / "report.html").read_text()


def test_two_processes_write_the_same_page(golden, golden_results, tmp_path):
    code = (
        "import sys; from eaftlib.evaluation import gates, results; from eaftlib.report import model, page; "
        "found = model.build(results.read_all(sys.argv[1:2]), 'base', gates.read_gates(sys.argv[2])); "
        "print(page.html(found), end='')"
    )
    command = [sys.executable, "-c", code, golden_results, golden[0] / "gates.json"]
    pages = [
        subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True).stdout
        for seed in ("1", "2")
    ]
    assert pages[0] == pages[1] == (golden[1] / "report.html").read_bytes()


def test_a_name_that_a_picture_uses_means_one_thing_in_the_whole_page(golden):
    """Several pictures share a page, and their marks and clips are named by content."""
    meanings, used = {}, set()
    for picture in re.findall(r"<svg.*?</svg>", (golden[1] / "report.html").read_text(), re.DOTALL):
        used |= set(re.findall(r'(?:href="#|url\(#)([^")]+)', picture))
        for element in ElementTree.fromstring(picture).iter():
            element.tail = None
            meanings.setdefault(element.get("id"), set()).add(ElementTree.tostring(element))
    assert used and {name: len(meanings[name]) for name in used} == dict.fromkeys(used, 1)
