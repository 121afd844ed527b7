"""build_matrix.yaml → Variants. Every error says file:line:column, what was given and what is allowed.

An entry is a product of axes for one kernel module; ``exclude`` rules take combinations out, ``include`` rules name the only ones that stay.
A profile is a selection over all entries and states how many variants it must give, so that an edit which changes the number is seen.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from densemoe.compile import kernels
from densemoe.compile.audit import Allowance
from densemoe.runtime.errors import MatrixError, VariantError
from densemoe.runtime.rules import check_legal
from densemoe.runtime.variant import A_DTYPES_OF, ALL_OPS, ARCHITECTURES, B_DTYPES, C_DTYPES, Variant

__all__ = ["DEFAULT_MATRIX", "Matrix", "Planned", "load"]

DEFAULT_MATRIX: Final = Path(__file__).resolve().parent.parent / "build_matrix.yaml"
SCHEMA: Final = 1
AXES: Final = ("arch", "tile", "cluster", "a_dtype", "b_dtype", "c_dtype")
_PAIR = re.compile(r"([1-9][0-9]*)x([1-9][0-9]*)")


@dataclass(frozen=True)
class Planned:
    """A variant to build.

    Attributes:
        kernel: name of its kernel module.
        compiler_options: further options of the compiler.
        allowance: spilling that the matrix allows, with its reason.
    """

    variant: Variant
    kernel: str
    compiler_options: str = ""
    allowance: Allowance = field(default_factory=Allowance)


@dataclass(frozen=True)
class Matrix:
    """An expanded matrix: every profile's variants in key order, by profile name."""

    path: Path
    profiles: Mapping[str, tuple[Planned, ...]]

    def profile(self, name: str) -> tuple[Planned, ...]:
        """The variants of one profile. Raises MatrixError where there is no such profile."""
        if name not in self.profiles:
            raise MatrixError(f"{self.path}: profile {name!r} does not exist: use one of {', '.join(self.profiles)}{_hint(name, self.profiles)}")
        return self.profiles[name]


