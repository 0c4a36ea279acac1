"""Structural pruning: bytes, files and logits of the pruned checkpoint, and what is left after a failure: nothing."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import world
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eaftlib.engine import forward
from eaftlib.engine.backend import Backend
from eaftlib.engine.weights import Weights
from eaftlib.errors import CheckpointError
from eaftlib.model import writer
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.pruning import slicing
from eaftlib.pruning.keepsets import KeepSet
from eaftlib.pruning.slicing import checkpoint_sizes, keep_all, prune

INDEX = "model.safetensors.index.json"


def random_keep(keep_n=4, seed=0):
    rng = np.random.default_rng(seed)
    ids = [sorted(rng.permutation(world.EXPERTS)[:keep_n]) for _ in range(world.LAYERS)]
    return KeepSet(np.array(ids), world.EXPERTS, {"criterion": "reap", "ranking_sha256": "abc", "keep_n": keep_n})


@pytest.fixture(scope="module")
def keep():
    return random_keep()


@pytest.fixture(scope="module")
def pruned(checkpoint, keep, tmp_path_factory):
    """The pruned folder, written in several shards and with every decoding forbidden."""
    folder = tmp_path_factory.mktemp("pruned") / "half"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backend, "decode", None)
        patch.setattr(writer, "SHARD_BYTES", 100_000)
        prune(checkpoint, keep, folder, progress=False)
    return folder


def stored(folder):
    """name -> tensor of every shard that the index lists."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    shards = {file: load_file(folder / file) for file in set(weight_map.values())}
    assert sum(map(len, shards.values())) == len(weight_map)
    return {name: shards[file][name] for name, file in weight_map.items()}


def test_slices_equal_plain_indexing(model_folder, pruned, keep):
    before, after = stored(model_folder), stored(pruned)
    assert list(before) == list(after)
    for name, tensor in before.items():
        if ".router." in name or ".experts." in name:
            tensor = torch.stack([tensor[j] for j in keep.ids[int(name.split(".")[2])]])
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name


def test_logits_equal_the_original_with_masked_routers(pruned, keep, blocks, hf_model):
    small = world.load_with_transformers(AutoModelForCausalLM, pruned)
    hooks = world.mask_routers(hf_model, ~keep.mask)
    expected = world.logits(hf_model, blocks.tokens)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(world.logits(small, blocks.tokens), expected, rtol=1e-5, atol=1e-5)
    assert (expected - world.logits(hf_model, blocks.tokens)).abs().max() > 0.1


