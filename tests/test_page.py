"""The written page in a browser: what it shows against numbers worked out here from the results, and how it behaves.

Chromium drives it from disk. Every page that a test opens must run without a console error and fetch nothing.
"""

import csv
import io
import json
import re
import shutil

import numpy as np
import pytest
import world
from test_report import GATES, candidate, recovered, shifted
from test_results import edit, make_legacy, random_tokens, write

from eaftlib.evaluation import results
from eaftlib.report import folder as report_folder
from eaftlib.report import model
from eaftlib.report.saliency import read_saliencies

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not there; `make browser` installs it where it can"
)

HOSTILE = "<script>alert(1)</script>"
FORMULA = '=1+1|"x"'
KEYS = [("UNION", 64), ("UNION", 128), ("a", 64)]
GATES_IN_ORDER = ["dPPL", "dCC", "d mean p", "JS2D"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Results of which some lack a length, are of the earlier shape, or have names that are markup."""
    out = tmp_path_factory.mktemp("scored")
    tokens = {key: random_tokens(seed=i) for i, key in enumerate(KEYS)}
    write(out, "base", tokens, {"num_experts": 32, "bytes_total": 4200})
    write(out, "near-24", shifted(tokens, 1.001), candidate("reap_mass", 24))
    write(out, "far-16", shifted(tokens, 2.0), candidate("reap_mass", 16))
    write(out, "recovered-16", shifted(tokens, 1.1), recovered(16))
    hostile = write(out, "hostile", shifted(tokens, 1.3), candidate(HOSTILE, 20))
    write(out, "short", {KEYS[0]: shifted(tokens, 1.001)[KEYS[0]]}, candidate("ean", 20))
    formula = write(out, "formula", shifted(tokens, 1.4), candidate("ean", 16))
    for path, label in ((hostile, HOSTILE), (formula, FORMULA)):  # as earlier files may have them
        make_legacy(path)
        edit(path, lambda content, label=label: content["meta"].update(label=label))
    for label, rows in (("elsewhere", "r1"), ("nowhere", "r2")):  # on a pack that the baseline was not scored on
        write(out, label, {("b", 64): random_tokens(seed=9)}, candidate("ean", 12), rows_sha256=rows)
    old = json.loads((out / "far-16.json").read_text())
    del old["schema"]
    old["meta"] = {"model_id": "old", "num_blocks": 8}
    for pack in old["packs"]:
        for entry in pack["seq"].values():
            del entry["rows_sha256"], entry["model"]["blocks"], entry["model"]["quadrants"]
    (out / "old.json").write_text(json.dumps(old))
    return out


@pytest.fixture(scope="module")
def read(scored):
    return {result.label: result for result in results.read_all([str(scored)])}


@pytest.fixture(scope="module")
def ranking(tmp_path_factory):
    """Two layers of four experts: one criterion of which the best stay, and one with keep-sets of its own."""
    scores = [[4.0, 3.0, 2.0, 1.0], [1.0, 5.0, 2.0, 2.5]]
    order = [[0, 1, 2, 3], [1, 3, 2, 0]]
    recon = {
        "scores": scores,
        "ranking": order,
        "keep_sets": {"3": [[0, 2, 3], [0, 1, 3]]},
        "losses": {"3": [0.1, 0.2]},
    }
    criteria = {"reap_mass": {"scores": scores, "ranking": order}, "recon": recon}
    path = tmp_path_factory.mktemp("rank") / "ranking.json"
    path.write_text(json.dumps(world.hand_made_ranking(criteria, num_layers=2, num_experts=4, top_k=3)))
    return path


@pytest.fixture(scope="module")
def report(read, ranking):
    return model.build(list(read.values()), "base", GATES, read_saliencies([ranking]))


@pytest.fixture(scope="module")
def out(report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report_folder.write(report, folder)
    return folder


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


class Visitor:
    """Opens the report, and writes down whatever goes wrong on a page or leaves it."""

    def __init__(self, browser, out):
        self.browser, self.address, self.troubles = browser, f"file://{out / 'report.html'}", []

    def __call__(self, fragment="", width=1400, scheme="light"):
        page = self.browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda m: self.troubles.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.troubles.append(str(error)))
        page.on("dialog", lambda dialog: (self.troubles.append(dialog.message), dialog.dismiss()))
        page.on("request", self._leaves)
        page.goto(self.address + fragment)
        page.wait_for_selector("html[data-pair]", state="attached")
        return page

    def _leaves(self, request):
        if not request.url.startswith(("file:", "blob:", "data:")):
            self.troubles.append(request.url)


@pytest.fixture
def visit(browser, out):
    """visit(fragment, width, color_scheme) opens the report; in the end nothing may have gone wrong on any page."""
    visitor = Visitor(browser, out)
    yield visitor
    assert visitor.troubles == []


@pytest.fixture(scope="module")
def view(browser, out):
    """view(fragment): one page for all charts, since unpacking plotly takes seconds; from view to view as a reader goes."""
    visitor = Visitor(browser, out)
    page = visitor()

    def changed(fragment):
        page.evaluate("fragment => { window.location.hash = fragment; }", fragment)
        choose(page)
        return page

    yield changed
    assert visitor.troubles == []


# What a chart was drawn from; what cards say; of every bar its words, its mark, its limits.
_CHART = """name => {
  const plot = document.querySelector(`[data-chart=${name}] .plot`);
  return JSON.parse(JSON.stringify({ data: plot.data, layout: plot.layout }));
}"""
_CARDS = """all => all.map(card => [
  card.dataset.card, card.querySelector('dd').firstChild.data, card.querySelector('small').textContent,
])"""
_BARS = """all => all.map(bar => [
  bar.getAttribute('aria-label'),
  parseFloat(bar.querySelector('.point').getAttribute('x')),
  ...[...bar.querySelectorAll('.limit, .zero')].map(line => parseFloat(line.getAttribute('x1'))),
])"""
_CHOICE = ("left", "right", "pack", "seq")


def choose(page, **values):
    """Set controls, and wait until the page shows that pair."""
    for name, value in values.items():
        page.select_option(f"#{name}", str(value))
    for _ in range(200):  # the page's policy forbids the eval that playwright's own waiting is made of
        wanted = [page.input_value(f"#{name}") for name in _CHOICE]
        state = json.loads(page.get_attribute("html", "data-state"))
        if json.loads(page.get_attribute("html", "data-pair")) == wanted == [state[name] for name in _CHOICE]:
            return
        page.wait_for_timeout(25)
    raise AssertionError(f"the page does not show {wanted}")


def cards(page):
    """Name -> (number as shown, note)."""
    return {name: (text, note) for name, text, note in page.eval_on_selector_all(".card", _CARDS)}


def chart_names(page):
    return page.eval_on_selector_all("[data-chart]", "all => all.map(chart => chart.dataset.chart)")


def charted(page, name):
    """Traces and layout that a chart was drawn from, once it shows what is chosen."""
    page.locator(f"[data-chart={name}]").scroll_into_view_if_needed()
    for _ in range(400):
        if page.get_attribute(f"[data-chart={name}]", "data-drawn") == page.get_attribute("html", "data-state"):
            return page.evaluate(_CHART, name)
        page.wait_for_timeout(25)
    raise AssertionError(f"{name} was not drawn")


def divergence(a, b):
    """Jensen-Shannon, as the entropy of the mixture minus the mean entropy."""
    p, q = (np.asarray(x, float) / np.sum(x) for x in (a, b))

    def entropy(x):
        return -np.sum(x[x > 0] * np.log(x[x > 0]))

    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def entry(read, label, pack="UNION", seq_len=64):
    return read[label].entries[pack, seq_len]["model"]


def conflict_share(read, label, thresholds_of, key):
    tokens, thresholds = read[label].tokens(*key), entry(read, thresholds_of, *key)
    pairs = zip(np.exp(-tokens.nll.astype(float)), tokens.entropy.astype(float), strict=True)
    return np.mean([p <= thresholds["p_thr"] and h <= thresholds["h_thr"] for p, h in pairs])


def test_the_page_answers_in_order(visit, report):
    page = visit()
    assert page.locator("h2").all_inner_texts() == [
        "Does it pass?", "What did it cost, and where?", "Can I trust the number?", "What next?",
    ]  # fmt: skip
    assert page.inner_text(".headline").endswith(report.headline) and page.inner_text(".hero h3") == report.best.label
    steps = page.locator("#next li").all_inner_texts()
    assert steps == list(report.next_steps) and len(steps) > 1


def test_every_gate_is_a_bar_with_its_value_on_the_right_side_of_its_limit(visit, out):
    page = visit()
    verdict = json.loads((out / "verdict.json").read_text())["models"]
    for item in page.locator(".candidate").all():
        label = item.locator("h4").text_content()
        drawn = item.locator(".bar").evaluate_all(_BARS)
        checks = sorted(verdict[label]["checks"], key=lambda check: GATES_IN_ORDER.index(check["gate"]))
        assert len(drawn) == len(checks) == 4 * (2 - len(verdict[label]["missing"]))
        for check, (text, point, zero, low, high) in zip(checks, drawn, strict=True):
            assert text.startswith(f"{check['gate']} at {check['seq_len']} tokens: ") and check["status"] in text
            assert float(re.search(r": ([+-]?[\d.]+),", text)[1]) == pytest.approx(check["value"], abs=6e-4)
            assert (low <= point <= high) == (check["status"] == "PASS")
            assert (point < zero) == (check["value"] < 0)
            assert check["evidence"] is None or check["evidence"] in text
        badges = item.locator(".badge").all_inner_texts()
        assert badges[0].endswith(verdict[label]["verdict"]) and badges[1].endswith(
            verdict[label]["evidence"] or "not for every gate"
        )


def test_the_best_method_comes_first_and_within_one_most_experts(visit, report):
    page = visit()
    assert page.locator(".method").first.inner_text() == report.best.method == "reap_mass"
    assert page.locator(".candidates").first.locator("h4").all_inner_texts() == ["near-24", "far-16"]


def test_two_candidates_are_compared_by_numbers_from_their_files(visit, read):
    page = visit()
    choose(page, left="near-24", right="far-16", pack="a", seq=64)
    shown, key = cards(page), ("a", 64)
    left, right = (entry(read, label, *key) for label in ("near-24", "far-16"))
    conflicts = [conflict_share(read, label, "base", key) for label in ("near-24", "far-16")]
    expected = {
        "PPL left": left["ppl"],
        "PPL right": right["ppl"],
        "dPPL": right["ppl"] - left["ppl"],
        "dCC, own": conflict_share(read, "far-16", "far-16", key) - conflict_share(read, "near-24", "near-24", key),
        "dCC, baseline's": conflicts[1] - conflicts[0],
        "d mean p": right["mean_prob"] - left["mean_prob"],
        "JS2D": divergence(left["hist2d_x_H"]["counts"], right["hist2d_x_H"]["counts"]),
    }
    assert expected["JS2D"] > 0.01 and expected["dCC, baseline's"] != 0
    for name, value in expected.items():
        digits = len(shown[name][0].partition(".")[2])
        assert float(shown[name][0]) == pytest.approx(value, abs=0.51 * 10**-digits), name
    for name in ("KL", "top-1"):
        assert shown[name] == ("–", "measured against the baseline only")
    for name in ("tokens/s left", "tokens/s right"):
        assert shown[name] == ("–", "not recorded")


def test_against_the_baseline_intervals_are_those_of_the_table(visit, out):
    page = visit("#left=base&right=far-16&pack=UNION&seq=128")
    with (out / "results.csv").open() as file:
        row = next(
            r for r in csv.DictReader(file) if (r["model"], r["pack"], r["seq_len"]) == ("far-16", "UNION", "128")
        )
    shown = cards(page)
    for card, name in (("dPPL", "dppl"), ("d mean p", "dmean_prob"), ("dCC, baseline's", "dcc")):
        low, high = map(float, re.findall(r"[+-]\d+\.\d+", shown[card][1]))
        assert (low, high) == pytest.approx(
            (float(row[f"{name}_low"]), float(row[f"{name}_high"])), abs=6e-4
        ) and low < high
    assert float(shown["JS2D"][0]) == pytest.approx(float(row["js2d"]), abs=6e-5)
    assert f"floor {float(row['js2d_floor']):.4f}" in shown["JS2D"][1]


def test_swapping_turns_every_sign(visit):
    page = visit("#left=base&right=far-16")
    before = cards(page)
    page.click("#swap")
    choose(page)
    after = cards(page)
    assert (page.input_value("#left"), page.input_value("#right")) == ("far-16", "base")
    assert after["PPL left"][0] == before["PPL right"][0] and after["JS2D"] == before["JS2D"]
    for name in ("dPPL", "dCC, own", "d mean p"):
        assert float(after[name][0]) == -float(before[name][0])
    low, high = re.findall(r"[+-]\d+\.\d+", before["dPPL"][1])
    assert [float(x) for x in re.findall(r"[+-]\d+\.\d+", after["dPPL"][1])] == [-float(high), -float(low)]


def test_a_view_is_linked_and_gone_back_to(visit, read):
    page = visit("#left=near-24&right=recovered-16&pack=a&seq=64&scale=plain")
    shown = [page.input_value(f"#{name}") for name in (*_CHOICE, "scale")]
    assert shown == ["near-24", "recovered-16", "a", "64", "plain"]
    assert float(cards(page)["PPL right"][0]) == pytest.approx(entry(read, "recovered-16", "a")["ppl"], abs=6e-4)
    choose(page, right="far-16")
    assert "right=far-16" in page.url and "pack=a" in page.url
    page.go_back()
    choose(page)
    assert page.input_value("#right") == "recovered-16"
    assert float(cards(page)["PPL right"][0]) == pytest.approx(entry(read, "recovered-16", "a")["ppl"], abs=6e-4)


def test_a_link_to_what_is_not_there_says_so(visit):
    page = visit("#right=gone&seq=64")
    assert page.inner_text("#notice") == "The link asks for what is not in this report: right: gone."
    assert page.input_value("#seq") == "64"


def test_a_place_in_the_page_is_no_view(visit):
    page = visit("#trust")
    assert page.input_value("#left") == "base"
    page.click("nav >> text=What next?")
    assert page.url.endswith("#next") and page.is_hidden("#notice")


def test_what_is_missing_is_a_gap(visit):
    page = visit("#left=base&right=short&pack=UNION&seq=128")
    shown = cards(page)
    assert shown["PPL right"] == ("–", "no result here") and shown["dPPL"] == ("–", "no result here") == shown["JS2D"]
    assert page.locator("#breakdown tbody tr").first.locator("td").all_inner_texts() == ["400", "–", "–"]
    item = page.locator(".candidate", has=page.locator("h4", has_text="short"))
    assert "INCOMPLETE" in item.inner_text() and "UNION is missing at 128 tokens" in item.inner_text()


def test_what_was_scored_on_different_rows_is_not_compared(visit, read):
    page = visit("#left=elsewhere&right=nowhere&pack=b&seq=64")
    shown = cards(page)
    assert float(shown["PPL left"][0]) == pytest.approx(entry(read, "elsewhere", "b")["ppl"], abs=6e-4)
    assert {shown[name] for name in ("dPPL", "d mean p", "JS2D", "dCC, own")} == {("–", "scored on different rows")}
    assert page.locator("#packs tbody tr").all_inner_texts()[-1].endswith("scored on different rows")
    item = page.locator(".candidate", has=page.locator("h4", has_text="elsewhere"))
    assert "INCOMPLETE" in item.inner_text() and "nothing that the baseline was scored on" in item.inner_text()


def test_an_earlier_file_is_shown_as_binned_without_what_it_lacks(visit):
    page = visit("#left=base&right=old&seq=64")
    assert page.locator("#board tbody tr", has_text="old (binned)").count() == 3
    assert cards(page)["dPPL"][1] == "" and "(binned)" in cards(page)["dCC, baseline's"][1]
    rows = {
        cells[0]: cells[1:] for cells in (r.split("\t") for r in page.locator("#breakdown tbody tr").all_inner_texts())
    }
    assert rows["p low, H low (conflicts)"][1:] == ["–", "–"]
    assert "not for every gate" in page.locator(".candidate", has=page.locator("h4", has_text="old")).inner_text()


def test_columns_sort_by_pointer_and_by_key_and_keep_the_focus(visit, out):
    page = visit()
    with (out / "results.csv").open() as file:
        ppl = sorted(float(r["ppl"]) for r in csv.DictReader(file))
    place = page.locator("#board thead th").all_inner_texts().index("PPL")

    def column():
        page.wait_for_selector("th[aria-sort=ascending] [data-sort=ppl], th[aria-sort=descending] [data-sort=ppl]")
        return [float(r.split("\t")[place]) for r in page.locator("#board tbody tr").all_inner_texts()]

    page.click("[data-sort=ppl]")
    assert column() == pytest.approx(ppl, abs=6e-4)
    page.keyboard.press("Enter")  # the focus is still there
    page.wait_for_selector("th[aria-sort=descending] [data-sort=ppl]:focus")
    assert column() == pytest.approx(ppl[::-1], abs=6e-4)
    assert page.locator("[aria-sort=ascending]").count() == 0


def test_rows_without_a_value_come_last_either_way(visit):
    page = visit("#sort=dppl&order=descending&board=UNION")
    assert page.locator("#board tbody th").last.inner_text() == "base"
    assert set(page.locator("#board tbody tr td:nth-child(5)").all_inner_texts()) == {"UNION"}


def test_the_csv_has_what_the_table_has_in_full(visit, out, read):
    page = visit("#sort=ppl")
    with page.expect_download() as download:
        page.click("#download")
    text = download.value.path().read_text()
    found = list(csv.DictReader(io.StringIO(text)))
    shown = page.locator("#board tbody th").all_inner_texts()
    assert [row["model"].removeprefix("'") for row in found] == [label.removesuffix(" (binned)") for label in shown]
    assert "'" + FORMULA in {row["model"] for row in found} and HOSTILE in {row["model"] for row in found}
    for row in found:
        exact = entry(read, row["model"].removeprefix("'"), row["pack"], int(row["seq_len"]))
        assert float(row["ppl"]) == exact["ppl"] and int(row["kept_tokens"]) == exact["kept_tokens"]
    assert {row["dppl"] for row in found if row["model"] == "base"} == {""}
    assert any(row["dmean_prob"].startswith("-") for row in found)  # a number that begins with a sign stays one


def test_a_model_named_like_a_script_runs_none(visit):
    page = visit("#" + "&".join(["left=base", "right=%3Cscript%3Ealert(1)%3C/script%3E"]))
    assert page.input_value("#right") == HOSTILE
    assert page.locator("h4", has_text=HOSTILE).count() == 1 and page.locator(".method", has_text=HOSTILE).count() == 1
    charted(page, "distributions")
    assert f"right: {HOSTILE}" in page.locator("[data-chart=distributions] .legend text").all_text_contents()
    assert page.evaluate("[...document.scripts].filter(s => s.textContent.trim() === 'alert(1)').length") == 0


def histogram(read, label, pack="UNION", seq_len=64):
    """Counts by H, then p."""
    return np.array(entry(read, label, pack, seq_len)["hist2d_x_H"]["counts"]).reshape(160, 120).T


@pytest.mark.parametrize("scale", ["log", "plain"])
def test_a_landscape_holds_every_token_at_its_place(view, read, scale):
    chart = charted(view(f"#left=base&right=far-16&scale={scale}"), "landscapes")
    counts = [histogram(read, label) for label in ("base", "far-16")]
    for trace, found in zip(chart["data"], counts, strict=False):
        np.testing.assert_array_equal(np.array(trace["customdata"]), found)
        drawn = np.array(trace["z"], float)
        np.testing.assert_array_equal(np.isnan(drawn), found == 0)  # no token is no colour
        expected = np.log10(found[found > 0]) if scale == "log" else found[found > 0]
        np.testing.assert_allclose(drawn[found > 0], expected)
    change = counts[1] / counts[1].sum() - counts[0] / counts[0].sum()
    shown, seen = np.array(chart["data"][2]["customdata"], float), sum(counts) > 0
    np.testing.assert_allclose(shown[seen], 100 * change[seen], atol=1e-12)
    assert np.isnan(shown[~seen]).all()
    reach = np.nanmax(np.abs(np.array(chart["data"][2]["z"], float)))
    assert chart["layout"]["coloraxis2"]["cmax"] == pytest.approx(reach) == -chart["layout"]["coloraxis2"]["cmin"]


def test_a_landscape_has_each_models_thresholds_and_quadrants(view, read):
    layout = charted(view("#left=base&right=far-16"), "landscapes")["layout"]
    models = [entry(read, label) for label in ("base", "far-16")]
    for (p_line, h_line), found in zip(
        zip(layout["shapes"][::2], layout["shapes"][1::2], strict=True), models * 2, strict=True
    ):
        assert {p_line["x0"], p_line["x1"]} == {found["p_thr"]} and {h_line["y0"], h_line["y1"]} == {found["h_thr"]}
    assert [note["text"] for note in layout["annotations"][:3]] == ["base", "far-16", "right minus left"]
    labels = [float(note["text"].rstrip(" %")) for note in layout["annotations"][3:]]
    assert labels == pytest.approx(
        [100 * found["quadrants"][q] for found in models for q in ("LL", "LH", "HL", "HH")], abs=6e-3
    )


def test_a_landscape_of_what_is_missing_is_empty(view):
    chart = charted(view("#left=base&right=short&seq=128"), "landscapes")
    for trace in chart["data"][1:]:
        assert np.isnan(np.array(trace["z"], float)).all()
    assert [n["text"] for n in chart["layout"]["annotations"][:3]] == [
        "base",
        "short: no result here",
        "no result here",
    ]


def test_histograms_of_both_lie_over_each_other(view, read):
    traces = charted(view("#left=base&right=far-16"), "distributions")["data"]
    places = [(hist, label) for hist in ("hist1d_x", "hist1d_H") for label in ("base", "far-16")]
    for trace, (hist, label) in zip(traces, places, strict=True):
        counts = np.array(entry(read, label)[hist]["counts"])
        assert label in trace["name"] and trace["customdata"] == counts.tolist()
        np.testing.assert_allclose(np.nan_to_num(np.array(trace["y"], float)), counts / counts.sum(), atol=1e-12)


def test_a_ranking_marks_the_experts_that_stay(view, ranking):
    chart = charted(view("#criterion=1&keep=3"), "saliency")
    content = json.loads(ranking.read_text())["criteria"]["recon"]
    marked = {(x, y) for x, y in zip(chart["data"][1]["x"], chart["data"][1]["y"], strict=True)}
    assert marked == {(expert, layer) for layer, kept in enumerate(content["keep_sets"]["3"]) for expert in kept}
    scores = np.array(content["scores"])
    np.testing.assert_allclose(10 ** np.array(chart["data"][0]["z"]), scores / scores.sum(1, keepdims=True), rtol=1e-4)


def test_every_chart_is_drawn(view):
    page = view("#left=base")
    for name in chart_names(page):
        assert charted(page, name)["data"], name


@pytest.mark.parametrize("width", [1400, 400])
def test_nothing_serious_bars_anyone(view, width):
    """axe-core, in both colour schemes with all charts drawn; and neither text nor table leaves the screen sideways."""
    from axe_playwright_python.sync_playwright import Axe

    page = view("#left=base&right=old")
    page.set_viewport_size({"width": width, "height": 900})
    for name in chart_names(page):
        charted(page, name)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_selector(f"#theme:has-text('{'Dark' if scheme == 'light' else 'Light'}')")
        found = Axe().run(page).response["violations"]
        serious = [v for v in found if v["impact"] in ("serious", "critical")]
        assert not serious, [(v["id"], [n["html"][:200] for n in v["nodes"][:3]]) for v in serious]


def test_the_theme_can_be_chosen(visit):
    page = visit(scheme="light")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    page.wait_for_selector("html[data-theme=dark]")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light and "theme=dark" in page.url


def test_every_control_is_reached_by_the_tab_key(visit):
    page = visit()
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.dataset.sort"))
        if "download" in reached:
            break
    assert {"theme", "left", "swap", "right", "pack", "seq", "scale", "board-pack", "download"} <= reached


def test_a_policy_in_the_page_forbids_the_network(browser, out):
    """Not only that it asks for nothing: it cannot."""
    page = browser.new_page()
    page.goto(f"file://{out / 'report.html'}")
    refused = []
    page.on("console", lambda message: refused.append(message.text))
    assert page.evaluate("fetch('http://127.0.0.1:9/x').then(() => 'fetched', () => 'refused')") == "refused"
    assert any("Content Security Policy" in text for text in refused)
    page.close()
