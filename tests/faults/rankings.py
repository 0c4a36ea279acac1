"""What can happen to ranking.json, saliency.parquet and trace.safetensors, and what their readers make of it.

    python tests/faults/rankings.py

prints how many cases of each kind end in an error of the library's family, in another exception, in the keep-sets (or
numbers) that were written, and in others.
"""

import copy
import json
import math
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))
import world

from eaftlib.errors import EaftError
from eaftlib.pruning.criteria import CRITERIA, expert_sums
from eaftlib.pruning.keepsets import from_ranking, kept_by
from eaftlib.pruning.ranking import ranking_of, read_ranking, read_sums, sums_sha256, write_ranking
from eaftlib.pruning.trace import Trace

LAYERS, EXPERTS, TOP_K, TOKENS, ROWS, SAMPLED = 3, 8, 2, 50, 60, 9
MODEL = SimpleNamespace(num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, model_id="m", sha256=None)
OWN, FOREIGN, RIGHT, WRONG = "own error", "foreign", "accepted, right", "accepted, wrong"


def made_up_trace():
    """Valid, of no model; in the last layer expert 5 was never routed to, and in the first 1 and 2 were alike."""
    rng = np.random.default_rng(0)
    experts = [[e for e in range(EXPERTS) if (layer, e) != (LAYERS - 1, 5)] for layer in range(LAYERS)]
    expert = np.array([[rng.permutation(e)[:TOP_K] for _ in range(ROWS)] for e in experts], np.uint8)
    gate = rng.dirichlet([1.0] * TOP_K, (LAYERS, ROWS)).astype(np.float32)
    norm = rng.gamma(2.0, size=expert.shape).astype(np.float32)
    first = (expert[0] == 1) | (expert[0] == 2)
    expert[0][first], norm[0][first] = np.resize([1, 2], first.sum()), 1.0
    outputs = rng.normal(size=(LAYERS, SAMPLED, EXPERTS, 16))
    upper = np.triu_indices(EXPERTS)
    provenance = world.hand_made_ranking({})["provenance"] | {
        "kept_tokens": TOKENS,
        "recon_tokens": SAMPLED,
        "recon_tokens_found": SAMPLED,
    }
    of_ranking = (*world.RANK_SETTINGS, "seed", "saliency_sha256", "grams_sha256", "sha256")
    return Trace(
        nll=rng.gamma(1.0, size=TOKENS).astype(np.float32),
        entropy=rng.random(TOKENS).astype(np.float32),
        predictor_row=np.arange(TOKENS),
        token_row=np.arange(1, TOKENS + 1),
        expert=expert,
        gate=gate,
        norm=norm,
        peak=norm / 2,
        num_experts=EXPERTS,
        provenance={name: value for name, value in provenance.items() if name not in of_ranking},
        grams=np.ascontiguousarray((outputs @ outputs.swapaxes(2, 3))[:, :, *upper].astype(np.float32)),
        router_logits=rng.normal(size=(LAYERS, SAMPLED, EXPERTS)).astype(np.float32),
    )


def write_valid(folder):
    """A folder as 01_rank leaves it; returns the ranking's content."""
    trace = made_up_trace()
    sums = expert_sums(trace, np.resize([1.0, 0.25, -2.0], TOKENS))
    criteria = [*CRITERIA, "random", "recon"]
    ranking = ranking_of(trace, sums, criteria, settings=world.RANK_SETTINGS, seed=3, progress=False)
    write_ranking(folder, ranking, sums)
    trace.save(folder / "trace.safetensors")
    return json.loads((folder / "ranking.json").read_text())


# --- ranking.json -------------------------------------------------------------------------------------------------

VALUES = [None, True, -1, -5, 1.5, 32, 10**15, 10**30, 10**400, 1e308, -0.0, "", "☃", "\ud800", [], {}, [[[]]]]
RAW = ["NaN", "Infinity", "1e999", "9" * 5000, '"\\ud800"', "[" * 100_000, "00", "\x00"]


