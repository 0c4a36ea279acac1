"""A damaged checkpoint is refused by the library's own error, or harmless; ``verify`` reads every byte of it."""

import hashlib
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
import world
from faults import checkpoint as faults
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_slicing import random_keep

from eaftlib import __main__
from eaftlib.engine.weights import Weights
from eaftlib.errors import CheckpointError
from eaftlib.model import shards, values
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.pruning import slicing
from eaftlib.pruning.verify import verify

ANOTHER_MODEL = {  # values that are right as they stand; the numbers differ, and so do the hashes that a result carries
    *(f"{key} = 1.5" for key in ("rope_theta", "swiglu_limit", "swiglu_alpha")),
    *(f"rope_scaling.{key} = 1.5" for key in ("factor", "beta_fast", "beta_slow", "rope_theta", "attention_factor")),
    "rope_scaling.truncate = True",
    "tokenizer.json pre_tokenizer = deleted",
}


@pytest.fixture
def copy(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def undamaged(model_folder):
    return faults.run(model_folder)


@pytest.mark.parametrize("kind", faults.kinds())
def test_every_damage_is_refused_or_changes_nothing(model_folder, undamaged, tmp_path, kind):
    may_be = {faults.OWN} if kind == "shards" else {faults.OWN, faults.RIGHT}  # no byte of a header is free
    for name, damage in faults.kinds()[kind].items():
        folder = faults.copy(model_folder, tmp_path / "copy")
        damage(folder)
        found, error = faults.outcome(folder, undamaged)
        expected = {faults.OTHER} if name in ANOTHER_MODEL else may_be
        assert found in expected, f"{name}: {found} {error}"
        shutil.rmtree(folder)


def test_an_index_leads_out_to_no_file_even_if_that_is_whole(copy):
    faults.index_cases()["index leads out to a whole shard"](copy)
    with pytest.raises(CheckpointError, match=r"in '\.\./outside\.safetensors', expected the name of a file beside it"):
        Checkpoint(str(copy))


@pytest.mark.parametrize("beyond", [False, True])
def test_the_last_row_of_the_embedding_is_the_largest_id(copy, beyond):
    largest = world.VOCAB - 1 + beyond
    faults.edit(copy / "tokenizer.json", lambda content: content["model"]["vocab"].update(zzz=largest))
    if beyond:
        with pytest.raises(CheckpointError, match=r"token 'zzz' has id 512, config\.json has vocab_size 512"):
            _ = Checkpoint(str(copy)).tokenizer
    else:
        assert Checkpoint(str(copy)).tokenizer.convert_tokens_to_ids("zzz") == largest


@settings(max_examples=25)
@given(st.data())
def test_no_byte_of_a_header_can_be_changed_unseen(model_folder, undamaged, tmp_path_factory, data):
    folder = faults.copy(model_folder, tmp_path_factory.mktemp("bytes") / "copy")
    path = faults.shard_of(folder, data.draw(st.sampled_from(faults.TENSORS)))
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    position = data.draw(st.integers(0, 7 + length))
    content[position] ^= data.draw(st.integers(1, 255))
    faults.write(path, bytes(content))
    assert faults.outcome(folder, undamaged)[0] in (faults.OWN, faults.RIGHT)


# A file that changes after it was opened


@pytest.mark.parametrize("read", ["all", "in pieces"])
def test_a_shard_cut_short_after_it_was_opened_is_an_error_and_no_signal(copy, read):
    opened = Checkpoint(str(copy))
    path = faults.shard_of(copy, "lm_head.weight")
    os.truncate(path, opened.location("lm_head.weight").offset + 100)
    with pytest.raises(CheckpointError, match=r"ended inside tensor 'lm_head\.weight': it has been cut short"):
        opened.tensor("lm_head.weight") if read == "all" else list(opened.location("lm_head.weight").pieces())


def test_tensors_equal_those_that_the_formats_own_library_reads(checkpoint, monkeypatch):
    monkeypatch.setattr(shards, "PIECE_BYTES", 1000)
    for file in {checkpoint.location(name).file for name in checkpoint.names}:
        for name, expected in load_file(file).items():
            assert torch.equal(checkpoint.tensor(name), expected), name
            pieces = [bytes(piece) for piece in checkpoint.location(name).pieces()]
            assert b"".join(pieces) == expected.flatten().view(torch.uint8).numpy().tobytes()
            assert max(map(len, pieces)) <= 1000


# Values


def spoil(folder, name, value, index):
    path = faults.shard_of(folder, name)
    tensors = load_file(path)
    tensors[name][index] = value
    save_file(tensors, path, metadata={"format": "pt"})


BAD = [
    ("lm_head.weight", float("nan"), (300, 63)),
    ("model.embed_tokens.weight", float("inf"), (0, 0)),
    ("model.norm.weight", float("-inf"), (5,)),
    ("model.layers.2.mlp.router.weight", float("nan"), (7, 63)),
    ("model.layers.1.mlp.experts.gate_up_proj_bias", float("-inf"), (3, 191)),
    ("model.layers.3.self_attn.sinks", float("inf"), (3,)),
    ("model.layers.0.mlp.experts.down_proj_scales", 255, (7, 63, 2)),
    ("model.layers.0.mlp.experts.gate_up_proj_scales", 253, (2, 1, 0)),
]


@pytest.mark.parametrize("name, value, index", BAD)
def test_what_is_no_number_is_named_with_its_place(copy, monkeypatch, name, value, index):
    monkeypatch.setattr(shards, "PIECE_BYTES", 256)  # whatever piece it is in
    verify(str(copy), progress=False)
    spoil(copy, name, value, index)
    with pytest.raises(CheckpointError) as error:
        verify(str(copy), progress=False)
    assert f"tensor {name!r}: 1 " in str(error.value) and f"the first is {value} at {list(index)}" in str(error.value)


@pytest.mark.parametrize("name, value, index", [bad for bad in BAD if ".layers." in bad[0]])
def test_a_run_meets_no_layer_with_such_values(copy, cpu, name, value, index):
    """The model would clamp an infinite gate to 7, and an infinite sink would only take attention away."""
    spoil(copy, name, value, index)
    with pytest.raises(CheckpointError, match=f"{name}.*the first is {value} at"):
        list(Weights(Checkpoint(str(copy)), cpu).layers())


def test_the_largest_values_of_a_type_are_numbers(copy):
    spoil(copy, "model.norm.weight", torch.finfo(torch.bfloat16).max, 0)
    spoil(copy, "model.layers.0.mlp.experts.down_proj_scales", 252, (0, 0, 0))
    assert verify(str(copy), progress=False).startswith(f"{copy} is whole: ")


@settings(max_examples=15)
@given(st.lists(st.sampled_from([0.0, -1.0, 3e38, float("nan"), float("inf"), float("-inf")]), min_size=1, max_size=9))
def test_the_check_of_values_agrees_with_isfinite(numbers):
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.tensor(numbers, dtype=dtype)
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            with pytest.raises(CheckpointError, match=f"{bad} values are not finite"):
                values.require_finite("x", tensor)
        else:
            values.require_finite("x", tensor)


# A pruned checkpoint, and what it says of itself


@pytest.fixture(scope="module")
def pruned_once(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned") / "half"
    slicing.prune(checkpoint, random_keep(), folder, progress=False)
    return folder


@pytest.fixture
def pruned(pruned_once, tmp_path):
    return shutil.copytree(pruned_once, tmp_path / "pruned")


def edit(name, **change):
    return lambda folder: faults.edit(folder / name, lambda content: content.update(change))


def zero(folder):
    """Bytes that stand for experts, so that every value stays finite; size and times of the file stay as they are."""
    path = faults.shard_of(folder, "model.layers.1.mlp.experts.down_proj_blocks")
    before, where = path.stat(), Checkpoint(str(folder)).location("model.layers.1.mlp.experts.down_proj_blocks")
    with path.open("r+b") as file:
        file.seek(where.offset)
        file.write(bytes(where.nbytes))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


MANIFEST, MAPPING = slicing.MANIFEST, slicing.MAPPING
DISAGREEMENTS = {
    "bytes zeroed": (zero, r"model-00001-of-00001\.safetensors has SHA-256 [0-9a-f]{64}, prune_manifest\.json says"),
    "licence changed": (lambda f: faults.write(f / "LICENSE", "MIT"), r"LICENSE has SHA-256"),
    "a file gone": (lambda f: (f / "chat_template.jinja").unlink(), r"chat_template\.jinja is missing"),
    "mapping gone": (lambda f: (f / MAPPING).unlink(), r"expert_mapping\.json does not exist"),
    "no hashes": (edit(MANIFEST, sha256={}), r"prune_manifest\.json: sha256: "),
    "other hashes": (edit(MANIFEST, sha256={"LICENSE": "0" * 64}), r"(?s)LICENSE has .*config\.json is not listed"),
    "a path": (edit(MANIFEST, sha256={"../x": "0" * 64}), r"prune_manifest\.json: sha256\."),
    "another schema": (edit(MANIFEST, schema="x"), r"prune_manifest\.json: schema: "),
    "other counts": (edit(MANIFEST, num_experts_after=5), r"(?s)speaks of 4 experts, .* of 5"),
    "other bytes": (edit(MANIFEST, bytes_after=5), r"bytes, prune_manifest\.json says 5"),
    "more than before": (edit(MANIFEST, num_experts_before=3), "there is more after pruning than before"),
    "an expert that was not": (edit(MAPPING, **{"2": {"0": 0, "1": 1, "2": 2, "3": 8}}), r"layer 2 maps"),
    "an expert twice": (edit(MAPPING, **{"2": {"0": 0, "1": 1, "2": 1, "3": 3}}), r"layer 2 maps"),
    "a layer more": (edit(MAPPING, **{"4": {"0": 0, "1": 1, "2": 2, "3": 3}}), r"it has layers .*expected 0 to 3"),
    "ids as text": (edit(MAPPING, **{"0": {"0": "0"}}), r"expert_mapping\.json: 0\.0: "),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_a_checkpoint_that_is_not_what_its_manifest_says(pruned, case):
    damage, expected = DISAGREEMENTS[case]
    verify(str(pruned), progress=False)
    damage(pruned)
    with pytest.raises(CheckpointError, match=expected):
        verify(str(pruned), progress=False)


def test_a_file_of_the_hub_that_is_not_what_its_name_says(copy, tmp_path):
    """The cache names what it fetched by its hash, and keeps the name when the disk loses a bit."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0"
    blobs.mkdir(), shutil.copytree(copy, snapshot)
    path = faults.shard_of(snapshot, "lm_head.weight")
    blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
    zero(snapshot)
    other = faults.shard_of(snapshot, "model.layers.1.mlp.experts.down_proj_blocks")
    named = blobs / hashlib.sha256(faults.shard_of(copy, "lm_head.weight").read_bytes()).hexdigest()
    for file, name in ((path, blob), (other, named.with_name("ab" * 32))):
        file.rename(name)
        file.symlink_to(name)
    with pytest.raises(CheckpointError, match=rf"{other.name} has SHA-256 .* the hub gave {'ab' * 32}") as error:
        verify(str(snapshot), progress=False)
    assert path.name not in str(error.value)


def test_the_command_gives_a_verdict_and_a_status(copy, capsys):
    assert __main__.main(["verify", str(copy)]) == 0
    assert capsys.readouterr().out.startswith(f"{copy} is whole: ")
    spoil(copy, "model.norm.weight", float("nan"), 1)
    assert __main__.main(["verify", str(copy)]) == 1
    said = capsys.readouterr()
    assert "tensor 'model.norm.weight': 1 values are not finite" in said.err and not said.out


# Pruning


def test_what_a_killed_prune_left_is_gone_after_the_next(checkpoint, tmp_path):
    left = tmp_path / ".out.partial" / "checkpoint"
    left.mkdir(parents=True)
    (left / "model-00009-of-00009.safetensors").write_bytes(bytes(1000))
    (left.parent / "lock").touch()
    slicing.prune(checkpoint, random_keep(), tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "model-00009-of-00009.safetensors").exists()
    verify(str(tmp_path / "out"), progress=False)


def test_what_a_killed_prune_left_is_gone_before_the_space_is_counted(checkpoint, tmp_path, monkeypatch):
    size = slicing.checkpoint_sizes(checkpoint, 4).total
    left = tmp_path / ".out.partial" / "checkpoint"
    left.mkdir(parents=True)
    (left / "x").write_bytes(bytes(size))

    def usage(path):
        return SimpleNamespace(
            free=1.5 * size - sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
        )

    monkeypatch.setattr(slicing.shutil, "disk_usage", usage)
    slicing.prune(checkpoint, random_keep(), tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_of_two_prunes_at_once_one_writes_and_the_other_is_told(checkpoint, tmp_path, monkeypatch):
    write, told = slicing._write, []

    def meanwhile(*args):
        monkeypatch.setattr(slicing, "_write", write)
        with pytest.raises(CheckpointError, match=r"out is being written by another process") as error:
            slicing.prune(checkpoint, random_keep(seed=1), tmp_path / "out", progress=False)
        told.append(error)
        return write(*args)

    monkeypatch.setattr(slicing, "_write", meanwhile)
    slicing.prune(checkpoint, random_keep(), tmp_path / "out", progress=False)
    assert told and [path.name for path in tmp_path.iterdir()] == ["out"]
    verify(str(tmp_path / "out"), progress=False)


def test_one_that_waited_while_another_finished_or_failed_is_told(tmp_path, monkeypatch):
    """It has opened a lock that is removed, or the folder is there by now: either way nothing is written twice."""
    monkeypatch.setattr(slicing.fcntl, "flock", lambda *_: (tmp_path / "lock").unlink())
    for path in (tmp_path / "lock", tmp_path / "gone" / "lock"):
        with pytest.raises(CheckpointError, match="written by another process"):
            slicing._locked(path, tmp_path / "out")
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"), slicing._alone(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.down_proj_blocks", "model.norm.weight"])
def test_bytes_that_the_disk_did_not_keep_are_no_result(checkpoint, tmp_path, monkeypatch, name):
    write = slicing._write

    def lossy(checkpoint, keep, new, folder, *args):
        manifest = write(checkpoint, keep, new, folder, *args)
        where = Checkpoint(str(folder)).location(name)
        with where.file.open("r+b") as file:
            file.seek(where.offset + where.nbytes - 1)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([last ^ 1]))
        return manifest

    monkeypatch.setattr(slicing, "_write", lossy)
    with pytest.raises(CheckpointError, match=f"tensor '{name}' is not what was to be written"):
        slicing.prune(checkpoint, random_keep(), tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())
