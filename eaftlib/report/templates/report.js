"use strict";
(() => {
  const data = JSON.parse(byId("data").textContent);
  const figures = JSON.parse(byId("figures").textContent);
  const rows = new Map(data.rows.map((row) => [rowKey(row.model, row.pack, row.seq_len), row]));
  const packNames = distinct(data.rows.map((row) => row.pack), data.gates.primary_pack);
  const seqLens = [...new Set(data.rows.map((row) => row.seq_len))].sort((a, b) => a - b);
  const models = new Map(data.models.map((model) => [model.label, model]));
  const DASH = "–";

  // ---------------------------------------------------------------- small helpers

  function byId(id) {
    return document.getElementById(id);
  }

  function rowKey(model, pack, seqLen) {
    return JSON.stringify([model, pack, Number(seqLen)]);
  }

  /** Values once each, `first` before the others. */
  function distinct(values, first) {
    return [...new Set(values)].sort((a, b) => (b === first) - (a === first) || (a < b ? -1 : 1));
  }

  /** Children are nodes or text, never markup: labels are anybody's. */
  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined) made.setAttribute(name, value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  function isNumber(value) {
    return typeof value === "number" && Number.isFinite(value);
  }

  function fixed(value, digits) {
    return isNumber(value) ? value.toFixed(digits) : DASH;
  }

  function signed(value, digits) {
    return isNumber(value) ? (value < 0 ? "" : "+") + value.toFixed(digits) : DASH;
  }

  function percent(value, digits = 1) {
    return isNumber(value) ? (100 * value).toFixed(digits) + " %" : DASH;
  }

  function whole(value) {
    return isNumber(value) ? Math.round(value).toLocaleString("en") : DASH;
  }

  function difference(a, b) {
    return isNumber(a) && isNumber(b) ? b - a : null;
  }

  // ---------------------------------------------------------------- the view's state, kept in the fragment

  const first = data.models.find((model) => model.label !== data.baseline);
  const defaults = {
    left: data.baseline,
    right: data.shown ?? first?.label ?? data.baseline,
    pack: packNames[0],
    seq: String(data.gates.primary_seq_lens.find((length) => seqLens.includes(length)) ?? seqLens[0]),
    scale: "log",
    board: "",
    sort: "dppl",
    order: "ascending",
    criterion: "0",
    keep: String(models.get(data.shown)?.keep_n ?? 1),
    theme: "",
  };
  const allowed = {
    left: data.models.map((model) => model.label),
    right: data.models.map((model) => model.label),
    pack: packNames,
    seq: seqLens.map(String),
    scale: ["log", "plain"],
    board: ["", ...packNames],
    sort: null, // filled where the columns are
    order: ["ascending", "descending"],
    criterion: data.saliencies.map((_, index) => String(index)),
    keep: Array.from({ length: data.saliencies[0]?.ranking[0].length ?? 0 }, (_, index) => String(index + 1)),
    theme: ["", "light", "dark"],
  };
  let state = { ...defaults };

  /** The state that a fragment describes, and what in it this report does not have. */
  function fromFragment(fragment) {
    const found = { ...defaults };
    const unknown = [];
    for (const [name, value] of new URLSearchParams(fragment.replace(/^#/, ""))) {
      if (!Object.hasOwn(allowed, name)) continue;
      if (allowed[name].includes(value)) found[name] = value;
      else unknown.push(`${name}: ${value}`);
    }
    return [found, unknown];
  }

  function toFragment(wanted) {
    const changed = Object.entries(wanted).filter(([name, value]) => value !== defaults[name]);
    const shown = changed.length ? changed : [["left", wanted.left]];
    return "#" + new URLSearchParams(shown);
  }

  /** Every change goes through the fragment, so that each view can be linked and gone back to. */
  function change(patch) {
    window.location.hash = toFragment({ ...state, ...patch });
  }

  function readFragment() {
    const fragment = window.location.hash;
    if (fragment && !fragment.includes("=")) return; // a place in the page, not a view
    const [found, unknown] = fromFragment(fragment);
    const notice = byId("notice");
    notice.hidden = unknown.length === 0;
    notice.textContent = unknown.length ? `The link asks for what is not in this report: ${unknown.join(", ")}.` : "";
    state = found;
    render();
  }

  // ---------------------------------------------------------------- histograms

  async function inflate(base64) {
    const text = atob(base64);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  /** Varints: seven bits a byte, low ones first, the eighth set where more follow. */
  function varints(bytes) {
    const values = [];
    let value = 0;
    let unit = 1;
    for (const byte of bytes) {
      value += (byte & 127) * unit;
      unit *= 128;
      if (byte < 128) {
        values.push(value);
        value = 0;
        unit = 1;
      }
    }
    return values;
  }

  const unpacked = new Map();

  /** Counts by cell, row-major over (p, H). */
  function countsOf(row) {
    if (!unpacked.has(row)) unpacked.set(row, unpack(row));
    return unpacked.get(row);
  }

  async function unpack(row) {
    const counts = new Float64Array(row.bins[0] * row.bins[1]);
    const pairs = varints(await inflate(row.hist));
    let cell = -1;
    for (let i = 0; i < pairs.length; i += 2) {
      cell += pairs[i];
      counts[cell] = pairs[i + 1];
    }
    return counts;
  }

  function sum(values) {
    return values.reduce((total, value) => total + value, 0);
  }

  /** Jensen-Shannon divergence, natural logarithm, of two histograms of the same cells. */
  function jsDivergence(a, b) {
    const [totalA, totalB] = [sum(a), sum(b)];
    let found = 0;
    for (let i = 0; i < a.length; i++) {
      const [p, q] = [a[i] / totalA, b[i] / totalB];
      const middle = (p + q) / 2;
      if (p > 0) found += (p * Math.log(p / middle)) / 2;
      if (q > 0) found += (q * Math.log(q / middle)) / 2;
    }
    return Math.max(0, found);
  }

  /** Counts by p (axis 0) or by H (axis 1). */
  function marginal(counts, [xbins, ybins], axis) {
    const found = new Array(axis === 0 ? xbins : ybins).fill(0);
    counts.forEach((count, cell) => (found[axis === 0 ? Math.floor(cell / ybins) : cell % ybins] += count));
    return found;
  }

  // ---------------------------------------------------------------- two rows compared

  /** Why two rows give no difference, or nothing if they do. */
  function whyNot(left, right) {
    if (!left || !right) return "no result here";
    if (left.input && right.input && left.input !== right.input) return "scored on different rows";
    if (left.tokens !== right.tokens) return "scored on different tokens";
    if (String(left.bins) !== String(right.bins)) return "histograms of different bins";
    return "";
  }

  /** The row that is compared with the baseline, and the sign of left to right; null where neither is the baseline. */
  function againstBaseline(left, right) {
    if (left.model === data.baseline && right.comparison) return [right, 1];
    if (right.model === data.baseline && left.comparison) return [left, -1];
    return null;
  }

  function interval(left, right, name) {
    const found = againstBaseline(left, right);
    const ends = found?.[0].comparison[name].interval;
    if (!ends) return null;
    return found[1] > 0 ? ends : [-ends[1], -ends[0]];
  }

  /** Conflicts under the baseline's thresholds, above the baseline's own. */
  function conflictsAboveBaseline(row) {
    if (row.model === data.baseline) return 0;
    return row.comparison ? row.comparison.cc.value : null;
  }

  async function divergence(left, right) {
    if (left === right) return 0;
    const found = againstBaseline(left, right);
    return found ? found[0].comparison.js2d.value : jsDivergence(await countsOf(left), await countsOf(right));
  }

  function intervalText(ends, digits) {
    return ends ? `90 %: ${signed(ends[0], digits)} to ${signed(ends[1], digits)}` : "";
  }

  /** [name, text, note] of each card. Right minus left. */
  async function cardsOf(left, right) {
    const pair = left && right;
    const why = whyNot(left, right);
    const minus = (value, digits, note) => (why ? [DASH, why] : [signed(value, digits), note]);
    const ownNote = "each at its own thresholds";
    const only = pair && againstBaseline(left, right);
    return [
      ["PPL left", fixed(left?.ppl, 3), left ? `${whole(left.tokens)} tokens` : "no result here"],
      ["PPL right", fixed(right?.ppl, 3), right ? `${whole(right.tokens)} tokens` : "no result here"],
      ["dPPL", ...minus(pair && right.ppl - left.ppl, 3, pair && intervalText(interval(left, right, "ppl"), 3))],
      ["dCC, own", ...minus(pair && right.cc_rate - left.cc_rate, 5, ownNote)],
      ["dCC, baseline's", ...(why ? [DASH, why] : baselineConflicts(left, right))],
      ["d mean p", ...minus(pair && right.mean_prob - left.mean_prob, 4, pair && intervalText(interval(left, right, "mean_prob"), 4))],
      ["JS2D", ...(why ? [DASH, why] : [fixed(await divergence(left, right), 4), divergenceNote(left, right)])],
      ["KL", ...(why ? [DASH, why] : scoredTogether(only, "kl", (value) => fixed(value, 4)))],
      ["top-1", ...(why ? [DASH, why] : scoredTogether(only, "top1", (value) => percent(value)))],
      ["tokens/s left", whole(left?.tok_s), left && !isNumber(left.tok_s) ? "not recorded" : ""],
      ["tokens/s right", whole(right?.tok_s), right && !isNumber(right.tok_s) ? "not recorded" : ""],
    ];
  }

  function baselineConflicts(left, right) {
    const value = difference(conflictsAboveBaseline(left), conflictsAboveBaseline(right));
    if (value === null) return [DASH, "the baseline was not scored here"];
    const ends = intervalText(interval(left, right, "cc"), 5);
    return [signed(value, 5), [ends, left.binned || right.binned ? "(binned)" : ""].filter(Boolean).join(" ")];
  }

  function divergenceNote(left, right) {
    const js2d = againstBaseline(left, right)?.[0].comparison.js2d;
    if (!js2d) return "of the two histograms";
    const parts = [];
    if (isNumber(js2d.estimate)) parts.push(`unbiased ${fixed(js2d.estimate, 4)}`);
    if (js2d.interval) parts.push(`90 %: ${fixed(js2d.interval[0], 4)} to ${fixed(js2d.interval[1], 4)}`);
    if (isNumber(js2d.floor)) parts.push(`floor ${fixed(js2d.floor, 4)}`);
    return parts.join("; ");
  }

  function scoredTogether(only, name, format) {
    if (!only) return [DASH, "measured against the baseline only"];
    const value = only[0].comparison[name];
    return isNumber(value) ? [format(value), "from the baseline"] : [DASH, "not scored in one pass with the baseline"];
  }

  /** [name, of a row, format] of the breakdown. */
  const NUMBERS = [
    ["kept tokens", (row) => row.tokens, whole],
    ["PPL", (row) => row.ppl, (value) => fixed(value, 4)],
    ["mean nll", (row) => row.mean_nll, (value) => fixed(value, 4)],
    ["mean p", (row) => row.mean_prob, (value) => fixed(value, 4)],
    ["mean H", (row) => row.mean_entropy, (value) => fixed(value, 4)],
    ["p threshold", (row) => row.p_thr, (value) => fixed(value, 5)],
    ["H threshold", (row) => row.h_thr, (value) => value.toPrecision(4)],
    ["CC rate, own thresholds", (row) => row.cc_rate, (value) => fixed(value, 6)],
    ["CC rate, baseline's thresholds", (row) => row.cc_rate_at_base, (value) => fixed(value, 6)],
    ["p low, H low (conflicts)", (row) => row.quadrants?.LL, (value) => percent(value, 2)],
    ["p low, H high", (row) => row.quadrants?.LH, (value) => percent(value, 2)],
    ["p high, H low", (row) => row.quadrants?.HL, (value) => percent(value, 2)],
    ["p high, H high", (row) => row.quadrants?.HH, (value) => percent(value, 2)],
    ["tokens/s", (row) => row.tok_s, whole],
  ];

  function numberCells([name, take, format], left, right) {
    const values = [left, right].map((row) => (row ? take(row) : null));
    const shown = values.map((value) => (isNumber(value) ? format(value) : DASH));
    const change = difference(...values);
    const text = change === null || whyNot(left, right) ? DASH : (change < 0 ? "" : "+") + format(change);
    return [name, ...shown, text];
  }

  async function packCells(pack, seqLen, left, right) {
    const why = whyNot(left, right);
    const conflictChange = left && right ? difference(conflictsAboveBaseline(left), conflictsAboveBaseline(right)) : null;
    return [
      pack,
      whole(seqLen),
      fixed(left?.ppl, 3),
      fixed(right?.ppl, 3),
      why ? DASH : signed(right.ppl - left.ppl, 3),
      why ? DASH : signed(conflictChange, 5),
      why ? DASH : signed(right.mean_prob - left.mean_prob, 4),
      why ? DASH : fixed(await divergence(left, right), 4),
      why,
    ];
  }

  // ---------------------------------------------------------------- what is shown of the pair

  function chosen() {
    return [state.left, state.right].map((model) => rows.get(rowKey(model, state.pack, state.seq)));
  }

  async function renderPair() {
    const wanted = state;
    const [left, right] = chosen();
    const cards = await cardsOf(left, right);
    const lines = [];
    for (const pack of packNames) {
      for (const seqLen of seqLens) {
        const found = [wanted.left, wanted.right].map((model) => rows.get(rowKey(model, pack, seqLen)));
        if (found.some(Boolean)) lines.push(await packCells(pack, seqLen, ...found));
      }
    }
    if (wanted !== state) return; // another pair was chosen meanwhile
    byId("cards").replaceChildren(...cards.map(card));
    const heads = ["number", `left: ${state.left}`, `right: ${state.right}`, "right minus left"];
    fillTable(byId("breakdown"), heads, NUMBERS.map((number) => numberCells(number, left, right)));
    fillTable(byId("packs"), ["pack", "length", "PPL left", "PPL right", "dPPL", "dCC", "d mean p", "JS2D", "why not"], lines);
    performance.mark("ready");
    document.documentElement.dataset.pair = JSON.stringify([state.left, state.right, state.pack, state.seq]);
  }

  function card([name, text, note]) {
    return element("dl", { class: "card", "data-card": name }, element("dt", {}, name), element("dd", {}, text, element("small", {}, note || "")));
  }

  /** Cells of text; the first of each line names it. */
  function fillTable(table, heads, lines) {
    const head = element("tr", {}, ...heads.map((text, i) => element("th", { scope: "col", class: i ? "number" : null }, text)));
    const body = lines.map((cells) => element("tr", {}, ...cells.map((text, i) => (i ? element("td", { class: "number" }, text) : element("th", { scope: "row" }, text)))));
    table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...body));
  }

  // ---------------------------------------------------------------- all models on all packs

  const verdictShapes = { PASS: "✓ ", FAIL: "✗ ", INCOMPLETE: "◌ " };

  /** [key, head, of a row, format]; a format of null is text. */
  const COLUMNS = [
    ["model", "model", (row) => row.model, null],
    ["method", "method", (row) => models.get(row.model).method, null],
    ["keep_n", "kept", (row) => models.get(row.model).keep_n, whole],
    ["trained", "trained", (row) => models.get(row.model).trained, null],
    ["pack", "pack", (row) => row.pack, null],
    ["seq_len", "length", (row) => row.seq_len, whole],
    ["gate", "gate", (row) => row.gate, null],
    ["ppl", "PPL", (row) => row.ppl, (value) => fixed(value, 3)],
    ["dppl", "dPPL", (row) => row.comparison?.ppl.value, (value) => signed(value, 3)],
    ["dcc", "dCC", (row) => row.comparison?.cc.value, (value) => signed(value, 5)],
    ["dmean_prob", "d mean p", (row) => row.comparison?.mean_prob.value, (value) => signed(value, 4)],
    ["js2d", "JS2D", (row) => row.comparison?.js2d.value, (value) => fixed(value, 4)],
    ["kl_to_base", "KL", (row) => row.comparison?.kl, (value) => fixed(value, 4)],
    ["top1_agreement", "top-1", (row) => row.comparison?.top1, (value) => percent(value)],
    ["tok_s", "tokens/s", (row) => row.tok_s, whole],
    ["kept_tokens", "tokens", (row) => row.tokens, whole],
  ];
  allowed.sort = COLUMNS.map(([key]) => key);

  /** Rows of the chosen pack in the chosen order; those without the value come last either way. */
  function boardRows() {
    const take = COLUMNS.find(([key]) => key === state.sort)[2];
    const sign = state.order === "ascending" ? 1 : -1;
    const there = (row) => take(row) !== null && take(row) !== undefined && take(row) !== "";
    return data.rows
      .filter((row) => !state.board || row.pack === state.board)
      .sort((a, b) => {
        if (!there(a) || !there(b)) return there(b) - there(a);
        return sign * (take(a) < take(b) ? -1 : Number(take(a) > take(b)));
      });
  }

  let boardShown = "";

  function renderBoard() {
    const wanted = JSON.stringify([state.board, state.sort, state.order]);
    if (wanted === boardShown) return;
    boardShown = wanted;
    const focused = document.activeElement?.dataset.sort;
    const head = element("tr", {}, ...COLUMNS.map(boardHead));
    const body = boardRows().map((row) => element("tr", {}, ...COLUMNS.map((column) => boardCell(column, row))));
    byId("board").replaceChildren(element("thead", {}, head), element("tbody", {}, ...body));
    if (focused) document.querySelector(`[data-sort="${focused}"]`).focus();
  }

  function boardHead([key, text, , format]) {
    const sorted = key === state.sort;
    const button = element("button", { type: "button", "data-sort": key }, text, sorted ? (state.order === "ascending" ? " ▲" : " ▼") : "");
    return element("th", { scope: "col", class: format && "number", "aria-sort": sorted ? state.order : "none" }, button);
  }

  function boardCell([key, , take, format], row) {
    const value = take(row);
    if (key === "model") return element("th", { scope: "row" }, value, row.binned ? element("small", {}, " (binned)") : null);
    if (key === "gate") return element("td", { class: value }, (verdictShapes[value] ?? "") + value);
    if (!format) return element("td", {}, value ?? DASH);
    return element("td", { class: "number" }, isNumber(value) ? format(value) : DASH);
  }

  function sortBy(key) {
    const turn = key === state.sort && state.order === "ascending";
    change({ sort: key, order: turn ? "descending" : "ascending" });
  }

  /** Text that a spreadsheet would take for a formula is quoted with an apostrophe; numbers never are. */
  function csvCell(value) {
    if (value === null || value === undefined) return "";
    if (typeof value === "number") return String(value);
    const text = /^[=+\-@\t\r]/.test(value) ? "'" + value : value;
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }

  function csv() {
    const lines = boardRows().map((row) => COLUMNS.map(([, , take]) => csvCell(take(row))).join(","));
    return [COLUMNS.map(([key]) => key).join(","), ...lines].join("\n") + "\n";
  }

  function download() {
    const address = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
    const link = element("a", { href: address, download: "leaderboard.csv" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
  }

  // ---------------------------------------------------------------- charts

  let plotly = null;

  /** Plotly is unpacked when the first chart comes into view. */
  function loadPlotly() {
    plotly ??= inflate(byId("plotly").textContent).then((bytes) => {
      document.head.append(element("script", {}, new TextDecoder().decode(bytes)));
      return window.Plotly;
    });
    return plotly;
  }

  /** What puts the chosen values into a figure of that name; the others are drawn as they are. */
  const FILLED = { landscapes, distributions, saliency };

  function isNarrow() {
    return window.innerWidth < 900;
  }

  /** A copy of the figure as it was made, to be filled. */
  function blank(name) {
    const made = name === "landscapes" ? figures[name][state.scale] : figures[name];
    return structuredClone(made[isNarrow() ? "narrow" : "wide"]);
  }

  /** Plotly reads markup in texts; a label has none. */
  function plain(text) {
    return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  }

  function centres(bins) {
    return Array.from({ length: bins }, (_, bin) => (bin + 0.5) / bins);
  }

  /** Cells as [H][p], as a heat map takes them, each through `value`. */
  function grid(cells, [xbins, ybins], value) {
    return Array.from({ length: ybins }, (_, y) => Array.from({ length: xbins }, (_, x) => value(cells[x * ybins + y])));
  }

  function largest(values) {
    return values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  }

  /** Traces: left, right, right minus left. */
  async function landscapes(figure) {
    const pair = chosen();
    const counts = await Promise.all(pair.map((row) => (row ? countsOf(row) : null)));
    const log = state.scale === "log";
    const drawn = (count) => (count === 0 ? null : log ? Math.log10(count) : count);
    pair.forEach((row, side) => {
      if (row) fillHeat(figure.data[side], row.bins, counts[side], drawn, (count) => count);
      else emptyHeat(figure.data[side]);
    });
    const most = Math.max(1, ...counts.filter(Boolean).map(largest));
    if (isDark()) figure.layout.coloraxis.colorscale = figures.counts_on_dark;
    figure.layout.coloraxis.cmax = log ? Math.log10(most) || 1 : most;
    const why = whyNot(...pair);
    if (why) emptyHeat(figure.data[2]);
    else landscapeDifference(figure, pair[0].bins, counts, log);
    placeThresholds(figure.layout, pair);
    const titles = [...pair.map((row, side) => (row ? row.model : `${[state.left, state.right][side]}: no result here`)), why || "right minus left"];
    titles.forEach((title, panel) => (figure.layout.annotations[panel].text = plain(title)));
    labelQuadrants(figure.layout, pair);
  }

  function fillHeat(heat, bins, cells, drawn, facts) {
    Object.assign(heat, { x: centres(bins[0]), y: centres(bins[1]), z: grid(cells, bins, drawn), customdata: grid(cells, bins, facts) });
  }

  function emptyHeat(heat) {
    Object.assign(heat, { x: [0, 1], y: [0, 1], z: [[null, null], [null, null]], customdata: [] });
  }

  /** In shares of tokens; with log linear up to figures.difference_unit and logarithmic beyond. */
  function landscapeDifference(figure, bins, [left, right], log) {
    const [totalLeft, totalRight] = [sum(left), sum(right)];
    const change = left.map((count, cell) => (left[cell] + right[cell] === 0 ? NaN : right[cell] / totalRight - count / totalLeft));
    const scaled = (share) => (log ? Math.asinh(share / figures.difference_unit) : share);
    const drawn = (share) => (Number.isNaN(share) ? null : scaled(share));
    fillHeat(figure.data[2], bins, change, drawn, (share) => (Number.isNaN(share) ? null : 100 * share));
    const most = scaled(largest(change.filter((share) => !Number.isNaN(share)))) || 1;
    Object.assign(figure.layout.coloraxis2, { cmin: -most, cmax: most });
  }

  /** Shapes: p then H of left, of right, and of both in the third panel. */
  function placeThresholds(layout, [left, right]) {
    [left, right, left, right].forEach((row, place) => {
      const [vertical, horizontal] = layout.shapes.slice(2 * place, 2 * place + 2);
      vertical.visible = horizontal.visible = Boolean(row);
      if (!row) return;
      vertical.x0 = vertical.x1 = row.p_thr;
      horizontal.y0 = horizontal.y1 = row.h_thr;
    });
  }

  /** Annotations after the three titles: four of left, four of right. */
  function labelQuadrants(layout, pair) {
    pair.forEach((row, side) => {
      ["LL", "LH", "HL", "HH"].forEach((name, corner) => {
        const label = layout.annotations[3 + 4 * side + corner];
        label.visible = Boolean(row?.quadrants);
        if (row?.quadrants) label.text = percent(row.quadrants[name], 2);
      });
    });
  }

  /** Traces: p of left, p of right, H of left, H of right. */
  async function distributions(figure) {
    const pair = chosen();
    for (const [i, trace] of figure.data.entries()) {
      const [row, axis] = [pair[i % 2], Math.floor(i / 2)];
      const name = plain(`${i % 2 ? "right" : "left"}: ${[state.left, state.right][i % 2]}`);
      Object.assign(trace, { name, legendgroup: name }, row ? bars(await countsOf(row), row.bins, axis) : { x: [], y: [], customdata: [] });
    }
  }

  function bars(counts, bins, axis) {
    const found = marginal(counts, bins, axis);
    const total = sum(found);
    const width = found.map(() => 1 / found.length);
    return { x: centres(found.length), y: found.map((count) => count / total || null), width, customdata: found };
  }

  /** Traces: experts by id, shades of their share of a layer's scores; marks on those that stay. */
  async function saliency(figure) {
    const found = data.saliencies[Number(state.criterion)];
    const [heat, marks] = figure.data;
    heat.z = found.scores.map((layer) => {
      const total = sum(layer.map((score) => Math.max(0, score ?? 0)));
      return layer.map((score) => (score > 0 ? Math.log10(score / total) : null));
    });
    heat.customdata = found.scores.map((layer) => layer.map((score, expert) => [expert, score]));
    heat.hovertemplate = `layer %{y}, expert %{customdata[0]}<br>${plain(found.criterion)} %{customdata[1]:.5g}`;
    const kept = found.keep_sets[state.keep] ?? found.ranking.map((layer) => layer.slice(0, Number(state.keep)));
    Object.assign(marks, { x: kept.flat(), y: kept.flatMap((layer, index) => layer.map(() => index)), name: `kept, ${state.keep} a layer` });
  }

  const seen = new Set();
  const observer = new IntersectionObserver(
    (entries) => {
      for (const { target } of entries.filter((entry) => entry.isIntersecting && !seen.has(entry.target))) {
        seen.add(target);
        draw(target);
      }
    },
    { rootMargin: "800px" },
  );

  async function draw(box) {
    const wanted = state;
    const name = box.dataset.chart;
    const figure = blank(name);
    await FILLED[name]?.(figure);
    const library = await loadPlotly();
    if (wanted !== state) return; // another view was chosen meanwhile, and draws itself
    const plot = box.querySelector(".plot");
    figure.layout.template = figures.templates[isDark() ? "dark" : "light"];
    await library.react(plot, figure.data, figure.layout, { displayModeBar: false, responsive: true });
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", box.querySelector("figcaption").textContent);
    box.dataset.drawn = JSON.stringify(wanted);
  }

  function renderCharts() {
    for (const box of document.querySelectorAll("[data-chart]")) {
      box.querySelector(".plot").style.minHeight = `${blank(box.dataset.chart).layout.height}px`; // nothing moves when it is drawn
      if (seen.has(box)) draw(box);
      else observer.observe(box);
    }
  }

  // ---------------------------------------------------------------- controls

  function fillSelect(select, options, text = String) {
    select.replaceChildren(...options.map((value) => element("option", { value }, text(value))));
  }

  function fillModels(select) {
    const methods = new Map();
    for (const model of data.models) methods.set(model.method, [...(methods.get(model.method) ?? []), model.label]);
    const groups = [...methods].map(([label, names]) => element("optgroup", { label }, ...names.map((value) => element("option", { value }, value))));
    select.replaceChildren(...groups);
  }

  function fillControls() {
    fillModels(byId("left"));
    fillModels(byId("right"));
    fillSelect(byId("pack"), packNames);
    fillSelect(byId("seq"), seqLens, (length) => whole(Number(length)));
    fillSelect(byId("board-pack"), ["", ...packNames], (pack) => pack || "all packs");
    if (byId("criterion")) fillSelect(byId("criterion"), allowed.criterion, (index) => data.saliencies[Number(index)].title);
    for (const [id, name] of controls()) byId(id).addEventListener("change", (event) => change({ [name]: event.target.value }));
    byId("choice").addEventListener("submit", (event) => event.preventDefault());
    byId("swap").addEventListener("click", () => change({ left: state.right, right: state.left }));
    byId("download").addEventListener("click", download);
    byId("theme").addEventListener("click", () => change({ theme: isDark() ? "light" : "dark" }));
    byId("board").addEventListener("click", (event) => {
      const key = event.target.closest("[data-sort]")?.dataset.sort;
      if (key) sortBy(key);
    });
  }

  /** [id of a control, what of the state it sets], of the controls that this page has. */
  function controls() {
    const ids = { left: "left", right: "right", pack: "pack", seq: "seq", scale: "scale", "board-pack": "board", criterion: "criterion", keep: "keep" };
    return Object.entries(ids).filter(([id]) => byId(id));
  }

  let printing = false;

  function isDark() {
    if (printing) return false;
    return state.theme ? state.theme === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
  }

  function renderControls() {
    for (const [id, name] of controls()) byId(id).value = state[name];
    if (byId("kept")) byId("kept").textContent = state.keep;
    if (state.theme) document.documentElement.dataset.theme = state.theme;
    else delete document.documentElement.dataset.theme;
    byId("theme").textContent = isDark() ? "Light" : "Dark";
  }

  function render() {
    document.documentElement.dataset.state = JSON.stringify(state);
    renderControls();
    renderBoard();
    renderPair();
    renderCharts();
  }

  /** Paper is light. Charts that have not come into view are drawn if that takes no time, else left out. */
  function print(event) {
    printing = event.type === "beforeprint";
    for (const box of document.querySelectorAll("[data-chart]")) {
      if (plotly || seen.has(box)) seen.add(box) && draw(box);
    }
  }

  fillControls();
  window.addEventListener("hashchange", readFragment);
  window.addEventListener("beforeprint", print);
  window.addEventListener("afterprint", print);
  for (const query of ["(prefers-color-scheme: dark)", "(max-width: 899px)"]) window.matchMedia(query).addEventListener("change", render);
  readFragment();
  if (window.location.hash && !window.location.hash.includes("=")) render();
})();