def _ranking_of(criterion, layer):
    return lambda r: r["criteria"][criterion]["ranking"][layer]


def _set(where, index, value):
    return lambda r: where(r).__setitem__(index, value)


def _each(change):
    """Of every criterion's scores and ranking."""

    def of_all(ranking):
        for entry in ranking["criteria"].values():
            for part in ("scores", "ranking"):
                entry[part] = change(entry[part])

    return of_all


NAMED = {
    **{f"id {i}": _set(_ranking_of("reap", 1), 0, i) for i in (8, 32, 40, -5, 2**31, 2**63, 1.0, "3", None, True)},
    "an id twice": lambda r: _set(_ranking_of("reap", 1), 0, _ranking_of("reap", 1)(r)[1])(r),
    "all the same": lambda r: _set(_ranking_of("reap", 1), slice(0, EXPERTS), [3] * EXPERTS)(r),
    "an id less": lambda r: _ranking_of("reap", 1)(r).pop(),
    "an id more": lambda r: _ranking_of("reap", 1)(r).append(EXPERTS),
    "half as many ids": _each(lambda layers: [layer[: EXPERTS // 2] for layer in layers]),
    "twice as many ids": _each(lambda layers: [layer * 2 for layer in layers]),
    "twice as many experts": lambda r: r.update(num_experts=2 * EXPERTS),
    "a layer more": _each(lambda layers: [*layers, layers[0]]),
    "a layer more, said": lambda r: (r.update(num_layers=LAYERS + 1), _each(lambda layers: [*layers, layers[0]])(r)),
    "a layer less": _each(lambda layers: layers[:-1]),
    "a layer less, said": lambda r: (r.update(num_layers=LAYERS - 1), _each(lambda layers: layers[:-1])(r)),
    "layers permuted": lambda r: r["criteria"]["reap"]["ranking"].reverse(),
    "scores of layers permuted": lambda r: r["criteria"]["reap"]["scores"].reverse(),
    "reversed": lambda r: _ranking_of("eaft_reap", 0)(r).reverse(),
    "two neighbours swapped": lambda r: _set(_ranking_of("ean", 2), slice(0, 2), _ranking_of("ean", 2)(r)[1::-1])(r),
    "a tie the other way": lambda r: _set(
        _ranking_of("random", 0), slice(0, EXPERTS), sorted(_ranking_of("random", 0)(r))
    )(r),
    "recon the other way": lambda r: _ranking_of("recon", 0)(r).reverse(),
    "scores that do not order": lambda r: r["criteria"]["reap_mass"]["scores"][0].reverse(),
    "negative norms": lambda r: r["criteria"]["ean"].update(
        scores=[[-x for x in s] for s in r["criteria"]["ean"]["scores"]],
    ),
    "never routed, but a score": lambda r: _set(lambda r: r["criteria"]["reap"]["scores"][LAYERS - 1], 5, 0.5)(r),
    "routed, but no score": lambda r: _set(lambda r: r["criteria"]["reap"]["scores"][0], 5, None)(r),
    "no score of a sum": lambda r: _set(lambda r: r["criteria"]["ean"]["scores"][0], 5, None)(r),
    "counts that do not add up": lambda r: r["criteria"]["frequency"].update(
        scores=[[2 * x for x in s] for s in r["criteria"]["frequency"]["scores"]],
    ),
    "keep_sets of another criterion": lambda r: r["criteria"]["reap"].update(
        keep_sets=r["criteria"]["recon"]["keep_sets"], losses=r["criteria"]["recon"]["losses"]
    ),
    "a keep-set less": lambda r: r["criteria"]["recon"]["keep_sets"].pop("4"),
    "a keep-set of another count": lambda r: r["criteria"]["recon"]["keep_sets"].update(
        {"4": r["criteria"]["recon"]["keep_sets"]["5"]}
    ),
    "a keep-set not ascending": lambda r: r["criteria"]["recon"]["keep_sets"]["4"][0].reverse(),
    "a keep-set with an id twice": _set(lambda r: r["criteria"]["recon"]["keep_sets"]["4"][0], 0, 7),
    "a keep-set with id 8": _set(lambda r: r["criteria"]["recon"]["keep_sets"]["4"][0], 3, EXPERTS),
    "a keep-set with id -5": _set(lambda r: r["criteria"]["recon"]["keep_sets"]["4"][0], 0, -5),
    "no losses": lambda r: r["criteria"]["recon"].pop("losses"),
    "losses of a layer less": lambda r: r["criteria"]["recon"]["losses"]["4"].pop(),
    "a negative loss": _set(lambda r: r["criteria"]["recon"]["losses"]["4"], 0, -0.5),
    "10^15 layers": lambda r: r.update(num_layers=10**15),
    "10^15 experts": lambda r: r.update(num_experts=10**15),
    "top_k 0": lambda r: r.update(top_k=0),
    "top_k 3": lambda r: r.update(top_k=3),
    "top_k 9": lambda r: r.update(top_k=9),
    "no criteria": lambda r: r["criteria"].clear(),
    "an unknown criterion": lambda r: r["criteria"].update(reep=r["criteria"]["reap"]),
    "another model": lambda r: r["provenance"].update(model_sha256="0" * 64),
    "an earlier model": lambda r: r["provenance"].update(model_sha256="ab12"),
    "another schema": lambda r: r.update(schema="eaft-ranking/2"),
}
# What the hash alone can tell: with the hash that goes with them they would be another valid ranking.
EDITED = {
    "rows edited": lambda r: r["provenance"].update(rows="eval"),
    "weights edited": lambda r: r["provenance"].update(w_conflict=2.0),
    "a score edited": _set(lambda r: r["criteria"]["recon"]["scores"][0], 0, math.pi * 1e9),
    "two criteria exchanged": lambda r: r["criteria"].update(
        ean=r["criteria"]["reap_mass"], reap_mass=r["criteria"]["ean"]
    ),
    "another valid keep-set": lambda r: r["criteria"]["recon"]["keep_sets"].update({"7": [[*range(1, 8)]] * LAYERS}),
    "a criterion less": lambda r: r["criteria"].pop("random"),
    "a fact less": lambda r: r["provenance"].pop("eos_token_id"),
    "a fact more": lambda r: r["provenance"].update(note="edited"),
    "another hash": lambda r: r["provenance"].update(sha256="0" * 64),
}


def paths(content, at=()):
    """Of everything in a JSON document; of long lists the first and the last."""
    if at:
        yield at
    if isinstance(content, dict):
        inside = list(content)
    else:
        inside = sorted({0, len(content) - 1} - {-1}) if isinstance(content, list) else []
    for name in inside:
        yield from paths(content[name], (*at, name))


def changed(content, at, change):
    """A copy; change: what is done to the object or list that holds the last step of ``at``."""
    content = copy.deepcopy(content)
    holder = content
    for name in at[:-1]:
        holder = holder[name]
    change(holder, at[-1])
    return content


def ranking_cases(valid):
    """(kind, name, what makes the file's text), sealed: with the hash that goes with what was changed."""
    for name, change in NAMED.items():
        yield "named", name, lambda c=change: json.dumps(_after(valid, c))
        yield "named, sealed", name, lambda c=change: json.dumps(world.sealed(_after(valid, c)))
    for name, change in EDITED.items():
        yield "edited", name, lambda c=change: json.dumps(_after(valid, c))
    yield from damaged(valid)
    text = json.dumps(valid, indent=1)
    rng = np.random.default_rng(0)
    for size in range(0, len(text), len(text) // 60):
        yield "bytes", f"cut to {size}", lambda s=size: text[:s]
    for place, bit in zip(rng.integers(0, len(text), 200).tolist(), np.resize(range(7), 200).tolist(), strict=True):
        yield "bytes", f"byte {place}", lambda p=place, b=bit: text[:p] + chr(ord(text[p]) ^ (1 << b)) + text[p + 1 :]


def damaged(valid):
    """Of any JSON document: everything left out, and in its place every other kind of value."""
    for at in paths(valid):
        where = ".".join(map(str, at))
        changes = {f"without {where}": lambda holder, last: holder.pop(last)}
        changes |= {f"{where} = {v!r}"[:60]: lambda holder, last, v=v: holder.__setitem__(last, v) for v in VALUES}
        for name, change in changes.items():
            yield "anywhere", name, lambda a=at, c=change: json.dumps(changed(valid, a, c))
            if len(at) > 1 and at[0] in ("provenance", "criteria"):
                yield "anywhere, sealed", name, lambda a=at, c=change: json.dumps(world.sealed(changed(valid, a, c)))
        for raw in RAW:
            yield "anywhere, no JSON", f"{where} = {raw[:20]}", lambda a=at, r=raw: _raw(valid, a, r)


def _after(valid, change):
    content = copy.deepcopy(valid)
    change(content)
    return content


def _raw(valid, at, raw):
    mark = json.dumps("<here>")
    return json.dumps(changed(valid, at, lambda holder, last: holder.__setitem__(last, "<here>"))).replace(mark, raw)


def keep_sets(folder, content):
    """Of every criterion and count, as the library reads them; ``content``: what was read."""
    found = {
        (c, n): kept_by(e, n)[0].tolist() for c, e in content["criteria"].items() for n in range(TOP_K, EXPERTS + 1)
    }
    options = {"ranking": folder, "multiple_of": 1, "keep_n": 4}
    model = copy.copy(MODEL)
    model.sha256 = world.hand_made_ranking({})["provenance"]["model_sha256"]
    for name in ("eaft_reap", "recon"):
        found[name] = from_ranking(model, criterion=name, **options).ids.tolist()
        found[name, "core"] = from_ranking(model, criterion=name, core_top_m=1, **options).ids.tolist()
    return found


def outcome(read, expected):
    """How a case ends; read: gives what must be ``expected``, or a part of it."""
    try:
        found = read()
    except EaftError:
        return OWN
    except Exception:
        return FOREIGN
    return RIGHT if all(expected.get(name) == value for name, value in found.items()) else WRONG


def ranking_outcome(folder, text, expected):
    (folder / "ranking.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    return outcome(lambda: keep_sets(folder, read_ranking(folder)), expected)


# --- saliency.parquet ---------------------------------------------------------------------------------------------


def _column(sums, name, change):
    values = sums[name].to_numpy().copy()
    return sums.set_column(sums.column_names.index(name), name, pa.array(change(values)))


def _at(row, value):
    def change(values):
        values[row] = value
        return values

    return change


TABLES = {
    "a column less": lambda t: t.drop_columns(["norm_sum"]),
    "a column more": lambda t: t.append_column("more", t["count"]),
    "a column renamed": lambda t: t.rename_columns({"norm_sum": "norms"}),
    "columns in another order": lambda t: t.select(t.column_names[::-1]),
    "a column twice": lambda t: t.append_column("count", t["count"]),
    "counts as float": lambda t: _column(t, "count", lambda v: v.astype(float)),
    "sums as float32": lambda t: _column(t, "norm_sum", lambda v: v.astype(np.float32)),
    "sums as text": lambda t: _column(t, "norm_sum", lambda v: v.astype(str)),
    "a null": lambda t: t.set_column(3, "gate_sum", pa.array([None, *t["gate_sum"].to_pylist()[1:]], pa.float64())),
    "NaN": lambda t: _column(t, "gate_norm_sum", _at(3, np.nan)),
    "Inf": lambda t: _column(t, "eaft_gate_norm_sum", _at(3, np.inf)),
    "a row less": lambda t: t.slice(1),
    "a row twice": lambda t: pa.concat_tables([t, t.slice(0, 1)]),
    "no rows": lambda t: t.slice(0, 0),
    "rows in another order": lambda t: t.take(np.arange(len(t))[::-1].copy()),
    "expert 32": lambda t: _column(t, "expert", _at(2, 32)),
    "layer -1": lambda t: _column(t, "layer", _at(2, -1)),
    "a negative count": lambda t: _column(t, "count", _at(2, -3)),
    "counts that do not add up": lambda t: _column(t, "count", _at(2, 1000)),
    "more positive than all": lambda t: _column(t, "pos_count", _at(2, 10**6)),
    "a negative norm": lambda t: _column(t, "norm_sum", _at(2, -1.0)),
    "a sum of no tokens": lambda t: _column(t, "norm_sum", _at(2 * EXPERTS + 5, 1.0)),
}


def table_cases(folder):
    """(name, table, whether the ranking's hash goes with it)"""
    valid = pq.read_table(folder / "saliency.parquet")
    for name, change in TABLES.items():
        yield name, change(valid), False
        yield f"{name}, sealed", change(valid), True


def byte_cases(data, flips):
    rng = np.random.default_rng(0)
    for size in range(0, len(data), max(1, len(data) // 60)):
        yield f"cut to {size}", data[:size]
    yield "longer", data + b"\0"
    for place in rng.integers(0, len(data), flips).tolist():
        spoiled = bytearray(data)
        spoiled[place] ^= 1 << int(rng.integers(8))
        yield f"byte {place}", bytes(spoiled)


def table_outcome(folder, ranking, expected):
    return outcome(lambda: read_sums(folder, ranking).to_pydict(), expected)


def sealed_with(ranking, table):
    try:
        digest = sums_sha256(table)
    except (ValueError, KeyError):  # no numbers, a name twice
        digest = "0" * 64
    return world.sealed(ranking | {"provenance": ranking["provenance"] | {"saliency_sha256": digest}})


# --- trace.safetensors --------------------------------------------------------------------------------------------


def trace_outcome(path, expected):
    return outcome(lambda: comparable(vars(Trace.load(path))), expected)


def comparable(fields):
    return {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in fields.items()}


def tally(folder):
    """Counter by (file, kind, outcome)."""
    valid = write_valid(folder)
    counts = Counter()
    expected = keep_sets(folder, read_ranking(folder))
    for kind, _, make in ranking_cases(valid):
        counts["ranking.json", kind, ranking_outcome(folder, make(), expected)] += 1
    write_valid(folder)
    table, data = pq.read_table(folder / "saliency.parquet").to_pydict(), (folder / "saliency.parquet").read_bytes()
    for _, case, sealed in table_cases(folder):
        pq.write_table(case, folder / "saliency.parquet")
        ranking = sealed_with(valid, case) if sealed else valid
        kind = "values, sealed" if sealed else "values"
        counts["saliency.parquet", kind, table_outcome(folder, ranking, table)] += 1
    for _, case in byte_cases(data, 600):
        (folder / "saliency.parquet").write_bytes(case)
        counts["saliency.parquet", "bytes", table_outcome(folder, valid, table)] += 1
    file = folder / "trace.safetensors"
    fields, data = comparable(vars(Trace.load(file))), file.read_bytes()
    for _, case in byte_cases(data, 600):
        file.write_bytes(case)
        counts["trace.safetensors", "bytes", trace_outcome(file, fields)] += 1
    return counts


def main():
    with tempfile.TemporaryDirectory() as folder:
        counts = tally(Path(folder))
    print(f"{'file':18} {'kind':18} {'cases':>6} " + " ".join(f"{o:>16}" for o in (OWN, FOREIGN, RIGHT, WRONG)))
    for file, kind in dict.fromkeys((file, kind) for file, kind, _ in counts):
        row = [counts[file, kind, o] for o in (OWN, FOREIGN, RIGHT, WRONG)]
        print(f"{file:18} {kind:18} {sum(row):6} " + " ".join(f"{n:16}" for n in row))


if __name__ == "__main__":
    main()
