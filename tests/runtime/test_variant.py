"""Keys and Variants are two spellings of one thing."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from densemoe.runtime.errors import VariantError
from densemoe.runtime.problem import Problem
from densemoe.runtime.rules import can_implement, check_legal
from densemoe.runtime.variant import A_DTYPES, ARCHITECTURES, C_DTYPES, OPS, Variant

BASE = Variant.parse("fc1.sm100f.t128x256.c1x2.nvfp4-nvfp4.post")


@st.composite
def variants(draw: st.DrawFn) -> Variant:
    op = draw(st.sampled_from(OPS))
    sizes = st.integers(1, 512)
    return Variant.make(
        op=op,
        arch=draw(st.sampled_from(list(ARCHITECTURES))),
        tile_m=draw(sizes),
        tile_n=draw(sizes),
        cluster_m=draw(sizes),
        cluster_n=draw(sizes),
        a_dtype=draw(st.sampled_from(A_DTYPES)),
        c_dtype=draw(st.sampled_from(C_DTYPES[op])),
        options=draw(st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.integers(0, 9), max_size=4)),
    )


@given(variants())
def test_key_round_trips(variant: Variant) -> None:
    assert Variant.parse(variant.key) == variant


@given(variants())
def test_symbol_is_an_identifier_without_the_word_that_changes_ptxas(variant: Variant) -> None:
    assert variant.symbol.isidentifier()
    assert "cutlass" not in variant.symbol


def test_every_parameter_changes_the_key() -> None:
    changed = {
        "op": ("fc2", {"c_dtype": "bf16"}),
        "arch": ("sm_100a", {}),
        "tile_m": (256, {}),
        "tile_n": (128, {}),
        "cluster_m": (2, {}),
        "cluster_n": (4, {}),
        "a_dtype": ("bf16", {}),
        "c_dtype": ("f16", {}),
        "options": ((("post", 1), ("stages", 5)), {}),
    }
    fields = {field.name for field in dataclasses.fields(Variant)} - {"b_dtype"}  # one allowed value
    assert set(changed) == fields
    keys = [BASE.key, *(dataclasses.replace(BASE, **{name: value}, **others).key for name, (value, others) in changed.items())]
    assert len(set(keys)) == len(keys)
    symbols = [Variant.parse(key).symbol for key in keys]
    assert len(set(symbols)) == len(symbols)


def test_distinct_variants_have_distinct_symbols() -> None:
    some = [
        Variant.make(op="fc2", arch=arch, tile_m=m, tile_n=n, cluster_m=1, cluster_n=c, a_dtype=a, c_dtype=o, options=options)
        for arch, m, n, c, a, o, options in itertools.product(
            ARCHITECTURES, (1, 11), (1, 11), (1, 2), A_DTYPES, C_DTYPES["fc2"], ({}, {"x": 1}, {"x": 2}, {"y": 12})
        )
    ]
    assert len({each.symbol for each in some}) == len(some)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("fc3.sm90a.t8x64.c1x1.bf16-bf16", "fc1, fc2"),
        ("fc1.sm91a.t8x64.c1x1.bf16-bf16", "sm_90a"),
        ("fc1.sm90a.t8x64.c1x1.bf16-int8", "nvfp4"),
        ("fc1.sm90a.t08x64.c1x1.bf16-bf16", "does not parse"),
        ("fc1.sm90a.t8x64.c1x1.bf16-bf16.b.a", "alphabetical"),
        ("fc1.sm90a.t8x64.c1x1.bf16-bf16.a1", "canonical"),
        ("../../etc/passwd", "does not parse"),
        ("", "does not parse"),
    ],
)
def test_bad_keys_say_what_is_allowed(key: str, said: str) -> None:
    with pytest.raises(VariantError, match=said):
        Variant.parse(key)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("fc1.sm100f.t128x64.c1x1.nvfp4-nvfp4", "at least 128"),
        ("fc1.sm100f.t128x128.c2x1.nvfp4-nvfp4", "pairs of CTAs"),
        ("fc1.sm100f.t256x128.c1x1.nvfp4-nvfp4", "pairs of CTAs"),
        ("fc1.sm100f.t128x128.c1x3.nvfp4-nvfp4", "1, 2 or 4"),
        ("fc1.sm100f.t128x128.c1x8.nvfp4-nvfp4", "1, 2 or 4"),
        ("fc2.sm100f.t128x128.c1x1.bf16-bf16", "nvfp4 activations"),
    ],
)
def test_illegal_variants_have_each_their_reason(key: str, said: str) -> None:
    with pytest.raises(VariantError, match=said):
        check_legal(Variant.parse(key))


@pytest.mark.parametrize(
    ("key", "problem", "said"),
    [
        ("fc1.sm90a.t8x64.c1x1.bf16-bf16", Problem("fc2", 1, 1, 64, 64), "fc1 kernel"),
        ("fc1.sm90a.t8x64.c1x1.bf16-bf16", Problem("fc1", 1, 1, 64, 64, "nvfp4"), "reads bf16"),
        ("fc1.sm90a.t8x64.c1x1.bf16-bf16", Problem("fc1", 1, 1, 64, 64, "bf16", "f32"), "writes bf16"),
        ("fc1.sm100f.t128x256.c1x1.nvfp4-nvfp4", Problem("fc1", 1, 1, 64, 704, "nvfp4", "nvfp4"), "not a multiple of its tile_n"),
        ("fc2.sm100f.t128x128.c1x1.nvfp4-bf16", Problem("fc2", 1, 2, 64, 128, "nvfp4"), "I = 128 on this rank"),
        ("fc2.sm90a.t8x64.c1x1.bf16-bf16", Problem("fc2", 2**31 - 1, 1, 64 * 1024, 64), "split M"),
    ],
)
def test_can_implement_gives_the_rule(key: str, problem: Problem, said: str) -> None:
    accepted, reason = can_implement(Variant.parse(key), problem)
    assert not accepted
    assert said in reason


def test_can_implement_accepts_padded_clusters_and_any_m() -> None:
    variant = Variant.parse("fc1.sm100f.t128x128.c1x4.nvfp4-nvfp4")
    for m in (0, 1, 127, 129, 511):
        assert can_implement(variant, Problem("fc1", m, 1, 2048, 1408, "nvfp4", "nvfp4")) == (True, "")
