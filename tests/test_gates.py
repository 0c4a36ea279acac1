"""Verdicts on hand-made results at, just under and just over each limit."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_results import random_tokens, write

from eaftlib.errors import ParameterError, ResultError
from eaftlib.evaluation import gates as module
from eaftlib.evaluation.compare import Delta
from eaftlib.evaluation.divergence import JS2D
from eaftlib.evaluation.gates import Gates, judge, read_gates, saw_its_rows, trained_on_its_rows
from eaftlib.evaluation.results import Result, read
from eaftlib.evaluation.schema import SCHEMA
from eaftlib.evaluation.statistics import aggregate

FILE = Path(__file__).parents[1] / "params" / "gates" / "near-lossless-v1.json"
SEQ_LENS = (1024, 2048)


@pytest.fixture(scope="module")
def gates():
    return read_gates(FILE)


def histogram(counts):
    """All tokens in the first cells of a 160 x 120 histogram."""
    cells = [0] * (160 * 120)
    for cell, count in counts.items():
        cells[cell] = count
    edges = {f"{axis}_edges": [i / n for i in range(n + 1)] for axis, n in (("x", 160), ("y", 120))}
    return edges | {"counts": cells, "xbins": 160, "ybins": 120}


def result(label, seq_lens=SEQ_LENS, pack="UNION", meta=(), **model):
    """A result with exactly these aggregates; its histogram decides js2d and, binned, the conflict rate."""
    base = aggregate(random_tokens(), 8, 0.15) | {"ppl": 8.0, "mean_prob": 0.5, "cc_rate": 0.0}
    base |= {"p_thr": 0.1, "h_thr": 0.1, "hist2d_x_H": histogram({19000: 1_000_000}), "kept_tokens": 1_000_000}
    del base["blocks"]
    seq = {str(s): {"rows_seen": 1, "rows_sha256": "r", "model": base | model} for s in seq_lens}
    content = {"schema": SCHEMA, "meta": dict(meta), "packs": [{"pack": pack, "seq": seq}]}
    return Result(Path(f"/nowhere/{label}.json"), label, content)


def status(gates, candidate, baseline, gate=None):
    verdict = judge(candidate, baseline, gates)
    if gate is None:
        return verdict.status
    (found,) = {check.status for check in verdict.checks if check.gate == gate}
    return found


def test_the_published_gates_are_those_of_the_design(gates):
    assert (gates.name, gates.primary_pack, gates.primary_seq_lens) == ("near-lossless-v1", "UNION", SEQ_LENS)
    assert gates.limits == {
        "ppl_absolute": 0.25,
        "ppl_relative": 0.05,
        "cc_rate": 0.002,
        "mean_prob": 0.02,
        "js2d": 0.02,
    }


@pytest.mark.parametrize("base, limit", [(2.0, 0.1), (4.0, 0.2), (5.0, 0.25), (5.1, 0.25), (100.0, 0.25)])
def test_the_perplexity_limit_is_the_smaller_of_two(gates, base, limit):
    assert gates.ppl_limit(base) == pytest.approx(limit, rel=1e-12)


def test_an_equal_model_passes(gates):
    verdict = judge(result("c"), result("b"), gates)
    assert verdict.status == "PASS" and verdict.warnings == verdict.missing == ()
    assert [(c.gate, c.seq_len) for c in verdict.checks] == [
        (gate, s) for s in SEQ_LENS for gate in ("dPPL", "dCC", "d mean p", "JS2D")
    ]


@pytest.mark.parametrize(
    "base, delta, expected",
    [
        (8.0, 0.25, "PASS"),
        (8.0, -0.25, "PASS"),
        (8.0, 0.2499, "PASS"),
        (8.0, 0.2501, "FAIL"),
        (8.0, -0.2501, "FAIL"),
        (2.0, 0.0999, "PASS"),
        (2.0, 0.1001, "FAIL"),
        (2.0, 0.2, "FAIL"),
    ],
)
def test_perplexity_gate(gates, base, delta, expected):
    candidate, baseline = result("c", ppl=base + delta), result("b", ppl=base)
    assert status(gates, candidate, baseline, "dPPL") == expected == status(gates, candidate, baseline)


@pytest.mark.parametrize("base, found", [(3.0, 3.15), (2.2, 2.31), (2.0, 2.1), (9.9, 10.15), (3.1, 2.945)])
def test_a_perplexity_on_the_limit_in_decimals_passes(gates, base, found):
    assert status(gates, result("c", ppl=found), result("b", ppl=base), "dPPL") == "PASS"


@pytest.mark.parametrize("delta, expected", [(0.0, "PASS"), (0.0199, "PASS"), (0.0201, "FAIL"), (-0.0201, "FAIL")])
def test_mean_probability_gate(gates, delta, expected):
    candidate = result("c", mean_prob=0.5 + delta)
    assert status(gates, candidate, result("b"), "d mean p") == expected == status(gates, candidate, result("b"))


@pytest.mark.parametrize("base, found", [(0.5, 0.52), (0.5, 0.48), (0.6, 0.62), (0.71, 0.69), (0.0, 0.02)])
def test_a_mean_probability_on_the_limit_in_decimals_passes(gates, base, found):
    assert status(gates, result("c", mean_prob=found), result("b", mean_prob=base), "d mean p") == "PASS"


@pytest.mark.parametrize("share, expected", [(0.0, "PASS"), (0.0019, "PASS"), (0.002, "PASS"), (0.0021, "FAIL")])
def test_conflict_gate(gates, share, expected):
    """Cell 0 lies under both thresholds; the baseline has no token there."""
    conflicts = round(1_000_000 * share)
    candidate = result("c", hist2d_x_H=histogram({0: conflicts, 19000: 1_000_000 - conflicts}))
    assert status(gates, candidate, result("b"), "dCC") == expected == status(gates, candidate, result("b"))


def js_of_moved_share(moved):
    """JS divergence when this share of the tokens leaves the one cell of the baseline."""
    from math import log

    return (log(2 / (2 - moved)) + (1 - moved) * log((2 - 2 * moved) / (2 - moved)) + moved * log(2)) / 2


@pytest.mark.parametrize("moved", [0.01, 0.054, 0.055, 0.056, 0.057, 0.058, 0.059, 0.06, 0.2])
def test_divergence_gate(gates, moved):
    count = round(moved * 1_000_000)
    candidate = result("c", hist2d_x_H=histogram({18999: count, 19000: 1_000_000 - count}))
    expected = "PASS" if js_of_moved_share(moved) <= 0.02 else "FAIL"
    assert judge(candidate, result("b"), gates).comparisons[1024].js2d.value == pytest.approx(js_of_moved_share(moved))
    assert status(gates, candidate, result("b"), "JS2D") == expected == status(gates, candidate, result("b"))


NAN = float("nan")


@pytest.mark.parametrize("gate, changes", [
    ("dPPL", {"ppl": Delta(NAN, None)}),
    ("dCC", {"cc": Delta(NAN, (0.0, 0.0))}),
    ("d mean p", {"mean_prob": Delta(NAN, None)}),
    ("JS2D", {"js2d": JS2D(NAN, None, None, 0.0)}),
    ("JS2D", {"js2d": JS2D(NAN, NAN, (NAN, NAN), NAN)}),
])  # fmt: skip
def test_a_value_that_is_no_number_never_passes(gates, monkeypatch, gate, changes):
    compare = module.compare
    monkeypatch.setattr(module, "compare", lambda *a: replace(compare(*a), **changes))
    verdict = judge(result("c"), result("b"), gates)
    assert verdict.status == "FAIL" and {c.status for c in verdict.checks if c.gate == gate} == {"FAIL"}
    assert all(c.status == "PASS" for c in verdict.checks if c.gate != gate)


@pytest.mark.parametrize("name", ["ppl_absolute", "ppl_relative", "cc_rate", "mean_prob", "js2d"])
def test_a_limit_that_is_no_number_never_passes(gates, name):
    broken = Gates("x", "UNION", SEQ_LENS, gates.limits | {name: NAN})
    assert judge(result("c"), result("b"), broken).status == "FAIL"


@pytest.mark.parametrize("interval", [(NAN, NAN), (NAN, 0.1), (-0.1, NAN), (-0.3, 0.1), (0.1, 0.3)])
def test_a_pass_whose_interval_is_not_within_the_limit_is_not_shown(gates, monkeypatch, interval):
    compare = module.compare
    monkeypatch.setattr(module, "compare", lambda *a: replace(compare(*a), ppl=Delta(0.0, interval)))
    verdict = judge(result("c"), result("b"), gates)
    assert verdict.status == "PASS" and verdict.checks[0].evidence == "UNDECIDED"


@pytest.mark.parametrize("value, interval, limits, shown, blocks", [
    (0.0, (-0.1, 0.1), (-0.25, 0.25), "EQUIVALENT", None),
    (0.2, (0.15, 0.25), (-0.25, 0.25), "EQUIVALENT", None),  # on the limit
    (0.2, (0.15, 0.26), (-0.25, 0.25), "UNDECIDED", 144),  # 0.06 above to fit into 0.05: 1.44 times as many
    (-0.2, (-0.3, -0.1), (-0.25, 0.25), "UNDECIDED", 400),  # 0.1 into 0.05
    (0.3, (0.2, 0.4), (-0.25, 0.25), "UNDECIDED", 400),  # 0.1 below, to be above the limit by 0.05
    (-0.3, (-0.4, -0.1), (-0.25, 0.25), "UNDECIDED", 1600),  # 0.2 above
    (0.3, (0.26, 0.4), (-0.25, 0.25), "DIFFERENT", None),
    (-0.3, (-0.4, -0.26), (-0.25, 0.25), "DIFFERENT", None),
    (0.25, (0.2, 0.3), (-0.25, 0.25), "UNDECIDED", None),  # on the limit: no number of blocks
    (0.2499, (0.1, 0.4), (-0.25, 0.25), "UNDECIDED", None),  # more than a thousand times as many
    (0.0, (-0.4, 0.4), (-0.25, 0.25), "UNDECIDED", 256),
    (-0.001, (-0.01, 0.01), (-math.inf, 0.02), "EQUIVALENT", None),  # a divergence has no lower limit
    (0.01, (0.0, 0.03), (-math.inf, 0.02), "UNDECIDED", 400),
    (NAN, (NAN, NAN), (-0.25, 0.25), "UNDECIDED", None),
    (0.0, None, (-0.25, 0.25), None, None),
])  # fmt: skip
def test_evidence_by_hand(value, interval, limits, shown, blocks):
    assert module.evidence(value, interval, *limits, 100) == (shown, blocks)


@pytest.mark.parametrize("answers, combined", [
    (["EQUIVALENT", "EQUIVALENT"], "EQUIVALENT"),
    (["EQUIVALENT", "UNDECIDED"], "UNDECIDED"),
    (["EQUIVALENT", "UNDECIDED", "DIFFERENT"], "DIFFERENT"),
    (["EQUIVALENT", None, "DIFFERENT"], "DIFFERENT"),
    (["EQUIVALENT", None], None),
    (["UNDECIDED", None], None),
    ([], None),
])  # fmt: skip
def test_all_must_be_equivalent_and_one_that_differs_decides(answers, combined):
    assert module._combined(answers) == combined


def test_a_model_is_equivalent_to_itself_and_another_is_not(gates, tmp_path):
    """Forty conversations over eight blocks; the other model's tokens are all a quarter harder."""
    tokens = {("UNION", s): replace(random_tokens(seed=s), row=np.arange(400, dtype=np.int32) // 10) for s in SEQ_LENS}
    worse = {key: replace(part, nll=(part.nll * 1.25).astype(np.float32)) for key, part in tokens.items()}
    base, same, other = (
        read(write(tmp_path, label, part)) for label, part in (("b", tokens), ("c", tokens), ("d", worse))
    )
    found = judge(same, base, gates)
    assert (found.status, found.evidence) == ("PASS", "EQUIVALENT")
    found = judge(other, base, gates)
    assert (found.status, found.evidence) == ("FAIL", "DIFFERENT")
    by_gate = {c.gate: c for c in found.checks if c.seq_len == 1024}
    assert by_gate["dPPL"].evidence == by_gate["d mean p"].evidence == "DIFFERENT"
    assert by_gate["dPPL"].interval[0] < by_gate["dPPL"].value < by_gate["dPPL"].interval[1]


@pytest.mark.parametrize("unit", ["row", "block"])
def test_one_conversation_or_block_decides_nothing(gates, tmp_path, unit):
    """It says nothing of what another would: no interval, least of all one of no width."""
    one = random_tokens(n=50, num_blocks=1)
    row = np.zeros(50, np.int32) if unit == "row" else None
    tokens = {("UNION", s): replace(one, row=row) for s in SEQ_LENS}
    worse = {key: replace(part, nll=(part.nll * 3).astype(np.float32)) for key, part in tokens.items()}
    base, other = (read(write(tmp_path, label, part)) for label, part in (("b", tokens), ("d", worse)))
    for candidate, status in ((base, "PASS"), (other, "FAIL")):
        found = judge(candidate, base, gates)
        assert (found.status, found.evidence) == (status, "UNDECIDED")
        assert {(c.interval, c.evidence, c.blocks_to_decide) for c in found.checks} == {(None, "UNDECIDED", None)}


def test_an_empty_histogram_is_an_error_and_no_pass(gates):
    empty = result("c", hist2d_x_H=histogram({}))
    with pytest.raises(ResultError, match="JS2D of c and b on UNION at 1024: a histogram is empty"):
        judge(empty, result("b"), gates)


@pytest.mark.parametrize("found, expected, warnings", [
    ("bfloat16", "float32", ("scored in bfloat16, the baseline in float32",)),
    ("float32", "bfloat16", ("scored in float32, the baseline in bfloat16",)),
    ("float32", "float32", ()),
    (None, "float32", ()),
    ("float32", None, ()),
    (None, None, ()),
])  # fmt: skip
def test_a_candidate_scored_in_another_type_is_marked(gates, found, expected, warnings):
    candidate, baseline = (
        result(label, meta={"dtype": dtype} if dtype else {}) for label, dtype in (("c", found), ("b", expected))
    )
    assert judge(candidate, baseline, gates).warnings == warnings


def test_a_small_evaluation_shows_nothing(gates):
    """100 tokens spread over 150 cells: the divergence is large, and so is its floor."""
    spread = {"kept_tokens": 100}
    candidate = result("c", hist2d_x_H=histogram({i: 1 for i in range(8000, 8100)}), **spread)
    baseline = result("b", hist2d_x_H=histogram({i: 1 for i in range(8050, 8150)}), **spread)
    verdict = judge(candidate, baseline, gates)
    assert verdict.status == "FAIL" and verdict.evidence is None
    js2d = verdict.comparisons[1024].js2d
    assert js2d.value > 0.3 and js2d.floor > 0.3 and js2d.interval is None


def test_one_length_that_fails_is_enough(gates):
    candidate = result("c")
    candidate.content["packs"][0]["seq"]["2048"]["model"]["ppl"] = 9.0
    verdict = judge(candidate, result("b"), gates)
    assert verdict.status == "FAIL"
    failed = [(c.gate, c.seq_len, c.value, c.limit) for c in verdict.checks if c.status == "FAIL"]
    assert failed == [("dPPL", 2048, 1.0, 0.25)]
    assert (verdict.status_at(1024), verdict.status_at(2048)) == ("PASS", "FAIL")


@pytest.mark.parametrize(
    "candidate, baseline, missing",
    [((1024,), SEQ_LENS, (2048,)), (SEQ_LENS, (2048,), (1024,)), ((512,), SEQ_LENS, SEQ_LENS)],
)
def test_a_missing_primary_length_is_never_a_pass(gates, candidate, baseline, missing):
    verdict = judge(result("c", candidate), result("b", baseline), gates)
    assert verdict.status == "INCOMPLETE" and verdict.missing == missing and verdict.evidence is None


def test_a_missing_primary_pack_is_never_a_pass(gates):
    assert judge(result("c", pack="other"), result("b"), gates).status == "INCOMPLETE"


def test_a_failure_is_a_failure_although_a_length_is_missing(gates):
    verdict = judge(result("c", (1024,), ppl=20.0), result("b"), gates)
    assert verdict.status == "FAIL" and verdict.missing == (2048,)


@pytest.mark.parametrize("seq_len", SEQ_LENS)
def test_a_length_without_checks_has_not_passed(gates, seq_len):
    verdict = judge(result("c", (512,)), result("b"), gates)
    assert verdict.status_at(seq_len) != "PASS"


def test_gates_without_a_primary_length_never_pass():
    assert judge(result("c"), result("b"), Gates("x", "UNION", (), read_gates(FILE).limits)).status != "PASS"


earlier_and_judged_rows = pytest.mark.parametrize(
    "earlier_rows, rows, saw",
    [
        ("calib", "eval", False),
        ("eval", "calib", False),
        ("calib", "calib", True),
        ("eval", "eval", True),
        ("all", "eval", True),
        ("calib", "all", True),
        ("all", "all", True),
    ],
)


@earlier_and_judged_rows
def test_a_candidate_judged_on_rows_that_chose_its_experts_is_marked(gates, earlier_rows, rows, saw):
    candidate = result("c", meta={"rows": rows, "keep_set": {"ranking_rows": earlier_rows}})
    assert saw_its_rows(candidate) == saw
    assert any("chosen on rows" in w for w in judge(candidate, result("b"), gates).warnings) == saw


@earlier_and_judged_rows
def test_a_candidate_judged_on_rows_that_it_was_trained_on_is_marked(gates, earlier_rows, rows, saw):
    """Whatever its ranking saw."""
    recovered = {"parameters_share": 0.1, "tokens": 9, "text": {"rows": earlier_rows}}
    for ranking_rows in ("calib", "eval"):
        meta = {"rows": rows, "keep_set": {"ranking_rows": ranking_rows}, "recovered": recovered}
        warnings = judge(result("c", meta=meta), result("b"), gates).warnings
        assert ("it may have been trained on rows that it is judged on" in warnings) == saw


def test_a_whole_model_saw_no_rows():
    whole = result("b", meta={"rows": "all", "keep_set": None, "recovered": None})
    assert not saw_its_rows(whole) and not trained_on_its_rows(whole)


def rewritten(tmp_path, change):
    content = json.loads(FILE.read_text())
    change(content)
    path = tmp_path / "gates.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda c: c.update(schema="x"), "'x'"),
        (lambda c: c["limits"].pop("js2d"), "js2d"),
        (lambda c: c["limits"].update(new=1), "new"),
        (lambda c: c["limits"].update(js2d=float("nan")), "NaN"),
        (lambda c: c["limits"].update(js2d="0.02"), r"limits\.js2d: .*found '0\.02'"),
        (lambda c: c["limits"].update(js2d=True), r"limits\.js2d"),
        (lambda c: c["limits"].update(cc_rate=-0.1), r"limits\.cc_rate: .*found -0\.1"),
        (lambda c: c.update(limits=[1, 2]), "limits"),
        (lambda c: c.update(name=["a"]), "name"),
        (lambda c: c.update(primary_pack={"a": 1}), "primary_pack"),
        (
            lambda c: c.update(primary_seq_lens=[1024, 1024]),
            r"primary_seq_lens: found \[1024, 1024\], expected each once",
        ),
        (lambda c: c.update(primary_seq_lens=["1024"]), r"primary_seq_lens\.0"),
        (lambda c: c.update(primary_seq_lens=1024), "primary_seq_lens"),
        (lambda c: c.update(primary_seq_lens=[[1024]]), r"primary_seq_lens\.0"),
        (lambda c: c.pop("limits"), "limits"),
        (lambda c: c.pop("primary_pack"), "primary_pack"),
        (lambda c: c.update(primary_seq_lens=[]), "primary_seq_lens"),
    ],
)
def test_a_file_that_is_no_gates_file_is_refused(tmp_path, change, word):
    with pytest.raises(ParameterError, match=word):
        read_gates(rewritten(tmp_path, change))


def test_a_missing_or_damaged_gates_file_is_named(tmp_path):
    with pytest.raises(ParameterError, match=r"none\.json"):
        read_gates(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"schema"')
    with pytest.raises(ParameterError, match=r"cut\.json"):
        read_gates(tmp_path / "cut.json")