def _hint(given: str, allowed: Sequence[str] | Mapping[str, object]) -> str:
    close = difflib.get_close_matches(given, list(allowed), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


class _Reader:
    """Typed access to YAML nodes; knows where each stands."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, node: yaml.Node, message: str) -> MatrixError:
        mark = node.start_mark
        return MatrixError(f"{self.path}:{mark.line + 1}:{mark.column + 1}: {message}")

    def mapping(self, node: yaml.Node, allowed: Sequence[str], required: Sequence[str] = ()) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise self.fail(node, f"a mapping belongs here, with the keys {', '.join(allowed)}")
        result: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            key = self.scalar(key_node)
            if key not in allowed:
                raise self.fail(key_node, f"unknown key {key!r}: use one of {', '.join(allowed)}{_hint(key, allowed)}")
            if key in result:
                raise self.fail(key_node, f"key {key!r} stands twice: write it once")
            result[key] = value
        for name in required:
            if name not in result:
                raise self.fail(node, f"key {name!r} is missing")
        return result

    def scalar(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self.fail(node, "a single value belongs here")
        return str(node.value)

    def integer(self, node: yaml.Node) -> int:
        text = self.scalar(node)
        if not re.fullmatch(r"[0-9]+", text):
            raise self.fail(node, f"{text!r} is no integer: write digits alone")
        return int(text)

    def items(self, node: yaml.Node) -> list[yaml.Node]:
        return list(node.value) if isinstance(node, yaml.SequenceNode) else [node]

    def axis(self, name: str, node: yaml.Node, allowed: Sequence[str] | None, *, may_be_empty: bool = False) -> list[str]:
        values: list[str] = []
        for item in self.items(node):
            value = self.scalar(item)
            if allowed is not None and value not in allowed:
                raise self.fail(item, f"{name}={value!r}: use one of {', '.join(allowed)}{_hint(value, allowed)}")
            if allowed is None and not _PAIR.fullmatch(value):
                raise self.fail(item, f"{name}={value!r}: write two positive integers, as in 8x64")
            if value in values:
                raise self.fail(item, f"{name}={value!r} stands twice: write it once")
            values.append(value)
        if not values and not may_be_empty:
            raise self.fail(node, f"{name} has no value: it would give no variant")
        return values


def _allowed(axis: str, op: str) -> Sequence[str] | None:
    return {
        "arch": tuple(ARCHITECTURES),
        "tile": None,
        "cluster": None,
        "a_dtype": A_DTYPES_OF[op],
        "b_dtype": B_DTYPES,
        "c_dtype": C_DTYPES[op],
        "op": ALL_OPS,
    }[axis]


def load(path: Path = DEFAULT_MATRIX) -> Matrix:
    """Reads and expands a matrix.

    Raises:
        MatrixError: the file is missing, is no YAML, or says something that is not allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise MatrixError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line, column = before.count(b"\n") + 1, len(before) - (before.rfind(b"\n") + 1) + 1
        raise MatrixError(f"{path}:{line}:{column}: byte 0x{error.object[error.start]:02x}: not UTF-8: save the file as UTF-8") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise MatrixError(f"{path}{where}: not YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        line, column = text.count("\n", 0, error.position) + 1, error.position - text.rfind("\n", 0, error.position)
        raise MatrixError(f"{path}:{line}:{column}: not YAML: character {chr(error.character)!r} may not stand in it") from None
    except RecursionError:
        raise MatrixError(f"{path}:1:1: not a matrix: it is nested too deeply") from None
    reader = _Reader(path)
    if root is None:
        raise MatrixError(f"{path}:1:1: the file is empty: it needs schema, entries and profiles")
    top = reader.mapping(root, ("schema", "entries", "profiles"), ("schema", "entries", "profiles"))
    if reader.integer(top["schema"]) != SCHEMA:
        raise reader.fail(top["schema"], f"schema {reader.scalar(top['schema'])}: this densemoe reads schema {SCHEMA}")
    planned: dict[str, Planned] = {}
    for node in reader.items(top["entries"]):
        for each in _expand(reader, node):
            if each.variant.key in planned:
                raise reader.fail(node, f"variant {each.variant.key} is already in the matrix: take it out of one entry")
            planned[each.variant.key] = each
    ordered = tuple(planned[key] for key in sorted(planned))
    if not isinstance(top["profiles"], yaml.MappingNode) or not top["profiles"].value:
        raise reader.fail(top["profiles"], "profiles are a mapping of name to {variants, select}")
    profiles: dict[str, tuple[Planned, ...]] = {}
    for key_node, node in top["profiles"].value:
        name = reader.scalar(key_node)
        if name in profiles:
            raise reader.fail(key_node, f"profile {name!r} stands twice: write it once")
        profiles[name] = _profile(reader, name, node, ordered)
    return Matrix(path, profiles)


def _expand(reader: _Reader, node: yaml.Node) -> Iterator[Planned]:
    fields = reader.mapping(
        node, ("kernel", "op", *AXES, "options", "exclude", "include", "compiler_options", "spills"), ("kernel", "op", *AXES)
    )
    op = _op(reader, fields["op"])
    kernel = reader.scalar(fields["kernel"])
    if kernel not in kernels.names():
        raise reader.fail(fields["kernel"], f"kernel {kernel!r}: use one of {', '.join(kernels.names())}{_hint(kernel, kernels.names())}")
    axes = {name: reader.axis(name, fields[name], _allowed(name, op)) for name in AXES}
    options = _options(reader, fields.get("options"))
    exclude = [_rule(reader, rule, op, axes, options) for rule in reader.items(fields["exclude"])] if "exclude" in fields else []
    include = [_rule(reader, rule, op, axes, options) for rule in reader.items(fields["include"])] if "include" in fields else []
    spills = _spills(reader, fields.get("spills"))
    compiler_options = reader.scalar(fields["compiler_options"]) if "compiler_options" in fields else ""
    names = [*axes, *options]
    count = 0
    for values in itertools.product(*axes.values(), *options.values()):
        point = dict(zip(names, values, strict=True))
        if any(_matches(rule, point) for rule in exclude) or (include and not any(_matches(rule, point) for rule in include)):
            continue
        variant = _variant(reader, fields, op, kernel, point, tuple(options))
        yield Planned(variant, kernel, compiler_options, spills.pop(variant.key, Allowance()))
        count += 1
    if not count:
        raise reader.fail(node, "this entry gives no variant: its include and exclude rules leave nothing")
    if spills:
        raise reader.fail(fields["spills"], f"spills names {', '.join(spills)}, which this entry does not give")


def _op(reader: _Reader, node: yaml.Node) -> str:
    values = reader.axis("op", node, ALL_OPS)
    if len(values) != 1:
        raise reader.fail(node, f"op={', '.join(values)}: an entry or a rule has one op; write one for each")
    return values[0]


def _variant(reader: _Reader, fields: Mapping[str, yaml.Node], op: str, kernel: str, point: Mapping[str, str], options: Sequence[str]) -> Variant:
    tile_m, tile_n = (int(part) for part in point["tile"].split("x"))
    cluster_m, cluster_n = (int(part) for part in point["cluster"].split("x"))
    try:
        variant = Variant.make(
            op=op,
            arch=point["arch"],
            tile_m=tile_m,
            tile_n=tile_n,
            cluster_m=cluster_m,
            cluster_n=cluster_n,
            a_dtype=point["a_dtype"],
            b_dtype=point["b_dtype"],
            c_dtype=point["c_dtype"],
            options={name: int(point[name]) for name in options},
        )
        check_legal(variant)
        kernels.check(kernel, variant)
    except VariantError as error:
        message = str(error)
        at = next((name for name in ("tile", "cluster", "arch") if message.startswith(name)), "options" if options else "kernel")
        raise reader.fail(_node_of(reader, fields.get(at, fields["kernel"]), point.get(at, "")), message) from None
    return variant


def _node_of(reader: _Reader, node: yaml.Node, value: str) -> yaml.Node:
    """The item of an axis that spells ``value``, or the axis."""
    return next((item for item in reader.items(node) if isinstance(item, yaml.ScalarNode) and item.value == value), node)


def _options(reader: _Reader, node: yaml.Node | None) -> dict[str, list[str]]:
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise reader.fail(node, "options are a mapping of name to values")
    options: dict[str, list[str]] = {}
    for key, value in node.value:
        name = reader.scalar(key)
        if name in options:
            raise reader.fail(key, f"option {name!r} stands twice: write it once")
        options[name] = []
        for item in reader.items(value):
            number = str(reader.integer(item))
            if number in options[name]:
                raise reader.fail(item, f"{name}={number} stands twice: write it once")
            options[name].append(number)
        if not options[name]:
            raise reader.fail(value, f"{name} has no value: it would give no variant")
    return options


def _spills(reader: _Reader, node: yaml.Node | None) -> dict[str, Allowance]:
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise reader.fail(node, "spills are a mapping of variant key to {stack_bytes, reason}")
    result = {}
    for key, value in node.value:
        fields = reader.mapping(value, ("stack_bytes", "reason"), ("stack_bytes", "reason"))
        if not reader.scalar(fields["reason"]).strip():
            raise reader.fail(fields["reason"], "an allowance needs its reason in words")
        result[reader.scalar(key)] = Allowance(reader.integer(fields["stack_bytes"]), reader.scalar(fields["reason"]))
    return result


_Rule = Mapping[str, Sequence[str]]


def _rule(reader: _Reader, node: yaml.Node, op: str, axes: Mapping[str, Sequence[str]], options: Mapping[str, Sequence[str]]) -> _Rule:
    fields = reader.mapping(node, (*axes, *options))
    rule = {}
    for name, value in fields.items():
        known = axes.get(name) or options[name]
        rule[name] = reader.axis(name, value, known)
    return rule


def _matches(rule: _Rule, point: Mapping[str, Any]) -> bool:
    return all(point[name] in values for name, values in rule.items())


def _profile(reader: _Reader, name: str, node: yaml.Node, planned: tuple[Planned, ...]) -> tuple[Planned, ...]:
    fields = reader.mapping(node, ("variants", "select"), ("variants",))
    chosen = planned
    if "select" in fields:
        rules = []
        for item in reader.items(fields["select"]):
            part = reader.mapping(item, ("op", *AXES))
            op = _op(reader, part["op"]) if "op" in part else "fc1"
            rule = {axis: reader.axis(axis, value, _allowed(axis, op)) for axis, value in part.items()}
            if not any(_matches(rule, _point(each.variant)) for each in planned):
                raise reader.fail(item, "this rule selects no variant of the matrix")
            rules.append(rule)
        chosen = tuple(each for each in planned if any(_matches(rule, _point(each.variant)) for rule in rules))
    stated = reader.integer(fields["variants"])
    if not chosen:
        raise reader.fail(node, f"profile {name!r} gives no variant")
    if stated != len(chosen):
        raise reader.fail(fields["variants"], f"profile {name!r} states {stated} variants and gives {len(chosen)}: correct the number or the axes")
    return chosen


def _point(variant: Variant) -> dict[str, str]:
    return {
        "op": variant.op,
        "arch": variant.arch,
        "tile": f"{variant.tile_m}x{variant.tile_n}",
        "cluster": f"{variant.cluster_m}x{variant.cluster_n}",
        "a_dtype": variant.a_dtype,
        "b_dtype": variant.b_dtype,
        "c_dtype": variant.c_dtype,
    }
