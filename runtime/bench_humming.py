"""Humming (``humming-kernels``) as a competitor: NVFP4 weights, bf16 activations, its indexed GEMM. Needs torch, and nvcc beside the device.

    ModelOpt's tensors (codes, e4m3 scales, one f32 an expert) ── prepare_and_transform_humming_tensors ──► its layout
    its heuristic's configurations for these rows and for fewer and more ── prepare_kernels ──► the fastest that agrees
    FC1 GEMM ─► its process_input (SwiGLU) ─► FC2 GEMM ─► router's weights and the sum over a token's experts, in torch

Written against 0.1.19 and 0.1.20. What its heuristic takes for an eighth to eight times as many rows is tried too, at each op, shape and M: it was
measured by those who wrote the kernels, and may have other borders here. DENSEMOE_BENCH_HUMMING_CONFIGURATIONS adds as many of what its own tuning
tests sample (default 0: to enumerate them takes Humming minutes of Python a shape, and few of them are good), each compiled when it is first met.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from densemoe.runtime.bench_competitors import Unavailable
from densemoe.runtime.bench_nvfp4 import Nvfp4Competitor, Plain, Rotation, aligned
from densemoe.runtime.nvfp4 import GROUP
from densemoe.runtime.tune_cases import Shape

__all__ = ["Humming", "Own"]

SAMPLE: Final = 0
FACTORS: Final = (1.0, 0.125, 0.25, 0.5, 2.0, 4.0, 8.0)  # of the rows, the heuristic's choice for which is tried
VARIABLE: Final = "DENSEMOE_BENCH_HUMMING_CONFIGURATIONS"
LOCKS: Final = 2048  # int32 words that its stream-K GEMM synchronises through, as many as its own layer has
SWIGLU: Final = "a / (1.f + __expf(-a)) * b"  # of the first half of a row, the gate, and the second


@dataclass
class Own:
    """An op's weights in Humming's layout: its LayerConfig, and its kernels' tensors by name."""

    config: Any
    tensors: dict[str, Any]


@dataclass(frozen=True)
class Tuning:
    """A TuningConfig's values, hashable."""

    values: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, values: dict[str, Any]) -> Tuning:
        """From a dictionary; lists become tuples."""
        return cls(tuple(sorted((name, tuple(value) if isinstance(value, list) else value) for name, value in values.items())))

    def __getitem__(self, name: str) -> Any:
        return dict(self.values)[name]


