"""Opening a checkpoint: what it reads equals what transformers loads, and damage is named before any work."""

import hashlib
import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import world
from safetensors.torch import load_file, save_file

from eaftlib.engine.weights import Weights
from eaftlib.errors import CheckpointError
from eaftlib.model import fingerprint
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.pruning.slicing import keep_all, prune

INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "copy")


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def shard_of(folder, name):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def replace_tensor(folder, name, tensor):
    shard = shard_of(folder, name)
    save_file(load_file(shard) | {name: tensor}, shard)


def test_layers_equal_those_that_transformers_loads(checkpoint, hf_model, cpu):
    for (_, layer), expected in zip(Weights(checkpoint, cpu).layers(), hf_model.model.layers, strict=True):
        found = layer.state_dict()
        assert found.keys() == expected.state_dict().keys()
        for name, tensor in expected.state_dict().items():
            assert torch.equal(found[name], tensor), name


def test_embedding_head_and_norm_equal_those_that_transformers_loads(checkpoint, hf_model, cpu):
    weights = Weights(checkpoint, cpu)
    assert torch.equal(weights.embedding, hf_model.model.embed_tokens.weight)
    assert torch.equal(weights.lm_head, hf_model.lm_head.weight)
    assert torch.equal(weights.norm.weight, hf_model.model.norm.weight)


def test_a_checkpoint_in_one_file_holds_the_same_tensors(tmp_path, checkpoint):
    folder = world.write_checkpoint(tmp_path / "m", shards=1)
    (folder / "model-00000-of-00001.safetensors").rename(folder / "model.safetensors")
    (folder / INDEX).unlink()
    single = Checkpoint(str(folder))
    for name in checkpoint.names:
        assert torch.equal(single.tensor(name), checkpoint.tensor(name))


def test_dim_0_counts_experts_in_routers_and_experts_only(checkpoint):
    counted = {name for name in checkpoint.names if checkpoint.family.layer_of_experts(name) is not None}
    parts = ["router.weight", "router.bias"]
    parts += [f"experts.{p}_proj_{kind}" for p in ("gate_up", "down") for kind in ("blocks", "scales", "bias")]
    assert counted == {f"model.layers.{i}.mlp.{part}" for i in range(world.LAYERS) for part in parts}


def test_the_hash_is_the_same_for_a_copy_and_does_not_know_the_tokenizer(copy, checkpoint):
    assert Checkpoint(str(copy)).sha256 == checkpoint.sha256
    assert Checkpoint(str(copy)).tokenizer_sha256 == checkpoint.tokenizer_sha256
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + " ")
    assert Checkpoint(str(copy)).sha256 == checkpoint.sha256
    assert Checkpoint(str(copy)).tokenizer_sha256 != checkpoint.tokenizer_sha256


@pytest.mark.parametrize("name", world.state_dict())
def test_the_hash_counts_every_tensor(copy, checkpoint, name):
    tensor = checkpoint.tensor(name).clone()
    tensor.view(-1).view(torch.uint8)[-1] ^= 1
    replace_tensor(copy, name, tensor)
    assert Checkpoint(str(copy)).sha256 != checkpoint.sha256


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 10000},
        {"rope_scaling": world.CONFIG["rope_scaling"] | {"factor": 32.0}},
        {"sliding_window": 8},
        {"layer_types": ["full_attention"] * world.LAYERS},
        {"swiglu_limit": 3.0},
        {"swiglu_alpha": 1.0},
        {"rms_norm_eps": 1e-3},
        {"num_experts_per_tok": 1},
        {"a field of a later version": 0},
    ],
)
def test_the_hash_counts_the_configuration(copy, checkpoint, change):
    edit_json(copy / "config.json", lambda config: config.update(change))
    assert Checkpoint(str(copy)).sha256 != checkpoint.sha256


def test_the_hash_passes_over_what_transformers_writes_about_itself(copy, checkpoint):
    other = {"transformers_version": "4.55.0", "torch_dtype": "float32", "use_cache": False, "architectures": ["Other"]}
    other |= {"_name_or_path": "x", "router_aux_loss_coef": 0.5, "output_router_logits": True, "initializer_range": 1.0}
    other |= {"dtype": "float32"}
    assert set(other) == fingerprint.NOT_COUNTED
    edit_json(copy / "config.json", lambda config: config.update(other))
    assert Checkpoint(str(copy)).sha256 == checkpoint.sha256


