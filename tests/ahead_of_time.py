"""Compile, without a GPU, every Triton kernel that float16 runs launch on Turing, as they launch it at gpt-oss's shape.

    python tests/ahead_of_time.py

Prints JSON: kernel -> compute capability -> bytes of shared memory. A process of its own: the tests of numbers interpret
kernels.
"""

import json
from functools import partial

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from eaftlib.kernels.fused import divergence, expert_activation, expert_combination, mxfp4, rotary, token_statistics

CAPABILITIES = (75, 80, 89, 90)
HIDDEN, VOCAB, EXPERTS, HALF = 2880, 201_088, 32, torch.float16
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


def launch_all() -> None:
    zeros, one_byte = torch.zeros, partial(torch.zeros, dtype=torch.uint8)
    mxfp4.decode(one_byte(2, 64, 90, 16), one_byte(2, 64, 90), HALF)
    mxfp4.decode(one_byte(2, 64, 90, 16), one_byte(2, 64, 90), torch.float32)
    expert_activation.activate(zeros(8, 2 * HIDDEN), zeros(EXPERTS, 2 * HIDDEN), one_byte(8), 7.0, 1.702, HALF)
    rows, ids = torch.arange(8).view(2, 4), zeros(2, 4, dtype=torch.int64)
    for measure in (False, True):
        expert_combination.combine(zeros(8, HIDDEN), rows, ids, zeros(2, 4), zeros(EXPERTS, HIDDEN), measure)
    rotary.rotate(zeros(1, 2, 64, 64), zeros(1, 2, 8, 64), zeros(2, 32), zeros(2, 32))
    token_statistics.token_statistics(zeros(2, VOCAB), torch.zeros(2, dtype=torch.int64), 20)
    divergence.Reference(zeros(2, VOCAB)).compare(zeros(2, VOCAB))


def compiled(launches: list[tuple[JITFunction, tuple, dict]]) -> dict[str, dict[int, int]]:
    found: dict[str, dict[int, int]] = {}
    for kernel, given, options in launches:
        by_name = dict(zip(kernel.arg_names, given, strict=False)) | options
        fixed = {p.name: by_name[p.name] for p in kernel.params if p.is_constexpr}
        signature = {name: "constexpr" if name in fixed else type_of(by_name[name]) for name in kernel.arg_names}
        sizes = found.setdefault(kernel.fn.__name__.lstrip("_"), {})
        for capability in CAPABILITIES:
            source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
            target = GPUTarget("cuda", capability, 32)
            program = triton.compile(source, target=target, options={"num_warps": options["num_warps"]})
            sizes[capability] = max(program.metadata.shared, sizes.get(capability, 0))
    return found


def type_of(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "i32" if isinstance(value, int) else "fp32"


if __name__ == "__main__":
    launches = []
    JITFunction.run = lambda self, *given, grid, warmup, **options: launches.append((self, given, options))
    launch_all()
    print(json.dumps(compiled(launches)))