class Humming(Nvfp4Competitor):
    """Its GEMMs, activation and search."""

    name = "Humming"

    def __init__(self, device: str = "cuda") -> None:
        super().__init__(device)
        self.humming = importlib.import_module("humming.ops")
        self._config, self._schema, self._transform = (importlib.import_module(f"humming.{name}") for name in ("config", "schema", "transform"))
        self._dtypes, self._tune = importlib.import_module("humming.dtypes"), importlib.import_module("humming.tune")
        self._kernel = importlib.import_module("humming.kernel.humming").HummingKernel
        self._together: set[str] = set()  # layers whose kernels were compiled together

    def convert(self, op: str, shape: Shape, plain: Plain) -> Own:
        """Its transformation of ModelOpt's tensors."""
        config, torch = self._config, self.torch
        schema = self._schema.HummingWeightSchema(
            b_dtype=self._dtypes.float4e2m1,
            bs_dtype=self._dtypes.float8e4m3,
            weight_scale_group_size=GROUP,
            weight_scale_type=config.WeightScaleType.GROUP,
            weight_scale_2_type=config.WeightScale2Type.TENSOR,
        )
        experts, n, half = plain.codes.shape
        tensors = {
            "weight": plain.codes.view(torch.int32),
            "weight_scale": plain.scales.view(torch.float8_e4m3fn),
            "weight_scale_2": plain.alpha.clone(),
        }
        own, made = self._transform.prepare_and_transform_humming_tensors(
            tensors, shape_n=n, shape_k=2 * half, weight_schema=schema, num_experts=experts, torch_dtype=torch.bfloat16
        )
        return Own(own, made)

    def copied(self, own: Own) -> Own:
        """The same in other memory."""
        return Own(own.config, {name: tensor.clone() for name, tensor in own.tensors.items()})

    @property
    def _compute(self) -> Any:
        return self._config.ComputeConfig(gemm_type=self._config.GemmType.INDEXED)

    def configurations(self, op: str, shape: Shape, m: int) -> Sequence[Hashable]:
        """Its heuristic's choices, that for these rows first, then a sample of what its own tuning tests enumerate; the same every time."""
        text = os.environ.get(VARIABLE, str(SAMPLE))
        if not text.isdigit():
            raise Unavailable(f"{VARIABLE}={text!r}: use a number of configurations, 0 for Humming's own choices alone")
        own, rows = self._own[op][0], m * shape.top_k
        config = own.config
        if config.to_str() not in self._together:
            self._compile_together(config, f"{self.name} {op} {shape.name}")
        found = [self.own_choice(own, max(1, round(factor * rows))) for factor in FACTORS]
        if int(text):
            tuning = importlib.import_module("humming.testing.tuning")
            found += [Tuning.of(each) for each in tuning.sample_test_tuning_configs(config, self._compute, sample_size=int(text))]
        return list(dict.fromkeys(found))

    def _compile_together(self, config: Any, what: str) -> None:
        """What its heuristic takes for any number of rows, in as many threads as it likes: one by one, when each is first met, they take minutes. One
        that does not compile is met again, and left out, when it is tried."""
        self._together.add(config.to_str())
        self.say(f"{what}: compiles what its heuristic takes for any number of rows")
        every = self._tune.get_heuristics_config(config, gemm_type=self._config.GemmType.INDEXED)
        try:
            self._kernel.prepare_kernels(config.to_str(), self._compute.to_str(), every)
        except Exception as error:  # of another's compiler
            self.say(f"{what}: {type(error).__name__}: {error}")

    def own_choice(self, own: Own, rows: int) -> Tuning:
        """Its heuristic's configuration for so many rows."""
        return Tuning.of(self._tune.get_heuristics_config(own.config, shape_m=rows, gemm_type=self._config.GemmType.INDEXED))

    def bind(self, op: str, shape: Shape, own: Own, rotation: Rotation, configuration: Tuning) -> Callable[[Any], Any]:
        """The GEMM over sorted blocks of rows, and what makes it the op: SwiGLU, or the router's weights and the sum."""
        torch, device = self.torch, self.device
        sorted_pairs = aligned(rotation.routing, shape.experts, configuration["block_shape"][0])
        pairs = len(rotation.routing) * shape.top_k
        out = torch.empty(pairs, 2 * shape.intermediate if op == "fc1" else shape.hidden, dtype=torch.bfloat16, device=device)
        launch = {
            "configs": self._prepared(own, configuration),
            "sorted_ids": torch.from_numpy(sorted_pairs.ids).to(device),
            "expert_ids": torch.from_numpy(sorted_pairs.experts).to(device),
            "num_tokens_padded": torch.tensor(len(sorted_pairs.ids), dtype=torch.int32, device=device),
            "locks": torch.zeros(LOCKS, dtype=torch.int32, device=device),
            "top_k": shape.top_k if op == "fc1" else 1,  # rows of FC2 are pairs already
            "outputs": out,
            **own.tensors,
        }
        if op == "fc1":
            middle = torch.empty(pairs, shape.intermediate, dtype=torch.bfloat16, device=device)

            def fc1(x: Any) -> Any:
                self.humming.launch_kernel(inputs=x, **launch)
                self.humming.process_input(out, outputs=middle, activation_type="binary_split", activation_impl=SWIGLU)
                return middle

            return fc1
        router = rotation.router.to(torch.bfloat16)[:, None]

        def fc2(x: Any) -> Any:
            self.humming.launch_kernel(inputs=x, **launch)
            return torch.bmm(router, out.view(len(rotation.routing), shape.top_k, shape.hidden))[:, 0]

        return fc2

    def _prepared(self, own: Own, configuration: Tuning) -> Any:
        """Its compiled kernel: what launches take as ``configs``."""
        rows = [(0, 1 << 30, dict(configuration.values))]
        return self._kernel.prepare_kernels(own.config.to_str(), self._compute.to_str(), rows)