def test_the_weight_map_counts(copy, checkpoint):
    """Two files may hold a tensor of one name: the index says which of them is read."""
    name = "model.norm.weight"
    index = json.loads((copy / INDEX).read_text())["weight_map"]
    other = next(file for file in sorted(set(index.values())) if file != index[name])
    save_file(load_file(copy / other) | {name: checkpoint.tensor(name) * 2}, copy / other)
    before = Checkpoint(str(copy))
    expected = before.sha256
    edit_json(copy / INDEX, lambda content: content["weight_map"].update({name: other}))
    after = Checkpoint(str(copy))
    assert not torch.equal(before.tensor(name), after.tensor(name)) and after.sha256 != expected


def test_another_process_is_handed_the_hashes(copy, monkeypatch):
    opened = Checkpoint(str(copy))
    expected = opened.sha256, opened.tokenizer_sha256
    sent = pickle.dumps(opened)
    monkeypatch.setattr(fingerprint, "model_sha256", lambda *a: pytest.fail("hashed again"))
    received = pickle.loads(sent)
    assert (received.sha256, received.tokenizer_sha256) == expected
    assert torch.equal(received.tensor("model.norm.weight"), opened.tensor("model.norm.weight"))


@pytest.fixture
def file(tmp_path):
    """A file that nobody has hashed."""
    path = tmp_path / "shard.safetensors"
    path.write_bytes(b"content" * 1000)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of hashes, empty; every file counts as settled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(fingerprint, "SETTLED_NS", -(10**18))
    return tmp_path / "home" / "eaftlib" / "sha256"


def true_hash(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def reads(monkeypatch):
    """Paths of the files whose bytes were read for a hash."""
    seen, sha256 = [], fingerprint.sha256
    monkeypatch.setattr(fingerprint, "sha256", lambda path: (seen.append(path), sha256(path))[1])
    return seen


def test_a_file_is_read_once_for_its_hash(file, cache, reads):
    assert [fingerprint.file_sha256(file) for _ in range(3)] == [true_hash(file)] * 3
    assert reads == [file] and len(list(cache.iterdir())) == 1


def test_another_name_for_the_same_file_knows_its_hash(file, cache, reads, tmp_path):
    (tmp_path / "link").symlink_to(file)
    assert fingerprint.file_sha256(file) == fingerprint.file_sha256(tmp_path / "link") and len(reads) == 1


def test_a_change_that_keeps_size_and_modification_time_is_seen(file, cache):
    before = file.stat()
    fingerprint.file_sha256(file)
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # until the clock has ticked
        with file.open("r+b") as out:
            out.write(b"C")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert fingerprint.file_sha256(file) == true_hash(file)


@pytest.mark.parametrize("fact", range(5))
def test_a_hash_is_used_only_if_every_fact_about_the_file_agrees(file, cache, reads, monkeypatch, fact):
    """Path, size, modification time, change time, inode."""
    facts = fingerprint._facts(file)
    fingerprint.file_sha256(file)
    changed = [f"{value}/x" if isinstance(value, str) else value + 1 for value in facts]
    other = [*facts[:fact], changed[fact], *facts[fact + 1 :]]
    (cache / true_entry(other)).write_bytes((cache / true_entry(facts)).read_bytes())
    monkeypatch.setattr(fingerprint, "_facts", lambda path: other)
    assert fingerprint.file_sha256(file) == true_hash(file) and len(reads) == 2


def true_entry(facts):
    return hashlib.sha256(facts[0].encode()).hexdigest()


@pytest.mark.parametrize("age, kept", [(0, False), (1_999_999_999, False), (2_000_000_000, True), (-1, False)])
@pytest.mark.parametrize("write", ["file_sha256", "remember"])
def test_a_file_that_has_just_changed_is_not_kept(file, tmp_path, monkeypatch, age, kept, write):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(fingerprint.time, "time_ns", lambda: file.stat().st_ctime_ns + age)
    fingerprint.file_sha256(file) if write == "file_sha256" else fingerprint.remember(file, true_hash(file))
    assert (tmp_path / "home").exists() == kept


def test_a_file_that_changes_while_it_is_read_has_no_hash(file, cache, monkeypatch):
    monkeypatch.setattr(fingerprint, "sha256", lambda path: path.write_bytes(b"other") and "0" * 64)
    with pytest.raises(CheckpointError, match=r"shard\.safetensors changed while it was read"):
        fingerprint.file_sha256(file)
    assert not cache.exists()


def test_no_damage_of_the_cache_gives_a_wrong_hash(file, cache):
    expected = fingerprint.file_sha256(file)
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    for position in range(len(whole)):
        for damaged in (
            whole[:position],
            whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :],
            whole[:position] + b"\xff" + whole[position + 1 :],
        ):
            entry.write_bytes(damaged)
            assert fingerprint.file_sha256(file) == expected, damaged
    assert entry.read_bytes() == whole


