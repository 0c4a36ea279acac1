"""Opening a checkpoint: what it reads equals what transformers loads, and damage is named before any work."""

import json
import shutil

import pytest
import torch
import world
from safetensors.torch import load_file, save_file

from eaftlib.errors import CheckpointError
from eaftlib.model.checkpoint import Checkpoint, is_expert_tensor

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


def test_layers_equal_those_that_transformers_loads(checkpoint, hf_model):
    for index, expected in enumerate(hf_model.model.layers):
        found = checkpoint.layer(index, torch.device("cpu"), torch.float32).state_dict()
        assert found.keys() == expected.state_dict().keys()
        for name, tensor in expected.state_dict().items():
            assert torch.equal(found[name], tensor), name


def test_embedding_head_and_norm_equal_those_that_transformers_loads(checkpoint, hf_model):
    place = (torch.device("cpu"), torch.float32)
    assert torch.equal(checkpoint.embedding(*place), hf_model.model.embed_tokens.weight)
    assert torch.equal(checkpoint.lm_head(*place), hf_model.lm_head.weight)
    assert torch.equal(checkpoint.final_norm(*place).weight, hf_model.model.norm.weight)


def test_a_checkpoint_in_one_file_holds_the_same_tensors(tmp_path, checkpoint):
    folder = world.write_checkpoint(tmp_path / "m", shards=1)
    (folder / "model-00000-of-00001.safetensors").rename(folder / "model.safetensors")
    (folder / INDEX).unlink()
    single = Checkpoint(str(folder))
    for name in checkpoint.names:
        assert torch.equal(single.tensor(name), checkpoint.tensor(name))


def test_dim_0_counts_experts_in_routers_and_experts_only(checkpoint):
    counted = {name for name in checkpoint.names if is_expert_tensor(name)}
    parts = ["router.weight", "router.bias"]
    parts += [f"experts.{p}_proj_{kind}" for p in ("gate_up", "down") for kind in ("blocks", "scales", "bias")]
    assert counted == {f"model.layers.{i}.mlp.{part}" for i in range(world.LAYERS) for part in parts}


@pytest.mark.parametrize("part", ["router.weight", "router.bias"])
def test_the_hash_tells_routers_apart(copy, checkpoint, part):
    name = f"model.layers.3.mlp.{part}"
    tensor = checkpoint.tensor(name).clone()
    tensor.view(-1)[-1] += 1
    assert Checkpoint(str(copy)).sha256 == checkpoint.sha256
    replace_tensor(copy, name, tensor)
    assert Checkpoint(str(copy)).sha256 != checkpoint.sha256


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
