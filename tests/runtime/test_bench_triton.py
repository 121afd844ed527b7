"""The Triton competitor's kernels in Triton's interpreter, against our reference.

The interpreter keeps bf16 as bits and multiplies those as integers: products of bf16 are replaced by those of the values.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("torch", reason="torch is not installed")

CODE = """
import sys
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

def f32(each):
    return (each.data.astype(np.uint32) << 16).view(np.float32) if each.dtype.scalar == tl.bfloat16 else each.data

def bf16(values):  # to nearest even
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

def dot(self, a, b, d, *options):
    return interpreter.TensorHandle(np.matmul(f32(a), f32(b), dtype=np.float32) + d.data, d.dtype.scalar)

def multiply(self, lhs, rhs):
    if lhs.dtype.scalar != tl.bfloat16:
        return plain_multiply(self, lhs, rhs)
    return interpreter.TensorHandle(bf16(f32(lhs) * f32(rhs)), lhs.dtype.scalar)

plain_multiply = interpreter.InterpreterBuilder.create_fmul
interpreter.InterpreterBuilder.create_dot = dot
interpreter.InterpreterBuilder.create_fmul = multiply

from densemoe.runtime.bench_competitors import Unavailable, Workload
from densemoe.runtime.bench_triton import Configuration, TritonMoe
from densemoe.runtime.tune_cases import Shape, route_tokens

moe = TritonMoe("cpu")
for shape, m, configuration in (
    (Shape("a", 5, 2, 128, 128), 7, Configuration(16, 64, 64, 4, 3, True)),
    (Shape("b", 3, 1, 256, 64), 40, Configuration(32, 64, 64, 4, 3)),
    (Shape("c", 4, 3, 128, 256), 9, Configuration(16, 128, 128, 4, 3)),
):
    work = Workload("layer", shape, m, [route_tokens(shape, m)])
    moe._take(shape)
    (rotation,) = moe._rotations(work)
    calls = {op: moe._bound(op, work, [rotation], configuration)[0] for op in ("fc1", "fc2")}
    middle = calls["fc1"](rotation.x)
    result = calls["fc2"](middle)
    for token in range(m):
        moe._compare("fc1", middle, moe.fc1_reference(shape, rotation, token), token * shape.top_k)
        moe._compare("fc2", result, moe.fc2_reference(shape, rotation, middle, token), token)
    try:
        moe._verify(work, rotation, {"fc2": lambda middle: result * 1.1})
    except Unavailable as error:
        assert "it does not compute the same layer" in str(error), error
    else:
        sys.exit("a wrong result was not seen")
print("as the reference")
"""


def test_the_kernels_compute_the_layer_in_the_interpreter() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "as the reference"