@pytest.mark.parametrize("broken", ["home", "home/eaftlib", "home/eaftlib/sha256", "entry"])
def test_a_cache_that_cannot_be_used_is_not_used(file, cache, tmp_path, broken):
    if broken == "entry":
        (cache / true_entry(fingerprint._facts(file))).mkdir(parents=True)
    else:
        (tmp_path / broken).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / broken).write_text("no folder")
    assert [fingerprint.file_sha256(file) for _ in range(2)] == [true_hash(file)] * 2


def test_many_at_once_agree_and_leave_one_entry(file, cache):
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(fingerprint.file_sha256, [file] * 100)) == {true_hash(file)}
    assert [entry.name for entry in cache.iterdir()] == [true_entry(fingerprint._facts(file))]


HUB_NAME = "ab" * 32  # not the content's hash: so it shows whether the content was read


@pytest.fixture
def snapshot(tmp_path):
    """A file as huggingface_hub keeps it; ``name``: the blob's, ``shared``: in the store that repositories share."""

    def link(name=HUB_NAME, shared=False):
        blob = tmp_path / "models--a--b" / "blobs" / name
        content = tmp_path / "blobs" / "cd" / ("cd" * 32) if shared else blob
        file = tmp_path / "models--a--b" / "snapshots" / ("0" * 40) / "model.safetensors"
        for path in (blob, content, file):
            path.parent.mkdir(parents=True, exist_ok=True)
        content.write_bytes(b"weights")
        if shared:
            blob.symlink_to("../../blobs/cd/" + "cd" * 32)
        file.symlink_to(f"../../blobs/{name}")
        return file

    return link


@pytest.mark.parametrize("shared", [False, True])
def test_the_hub_names_a_large_file_after_its_hash(snapshot, cache, reads, shared):
    assert fingerprint.file_sha256(snapshot(shared=shared)) == HUB_NAME and not reads


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_written_through_the_hubs_link_is_seen(snapshot, cache, shared):
    file = snapshot(shared=shared)
    while file.stat().st_mtime_ns <= file.lstat().st_mtime_ns:  # until the clock has ticked
        file.write_bytes(b"changed")
    assert file.is_symlink() and fingerprint.file_sha256(file) == true_hash(file)
    os.utime(file, ns=(0, 0))  # as if it had not been modified
    assert fingerprint.file_sha256(file) == true_hash(file)


def test_a_copied_cache_still_shows_what_was_written_through_the_link(snapshot, cache):
    """A copy that keeps the times of modification was made at one time: all else has changed then."""
    file = snapshot()
    os.utime(file, ns=(0, 0), follow_symlinks=False)
    assert file.stat().st_ctime_ns <= file.lstat().st_ctime_ns
    assert fingerprint.file_sha256(file) == true_hash(file)


def test_a_file_that_took_the_links_place_is_read(snapshot, cache):
    file = snapshot()
    file.unlink()
    file.write_bytes(b"changed")
    assert fingerprint.file_sha256(file) == true_hash(file)


def test_names_that_are_no_hash_of_the_content_are_not_taken_for_one(snapshot, cache, tmp_path):
    small = snapshot("0123456789" * 4)  # the git hash of a small file
    assert fingerprint.file_sha256(small) == true_hash(small)
    elsewhere = tmp_path / HUB_NAME
    elsewhere.write_bytes(b"x")
    (tmp_path / "link").symlink_to(elsewhere)
    assert fingerprint.file_sha256(tmp_path / "link") == true_hash(elsewhere)


