import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may touch the network

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported: they then run on the CPU, one program at a time

import world
from hypothesis import settings
from transformers import AutoModelForCausalLM

from eaftlib import devices
from eaftlib.checkpoint import Checkpoint
from eaftlib.packs import PackSource, pack_blocks


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


settings.register_profile("suite", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    return checkpoint.tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny random gpt-oss checkpoint in the published layout. Read only: tests that damage one copy it first."""
    return world.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny-gpt-oss")


@pytest.fixture(scope="session")
def checkpoint(model_folder):
    return Checkpoint(str(model_folder))


@pytest.fixture(scope="session")
def packs_folder(tmp_path_factory):
    return world.write_packs(tmp_path_factory.mktemp("packs"))


@pytest.fixture(scope="session")
def source(packs_folder):
    return PackSource(str(packs_folder))


@pytest.fixture(scope="session")
def blocks(source, tokenizer):
    """5 blocks of 40 tokens: above the sliding window of 16, no multiple of it."""
    return pack_blocks(source, "UNION", tokenizer, seq_len=40, num_blocks=5)


@pytest.fixture(scope="session")
def cpu():
    return devices.Placement(torch.device("cpu"), torch.float32, "tests")


@pytest.fixture(scope="session")
def hf_model(model_folder):
    """The same checkpoint as transformers loads and runs it, in float32 with eager attention."""
    return world.load_with_transformers(AutoModelForCausalLM, model_folder)
