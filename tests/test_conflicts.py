"""The text of new confident conflicts: which tokens they are, what stands around them, and packs that have changed."""

import contextlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_report import GATES

from eaftlib.errors import ResultError
from eaftlib.evaluation import results
from eaftlib.evaluation.statistics import aggregate
from eaftlib.report import conflicts, model, page

KEY = ("UNION", 40)
AT_40 = replace(GATES, primary_seq_lens=(24, 40))
WRONG = (3, 11, 17)  # kept tokens that the candidate below is sure and wrong about, each less than the one before


@pytest.fixture(scope="module")
def candidate(scored):
    """A copy of the whole model's result but for some tokens; its folder, beside the linked model and packs."""
    base = results.read(scored / "base.json")
    tokens = {key: base.tokens(*key) for key in base.entries}
    nll, entropy = tokens[KEY].nll.copy(), tokens[KEY].entropy.copy()
    for place, index in enumerate(WRONG):
        nll[index], entropy[index] = 60 - 10 * place, 0
    tokens[KEY] = replace(tokens[KEY], nll=nll, entropy=entropy)
    folder = scored.parent / "with-candidate"
    aggregates = {
        key: aggregate(part, base.num_blocks(key[1]), base.meta["cc_quantile"]) for key, part in tokens.items()
    }
    entries = {key: entry | {"model": aggregates[key]} for key, entry in base.entries.items()}
    results.write(folder, "sure", {**base.meta, "label": "sure"}, entries, tokens)
    for file in scored.glob("base.*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def found(candidate):
    with contextlib.chdir(candidate.parent):
        return conflicts.worst_conflicts(results.read_all([str(candidate)]), "base", AT_40)


def test_the_tokens_are_those_that_only_the_candidate_is_sure_and_wrong_about(found, candidate):
    (texts,) = found
    base, other = (results.read(candidate / f"{label}.json").tokens(*KEY) for label in ("base", "sure"))
    assert (texts.label, texts.pack, texts.seq_len, texts.new) == ("sure", *KEY, len(WRONG))
    assert [(c.block, c.position) for c in texts.worst] == [(base.block[i], base.position[i]) for i in WRONG]
    for conflict, index in zip(texts.worst, WRONG, strict=True):
        assert (conflict.p_base, conflict.p) == (np.exp(-float(base.nll[index])), np.exp(-float(other.nll[index])))
        assert conflict.p < 1e-9 < conflict.p_base and conflict.entropy == 0


def test_the_text_is_that_of_the_block(found, packs_folder, tokenizer):
    """Cut again here: rows of the packs in turn, an EOS after each."""
    packs = [pq.read_table(path)["text"].to_pylist() for path in sorted(packs_folder.glob("*.parquet"))]
    rows = [row for i in range(max(map(len, packs))) for pack in packs for row in pack[i : i + 1] if row]
    ids = [i for row in rows for i in [*tokenizer(row, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]
    for conflict in found[0].worst:
        start, place = 40 * conflict.block, 40 * conflict.block + conflict.position
        assert conflict.before == tokenizer.decode(ids[start:place]) and conflict.token == tokenizer.decode(ids[place])
        assert conflict.after == tokenizer.decode(ids[place + 1 : min(place + 11, start + 40)])


def test_the_page_marks_the_token_in_its_text(found, candidate):
    read = results.read_all([str(candidate)])
    text = page.html(model.build(read, "base", AT_40, conflicts=found))
    assert text.count("<mark>") == len(WRONG) and "sure: 3 new on UNION at 40 tokens" in text
    assert "<mark>" not in page.html(model.build(read, "base", AT_40))


def test_packs_that_have_changed_are_refused(candidate, packs_folder, tmp_path):
    shutil.copytree(packs_folder, tmp_path / "tiny" / "packs")
    (tmp_path / "tiny" / "model").symlink_to((candidate.parent / "tiny" / "model").resolve())
    first = sorted((tmp_path / "tiny" / "packs").glob("*.parquet"))[0]
    rows = pq.read_table(first)["text"].to_pylist()
    pq.write_table(pa.table({"text": [rows[0] + "x", *rows[1:]]}), first)
    with (
        contextlib.chdir(tmp_path),
        pytest.raises(ResultError, match=r"is not what .*base\.json was scored on: rows_sha256 is"),
    ):
        conflicts.worst_conflicts(results.read_all([str(candidate)]), "base", AT_40)


def test_a_baseline_without_tokens_is_named(candidate, tmp_path):
    for file in candidate.glob("*.json"):
        shutil.copy(file, tmp_path)
    with pytest.raises(ResultError, match=r"base\.json has no \.tokens\.parquet beside it"):
        conflicts.worst_conflicts(results.read_all([str(tmp_path)]), "base", AT_40)


def test_a_candidate_without_tokens_has_no_texts(candidate, tmp_path):
    for file in [*candidate.glob("*.json"), candidate / "base.tokens.parquet"]:
        shutil.copy(file, tmp_path)
    with contextlib.chdir(candidate.parent):
        assert conflicts.worst_conflicts(results.read_all([str(tmp_path)]), "base", AT_40) == ()
    assert json.loads((tmp_path / "sure.json").read_text())["meta"]["label"] == "sure"