def test_the_pruned_checkpoint_scores_as_its_keep_set_does(checkpoint, pruned, keep, blocks, cpu):
    written = forward.score(Weights(Checkpoint(str(pruned)), cpu), blocks, progress=False).variants[0]
    masked = forward.score(Weights(checkpoint, cpu), blocks, keep_sets=[keep.mask], progress=False).variants[0]
    np.testing.assert_allclose(written.nll, masked.nll, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(written.entropy, masked.entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shard_bytes", [1, 50_000, 1 << 30])
def test_keep_all_reproduces_every_tensor_byte_for_byte(checkpoint, model_folder, tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr(writer, "SHARD_BYTES", shard_bytes)
    prune(checkpoint, keep_all(checkpoint), tmp_path / "all", progress=False)
    before, after = stored(model_folder), stored(tmp_path / "all")
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.shape == after[name].shape
        assert tensor.view(torch.uint8).numpy().tobytes() == after[name].view(torch.uint8).numpy().tobytes()
    assert world.read_config(tmp_path / "all") == world.read_config(model_folder)


def test_index_counts_the_bytes_and_every_shard(pruned):
    index = json.loads((pruned / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored(pruned).values())
    files = sorted(p.name for p in pruned.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert set(index["weight_map"].values()) == set(files)


def test_shards_stay_below_their_size_unless_one_tensor_exceeds_it(pruned):
    for file in pruned.glob("*.safetensors"):
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 100_000


def test_config_changes_only_the_expert_count(model_folder, pruned):
    assert world.read_config(pruned) == world.read_config(model_folder) | {"num_local_experts": 4}


def test_tokenizer_template_and_licence_come_along(model_folder, pruned):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "generation_config.json"):
        assert (pruned / name).read_bytes() == (model_folder / name).read_bytes()
    text = world.conversation(1)
    assert AutoTokenizer.from_pretrained(pruned)(text) == AutoTokenizer.from_pretrained(model_folder)(text)


def test_expert_mapping_gives_the_old_id_of_every_new_one(pruned, keep):
    mapping = json.loads((pruned / "expert_mapping.json").read_text())
    expected = {str(i): {str(new): int(old) for new, old in enumerate(ids)} for i, ids in enumerate(keep.ids)}
    assert mapping == expected


def test_manifest_holds_source_ranking_and_the_hash_of_every_file(checkpoint, pruned):
    manifest = json.loads((pruned / "prune_manifest.json").read_text())
    files = {p.name for p in pruned.iterdir()} - {"prune_manifest.json"}
    assert manifest["sha256"] == {n: hashlib.sha256((pruned / n).read_bytes()).hexdigest() for n in files}
    source = {"model_id": checkpoint.model_id, "revision": None, "model_sha256": checkpoint.sha256}
    assert manifest["source"] == source
    assert manifest["chosen_by"]["ranking_sha256"] == "abc"
    assert (manifest["num_experts_before"], manifest["num_experts_after"]) == (8, 4)


def test_pruning_a_pruned_checkpoint(pruned, keep, checkpoint, tmp_path):
    again = KeepSet(np.array([[0, 2]] * world.LAYERS), 4, {"criterion": "x"})
    prune(Checkpoint(str(pruned)), again, tmp_path / "twice", progress=False)
    name = "model.layers.2.mlp.experts.down_proj_blocks"
    assert torch.equal(stored(tmp_path / "twice")[name], checkpoint.tensor(name)[[keep.ids[2][0], keep.ids[2][2]]])


def test_sizes_are_counted_without_writing(checkpoint, pruned):
    tensors = stored(pruned)
    experts = sum(t.nbytes for name, t in tensors.items() if ".mlp." in name)
    assert checkpoint_sizes(checkpoint, 4) == slicing.Sizes(sum(t.nbytes for t in tensors.values()), experts)
    assert checkpoint_sizes(checkpoint).total == sum(checkpoint.tensor(n).nbytes for n in checkpoint.names)


@pytest.mark.parametrize("there", ["an empty folder", "a file", "a checkpoint"])
def test_nothing_is_overwritten(checkpoint, keep, tmp_path, there):
    target = tmp_path / "out"
    if there == "a file":
        target.write_text("precious")
    else:
        target.mkdir()
    if there == "a checkpoint":
        (target / "model.safetensors").write_text("precious")
    before = {p: p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=r"out exists already; pruning never overwrites"):
        prune(checkpoint, keep, target, progress=False)
    assert {p: p.read_text() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("out", ["out", "new/folders/out"])
def test_without_space_nothing_is_left_behind(checkpoint, keep, tmp_path, monkeypatch, out):
    size = checkpoint_sizes(checkpoint, 4).total
    monkeypatch.setattr(slicing.shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 1))
    with pytest.raises(CheckpointError, match=rf"GB free; the pruned checkpoint takes {size / 1e9:.2f} GB"):
        prune(checkpoint, keep, tmp_path / out, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_a_crash_at_the_second_shard_leaves_nothing_behind(checkpoint, keep, tmp_path, monkeypatch, failure):
    write_shard, written = writer._write_shard, []

    def failing(*args):
        if written:
            raise failure
        written.append(args)
        write_shard(*args)

    monkeypatch.setattr(writer, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(writer, "_write_shard", failing)
    with pytest.raises(type(failure)):
        prune(checkpoint, keep, tmp_path / "out", progress=False)
    assert written and list(tmp_path.iterdir()) == []


def test_a_damaged_source_leaves_nothing_behind(tmp_path, keep):
    """The checkpoint loses a shard after it was opened and verified."""
    folder = world.write_checkpoint(tmp_path / "m")
    opened = Checkpoint(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        prune(opened, keep, tmp_path / "out", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_new_tensors_are_written_beside_bytes_of_another_checkpoint(checkpoint, tmp_path):
    """A norm with new values, an expert tensor cut to two rows, one as it lies; in the order given, over two shards."""
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(world.HIDDEN, generator=generator).bfloat16()
    router, sinks = "model.layers.1.mlp.router.weight", "model.layers.0.self_attn.sinks"
    sources = {
        "model.norm.weight": writer.New(new[:]),
        router: writer.Stored(checkpoint.location(router), [1, 6]),
        sinks: writer.Stored(checkpoint.location(sinks)),
        "scale": writer.New(torch.arange(6.0).view(2, 3).T),  # rows and columns exchanged: not as it lies in memory
    }
    seen, files = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SHARD_BYTES", 300)
        writer.write_shards(tmp_path, sources, writer.Progress(seen.append, files.append))
    found = stored(tmp_path)
    assert list(found) == list(sources) and len(files) == 3 and sum(seen) == sum(s.nbytes for s in sources.values())
    assert torch.equal(found["model.norm.weight"], new) and torch.equal(found[sinks], checkpoint.tensor(sinks))
    assert torch.equal(found[router], checkpoint.tensor(router)[[1, 6]])
    assert torch.equal(found["scale"], torch.arange(6.0).view(2, 3).T)
