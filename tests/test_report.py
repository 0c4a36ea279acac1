"""The report: what it says first, its tables, its files, and earlier result files among new ones."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from test_results import random_tokens, write

from eaftlib.errors import ResultError
from eaftlib.evaluation import results
from eaftlib.evaluation.gates import Gates
from eaftlib.report import report

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
    return report.build(results.read_all([str(folder)]), "base", GATES)


def test_the_headline_names_the_smallest_model_that_passes(built):
    assert built.headline == (
        "near-24 passes test-gates with 24 of 32 experts per layer, 19.0% of the bytes gone; 1 of 2 candidates pass."
    )


def test_the_headline_says_when_none_passes(folder):
    strict = replace(GATES, limits=GATES.limits | {"ppl_absolute": 1e-6})
    built = report.build(results.read_all([str(folder)]), "base", strict)
    assert built.best is None and built.headline == "None of 2 candidates passes test-gates."


def test_a_missing_baseline_is_named(folder):
    with pytest.raises(ResultError, match=r"no result is labelled 'bass'; there are \['base', 'far-16', 'near-24'\]"):
        report.build(results.read_all([str(folder)]), "bass", GATES)


def test_the_files_agree_with_the_results(built, folder, tmp_path):
    report.write(built, tmp_path / "out")
    entries = {r.label: r.entries for r in results.read_all([str(folder)])}
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = {(r["model"], r["pack"], int(r["seq_len"])): r for r in csv.DictReader(file)}
    assert len(rows) == 9
    for (model, pack, seq_len), row in rows.items():
        found, base = entries[model][pack, seq_len]["model"], entries["base"][pack, seq_len]["model"]
        assert float(row["ppl"]) == pytest.approx(found["ppl"])
        assert float(row["dppl"]) == pytest.approx(found["ppl"] - base["ppl"])
    assert rows["far-16", "UNION", 64]["gate"] == "FAIL" and rows["far-16", "a", 64]["gate"] == ""
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert {m: v["verdict"] for m, v in verdict["models"].items()} == {"near-24": "PASS", "far-16": "FAIL"}
    assert verdict["best"] == "near-24"


def test_the_page_shows_headline_curve_and_every_model(built, tmp_path):
    report.write(built, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert built.headline in page and page.count("<svg") == 3 and 'class="FAIL"' in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")  # nothing is fetched: only names inside the pictures


def test_a_label_cannot_inject_markup(built):
    verdicts = [replace(v, reasons=("<script>alert(1)</script>",)) for v in built.verdicts]
    assert "<script>" not in report._html(replace(built, verdicts=verdicts))


def test_the_summary_is_a_table_of_criteria_by_keep_counts(built):
    text = report.summary(report.verdict_content(built)).splitlines()
    base, near = (
        next(r for r in built.rows if (r.label, r.seq_len, r.pack) == (m, 64, "UNION")) for m in ("base", "near-24")
    )
    assert text[1].split() == ["keep", "24", "keep", "16"]
    name, cell, _ = text[2].split()
    assert name == "reap_mass" and cell.endswith("*")
    worst = max(c.value for v in built.verdicts if v.label == "near-24" for c in v.checks if c.gate == "dPPL")
    assert float(cell[:-1]) == pytest.approx(worst, abs=5e-4) and near.model["ppl"] > base.model["ppl"]


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
    built = report.build(results.read_all([str(folder)]), "base", GATES)
    old = next(r for r in built.rows if r.label == "old")
    assert old.comparison.binned and old.comparison.ppl.interval is None and old.keep_n is None
    assert "(binned)" in report.markdown(built) and "no blocks" in report.markdown(built)