def test_what_pruning_wrote_is_not_read_for_its_hash(checkpoint, tmp_path, cache, reads):
    folder = tmp_path / "pruned"
    prune(checkpoint, keep_all(checkpoint), folder, progress=False)
    reads.clear()
    expected = Checkpoint(str(folder)).sha256
    assert not reads
    shutil.rmtree(cache)
    assert Checkpoint(str(folder)).sha256 == expected and reads
    shard = next(folder.glob("*.safetensors"))
    with shard.open("r+b") as out:
        out.seek(-1, os.SEEK_END)
        out.write(b"\x01" if shard.read_bytes()[-1] == 0 else b"\x00")
    assert Checkpoint(str(folder)).sha256 != expected


def refused(folder, *words):
    with pytest.raises(CheckpointError) as error:
        Checkpoint(str(folder))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.999])
def test_a_truncated_shard_is_named(copy, share):
    shard = shard_of(copy, "model.norm.weight")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: int(len(whole) * share)])
    refused(copy, shard.name, "truncated or damaged")


def test_a_missing_shard_is_named(copy):
    shard = shard_of(copy, "model.norm.weight")
    count = list(json.loads((copy / INDEX).read_text())["weight_map"].values()).count(shard.name)
    shard.unlink()
    refused(copy, f"shard {shard.name} is missing ({count} tensors)")


def test_an_index_that_names_a_tensor_its_shard_lacks(copy):
    shard = shard_of(copy, "lm_head.weight")
    tensors = load_file(shard)
    del tensors["lm_head.weight"]
    save_file(tensors, shard)
    refused(copy, "'lm_head.weight'", shard.name, "does not hold it")


@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", "model.layers.2.mlp.router.bias", "model.layers.1.self_attn.sinks"]
    + [f"model.layers.3.mlp.experts.down_proj_{kind}" for kind in ("blocks", "scales", "bias")],
)
def test_a_tensor_missing_from_the_index_is_named(copy, name):
    edit_json(copy / INDEX, lambda index: index["weight_map"].pop(name))
    refused(copy, repr(name), "missing from the index")


@pytest.mark.parametrize(
    "name", ["mlp.router.weight", "mlp.router.bias", "mlp.experts.gate_up_proj_blocks", "mlp.experts.down_proj_bias"]
)
def test_a_wrong_first_dimension_is_named_with_both_shapes(copy, checkpoint, name):
    name = f"model.layers.1.{name}"
    tensor = checkpoint.tensor(name)
    replace_tensor(copy, name, tensor[:6].contiguous())
    refused(copy, repr(name), f"[6{', ' if tensor.dim() > 1 else ']'}", str(list(tensor.shape)), "num_local_experts 8")


def test_scales_that_do_not_fit_their_blocks_are_refused(copy, checkpoint):
    name = "model.layers.1.mlp.experts.down_proj_scales"
    replace_tensor(copy, name, checkpoint.tensor(name)[..., :-1].contiguous())
    refused(copy, repr(name))


def test_another_architecture_says_what_is_supported(copy):
    edit_json(copy / "config.json", lambda c: c.update(model_type="llama"))
    refused(copy, "'llama'", "supported", "gpt_oss", "openai/gpt-oss-20b")


def test_a_folder_without_config_or_weights_is_named(tmp_path, copy):
    refused(tmp_path, "has no config.json")
    for file in copy.glob("model*"):
        file.unlink()
    refused(copy, INDEX, "no weights")


@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_json_that_was_cut_short_is_named(copy, file):
    text = (copy / file).read_text()
    (copy / file).write_text(text[: len(text) // 2])
    refused(copy, file)


@pytest.mark.parametrize("model", ["/no/such/folder", "gpt-oss", "a/b/c"])
def test_neither_a_folder_nor_a_hub_id(model):
    refused(model, repr(model), "neither a folder nor an 'owner/name'")


def test_a_model_that_cannot_be_fetched_says_what_to_check():
    refused("nobody/no-such-model", "'nobody/no-such-model'", "could not be fetched", "HF_TOKEN")


def test_a_tokenizer_without_eos_is_refused(copy):
    edit_json(copy / "tokenizer_config.json", lambda c: c.pop("eos_token"))
    with pytest.raises(CheckpointError, match="EOS"):
        _ = Checkpoint(str(copy)).tokenizer


def test_a_missing_tokenizer_file_is_named(copy):
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        _ = Checkpoint(str(copy)).tokenizer_sha256
    with pytest.raises(CheckpointError, match="tokenizer"):
        _ = Checkpoint(str(copy)).tokenizer
