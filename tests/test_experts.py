"""The two ways of computing experts against each other and against transformers' loop."""

import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from eaftlib.engine import experts

TOKENS, EXPERTS, HIDDEN, INTERMEDIATE = 37, 8, 64, 96


@pytest.fixture(scope="module")
def module():
    config = GptOssConfig(
        num_local_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    module = GptOssExperts(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return module


@pytest.fixture(scope="module")
def routed():
    """Expert 0 and the last get no token, expert 1 gets every second one."""
    generator = torch.Generator().manual_seed(1)
    second = torch.randint(2, EXPERTS - 1, (TOKENS, 1), generator=generator)
    first = torch.where(torch.arange(TOKENS)[:, None] % 2 == 0, torch.ones_like(second), (second - 1) % 5 + 2)
    first = torch.where(first == second, torch.ones_like(second), first)
    return torch.randn(TOKENS, HIDDEN, generator=generator), torch.cat([first, second], 1), torch.rand(TOKENS, 2)


@pytest.mark.parametrize("compute", [experts.by_expert, experts.grouped])
@pytest.mark.parametrize("measure", [True, False])
def test_equal_to_transformers_loop(module, routed, compute, measure):
    hidden, ids, gates = routed
    expected = module(hidden, ids, gates)
    found, norm, peak = compute(module, hidden, ids, gates, measure)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if not measure:
        assert norm is None and peak is None
        return
    alone = [module(hidden, ids[:, k : k + 1], torch.ones(TOKENS, 1)) for k in range(2)]  # f_j(x) of one expert each
    torch.testing.assert_close(norm, torch.stack([y.norm(dim=-1) for y in alone], 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(peak, torch.stack([y.abs().amax(-1) for y in alone], 1), rtol=1e-4, atol=1e-4)


def test_gradients_of_grouped_products_are_autograds(module, routed):
    """For what recovery trains: hidden states, router weights, both biases; through transformers' own loop."""
    hidden, ids, gates = routed
    biases = ("gate_up_proj_bias", "down_proj_bias")
    arriving = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    found = []
    for compute in (lambda *a: module(*a), lambda *a: experts.grouped(module, *a, False)[0]):
        leaves = [x.clone().requires_grad_() for x in (hidden, gates)]
        for name in biases:
            getattr(module, name).requires_grad_(True)
        value = compute(leaves[0], ids, leaves[1])
        found.append(torch.autograd.grad(value, [*leaves, *(getattr(module, n) for n in biases)], arriving))
        module.requires_grad_(False)
    for expected, gradient in zip(*found, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
    assert not found[1][2][0].any() and not found[1][3][-1].any()  # experts without a token


def test_a_probe_writes_its_rows_of_its_layer(module, routed):
    hidden, ids, gates = routed
    trace = experts.ExpertTrace.empty(2, 10, 2, EXPERTS, torch.device("cpu"))
    rows = torch.tensor([3, 4, 30])
    module.probe = experts.ExpertProbe(trace, 1, 5, rows)
    experts.measured(experts.by_expert)(module, hidden, ids, gates)
    module.probe = None
    _, norm, peak = experts.by_expert(module, hidden, ids, gates, True)
    for found, expected in zip(trace.tensors, (ids, gates, norm, peak), strict=True):
        assert torch.equal(found[1, 5:8], expected[rows].to(found.dtype))
        assert not found[0].any() and not found[1, :5].any() and not found[1, 8:].any()
