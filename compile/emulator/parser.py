"""PTX text to kernels: parameters, shared variables, registers, instructions with line numbers.

Sources: PTX ISA 9.x, chapter 4 (syntax), 5 (state spaces, types, variables), 6 (operands), 11 (directives).

Registers and labels of nested scopes (``{ … }``) are renamed, so that a kernel has one flat name space. Nothing is executed or guessed: a
directive or operand that is not known is an error with its line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from densemoe.runtime.errors import EmulatorError

__all__ = [
    "Immediate",
    "Instruction",
    "Kernel",
    "Memory",
    "Module",
    "Operand",
    "Pair",
    "Parameter",
    "Register",
    "Sink",
    "Special",
    "Symbol",
    "Variable",
    "Vector",
    "parse",
]

_TOKEN: Final = re.compile(
    r"(?P<space>[ \t\r\f]+|//[^\n]*|/\*.*?\*/)|(?P<newline>\n)|(?P<string>\"[^\"\n]*\")"
    r"|(?P<float>0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16})|(?P<version>[0-9]+\.[0-9]+)"
    r"|(?P<number>0[xX][0-9a-fA-F]+U?|0[bB][01]+U?|[0-9]+U?(?![\w.]))"
    r"|(?P<word>[%$_A-Za-z.](?:[\w$.%]|::)*)|(?P<mark>[{}\[\]();:,|!@+\-=<>])",
    re.DOTALL,
)
#: bytes of the fundamental types
TYPE_BYTES: Final = {
    **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)},
    "f16": 2, "f16x2": 4, "bf16": 2, "bf16x2": 4, "f32": 4, "f64": 8, "b128": 16,
}
_REGISTER_BITS: Final = {**{name: 8 * size for name, size in TYPE_BYTES.items() if size <= 8}, "pred": 1}
SPECIAL_REGISTERS: Final = frozenset(
    {f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid", "clusterid", "nclusterid") for axis in "xyz"}
    | {f"%cluster_{name}.{axis}" for name in ("ctaid", "nctaid") for axis in "xyz"}
    | {"%laneid", "%warpid", "%nwarpid", "%smid", "%nsmid", "%gridid", "%is_explicit_cluster", "%cluster_ctarank", "%cluster_nctarank"}
    | {"%lanemask_eq", "%lanemask_le", "%lanemask_lt", "%lanemask_ge", "%lanemask_gt"}
    | {"%clock", "%clock_hi", "%clock64", "%globaltimer", "%globaltimer_lo", "%globaltimer_hi", "%dynamic_smem_size", "%total_smem_size"}
)
_KERNEL_TUNING: Final = {".reqntid": 3, ".maxntid": 3, ".minnctapersm": 1, ".maxnreg": 1, ".reqnctapercluster": 3, ".maxclusterrank": 1}
_KERNEL_FLAGS: Final = (".explicitcluster", ".noreturn", ".blocksareclusters")


@dataclass(frozen=True)
class Register:
    """A declared register; ``negated`` for ``!%p``."""

    name: str
    negated: bool = False


@dataclass(frozen=True)
class Special:
    """A special register such as ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant: an integer, or the bits of a floating-point literal with their width (32 or 64)."""

    value: int
    float_bits: int = 0


@dataclass(frozen=True)
class Symbol:
    """A variable, parameter or label, with a byte offset."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    """``{a, b, …}``."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Memory:
    """``[base + offset]`` or ``[base + offset, {coordinates}]``."""

    base: Operand
    offset: int = 0
    coordinates: tuple[Operand, ...] | None = None


@dataclass(frozen=True)
class Pair:
    """``%r|%p``: two destinations of one instruction."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Sink:
    """``_``: a destination that is thrown away."""


Operand = Register | Special | Immediate | Symbol | Vector | Memory | Pair | Sink


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        line: line of the PTX text, from 1.
        opcode: with all its modifiers.
        operands: in order.
        guard: predicate register, or None.
        negated: the guard is ``@!``.
    """

    line: int
    opcode: str
    operands: tuple[Operand, ...]
    guard: str | None = None
    negated: bool = False

    @property
    def parts(self) -> list[str]:
        """The opcode cut at its dots."""
        return self.opcode.split(".")


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter: its place in the parameter block, in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Variable:
    """A variable in shared, local, global or constant memory; size 0 is the dynamic shared memory.

    Attributes:
        data: initial bytes where the PTX gives some.
    """

    name: str
    space: str
    size: int
    alignment: int
    data: bytes = b""


@dataclass
class Kernel:
    """One ``.entry``.

    Attributes:
        registers: bits of each register, 1 for predicates.
        labels: label to the index of the instruction that follows it.
        block: ``.reqntid`` where given.
        cluster: ``.reqnctapercluster`` where given.
    """

    name: str
    line: int
    parameters: dict[str, Parameter] = field(default_factory=dict)
    parameter_bytes: int = 0
    registers: dict[str, int] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    block: tuple[int, ...] | None = None
    cluster: tuple[int, ...] | None = None


@dataclass
class Module:
    """A translation unit: ``.version``, ``.target``, kernels, and variables outside of kernels."""

    version: str = ""
    target: str = ""
    kernels: dict[str, Kernel] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    line: int


def _tokens(text: str) -> Iterator[_Token]:
    position, line = 0, 1
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise EmulatorError(f"PTX line {line}: {text[position : position + 20]!r} is no PTX token")
        kind = match.lastgroup or ""
        if kind not in ("space", "newline"):
            yield _Token(kind, match.group(), line)
        line += match.group().count("\n")
        position = match.end()
    yield _Token("end", "", line)


def _integer(text: str) -> int:
    digits = text.rstrip("U")
    if digits[:2] in ("0x", "0X", "0b", "0B"):
        return int(digits, 0)
    return int(digits, 8) if len(digits) > 1 and digits[0] == "0" else int(digits)


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens = list(_tokens(text))
        self.at = 0
        self.module = Module()
        self.kernel: Kernel | None = None
        self.scopes: list[dict[str, str]] = []
        self.scope_count = 0

    # --- tokens

    @property
    def token(self) -> _Token:
        return self.tokens[self.at]

    def fail(self, message: str) -> EmulatorError:
        return EmulatorError(f"PTX line {self.token.line}: {message}")

    def next(self) -> _Token:
        token = self.tokens[self.at]
        self.at += 1
        return token

    def accept(self, text: str) -> bool:
        if self.token.text == text and self.token.kind != "string":
            self.at += 1
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.accept(text):
            raise self.fail(f"{self.token.text!r} where {text!r} is needed")

    def word(self) -> str:
        if self.token.kind != "word":
            raise self.fail(f"{self.token.text!r} where a name is needed")
        return self.next().text

    def integer(self) -> int:
        negative = self.accept("-")
        if self.token.kind != "number":
            raise self.fail(f"{self.token.text!r} where an integer is needed")
        value = _integer(self.next().text)
        return -value if negative else value

    def skip_to(self, text: str) -> None:
        while not self.accept(text):
            if self.next().kind == "end":
                raise self.fail(f"the text ends before {text!r}")

    # --- module

    def parse(self) -> Module:
        while self.token.kind != "end":
            directive = self.word()
            if directive == ".version":
                self.module.version = self.next().text
            elif directive == ".target":
                self.module.target = self.word()
                while self.accept(","):
                    self.word()
            elif directive == ".address_size":
                if self.integer() != 64:
                    raise self.fail(".address_size: 64 alone is modelled")
            elif directive in (".visible", ".weak", ".extern"):
                continue
            elif directive == ".entry":
                self.entry()
            elif directive in (".shared", ".global", ".const"):
                variable = self.variable(directive)
                self.module.variables[variable.name] = variable
            elif directive == ".file":
                self.file()
            elif directive == ".pragma":
                self.skip_to(";")
            elif directive == ".section":
                self.word()
                self.skip_to("}")
            else:
                self.at -= 1
                raise self.fail(f"the directive {directive!r} is not known here")
        return self.module

    def file(self) -> None:
        self.integer()
        self.next()
        while self.accept(","):
            self.integer()

    def variable(self, space: str) -> Variable:
        alignment, kind = 0, ""
        while self.token.text.startswith("."):
            word = self.word()
            if word == ".align":
                alignment = self.integer()
            elif word[1:] in TYPE_BYTES:
                kind = word[1:]
            elif word in (".attribute",):
                raise self.fail(f"{word} is not modelled")
            else:
                raise self.fail(f"{word!r} in a variable declaration is not known")
        if not kind:
            raise self.fail("a variable without a type")
        name, count = self.word(), 1
        while self.accept("["):
            if self.accept("]"):
                count = 0
            else:
                count *= self.integer()
                self.expect("]")
        data = b""
        if self.accept("="):
            data = self.initialiser(TYPE_BYTES[kind])
        self.expect(";")
        return Variable(name, space[1:], count * TYPE_BYTES[kind], alignment or TYPE_BYTES[kind], data)

    def initialiser(self, size: int) -> bytes:
        def one() -> bytes:
            if self.token.kind == "float":
                return int(self.next().text[2:], 16).to_bytes(size, "little")
            return (self.integer() % (1 << 8 * size)).to_bytes(size, "little")

        if not self.accept("{"):
            return one()
        data = one()
        while self.accept(","):
            data += one()
        self.expect("}")
        return data

    # --- kernels

    def entry(self) -> None:
        line = self.token.line
        kernel = Kernel(self.word(), line)
        self.kernel = kernel
        if self.accept("("):
            while not self.accept(")"):
                self.parameter(kernel)
                self.accept(",")
        while not self.accept("{"):
            directive = self.word()
            if directive in _KERNEL_TUNING:
                values = [self.integer()]
                while self.accept(","):
                    values.append(self.integer())
                values += [1] * (_KERNEL_TUNING[directive] - len(values))
                if directive == ".reqntid":
                    kernel.block = tuple(values)
                elif directive == ".reqnctapercluster":
                    kernel.cluster = tuple(values)
            elif directive == ".pragma":
                self.skip_to(";")
            elif directive not in _KERNEL_FLAGS:
                self.at -= 1
                raise self.fail(f"the directive {directive!r} of a kernel is not known")
        self.body(kernel)
        self.resolve_labels(kernel)
        self.module.kernels[kernel.name] = kernel
        self.kernel = None

    def parameter(self, kernel: Kernel) -> None:
        self.expect(".param")
        alignment, size = 0, 0
        while self.token.text.startswith("."):
            word = self.word()
            if word == ".align":
                alignment = self.integer()
            elif word[1:] in TYPE_BYTES:
                size = TYPE_BYTES[word[1:]]
            elif word not in (".ptr", ".global", ".shared", ".const", ".local"):
                raise self.fail(f"{word!r} of a parameter is not known")
        # ".ptr .global .align 1" speaks of what the pointer points to
        natural = size
        name = self.word()
        if self.accept("["):
            natural = alignment or size
            size *= self.integer()
            self.expect("]")
        offset = -(-kernel.parameter_bytes // natural) * natural
        kernel.parameters[name] = Parameter(name, offset, size)
        kernel.parameter_bytes = offset + size

    def body(self, kernel: Kernel) -> None:
        self.scopes = [{}]
        while self.scopes:
            token = self.token
            if token.kind == "end":
                raise self.fail(f"the text ends inside of kernel {kernel.name}")
            if self.accept("{"):
                self.scopes.append({})
                self.scope_count += 1
            elif self.accept("}"):
                self.scopes.pop()
            elif token.text == ";":
                self.next()
            elif token.text.startswith("."):
                self.body_directive(kernel)
            elif token.kind == "word" and self.tokens[self.at + 1].text == ":":
                name = self.declare(self.word())
                self.expect(":")
                kernel.labels[name] = len(kernel.instructions)
            else:
                kernel.instructions.append(self.instruction())

    def declare(self, name: str) -> str:
        unique = name if len(self.scopes) == 1 else f"{name}@{self.scope_count}"
        self.scopes[-1][name] = unique
        return unique

    def look_up(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def body_directive(self, kernel: Kernel) -> None:
        directive = self.word()
        if directive == ".reg":
            kind = self.word()[1:]
            if kind not in _REGISTER_BITS:
                raise self.fail(f".reg .{kind} is not modelled")
            while True:
                name = self.word()
                if self.accept("<"):
                    for i in range(self.integer()):
                        kernel.registers[self.declare(f"{name}{i}")] = _REGISTER_BITS[kind]
                    self.expect(">")
                else:
                    kernel.registers[self.declare(name)] = _REGISTER_BITS[kind]
                if not self.accept(","):
                    break
            self.expect(";")
        elif directive in (".shared", ".local"):
            variable = self.variable(directive)
            kernel.variables[self.declare(variable.name)] = variable
        elif directive == ".pragma":
            self.skip_to(";")
        elif directive == ".loc":
            line = self.token.line
            while self.token.line == line:
                self.next()
        else:
            self.at -= 1
            raise self.fail(f"the directive {directive!r} is not known here")

    # --- instructions

    def instruction(self) -> Instruction:
        line, guard, negated = self.token.line, None, False
        if self.accept("@"):
            negated = self.accept("!")
            guard = self.look_up(self.word())
        opcode = self.word()
        operands = []
        if not self.accept(";"):
            operands.append(self.operand())
            while self.accept(","):
                operands.append(self.operand())
            self.expect(";")
        return Instruction(line, opcode, tuple(operands), guard, negated)

    def operand(self) -> Operand:
        if self.accept("!"):
            name = self.look_up(self.word())
            return Register(name, True)
        if self.accept("{"):
            return Vector(self.list_until("}"))
        if self.accept("["):
            base = self.operand()
            offset = 0
            if isinstance(base, Symbol):
                base, offset = Symbol(base.name), base.offset
            if self.accept("+"):
                offset += self.integer()
            coordinates = None
            if self.accept(","):
                vector = self.operand()
                if not isinstance(vector, Vector):
                    raise self.fail("tensor coordinates are a vector {…}")
                coordinates = vector.items
            self.expect("]")
            return Memory(base, offset, coordinates)
        first = self.simple()
        return Pair(first, self.simple()) if self.accept("|") else first

    def list_until(self, end: str) -> tuple[Operand, ...]:
        items = []
        while not self.accept(end):
            items.append(self.operand())
            if self.token.text != end:
                self.expect(",")
        return tuple(items)

    def simple(self) -> Operand:
        token = self.token
        if token.kind == "float":
            self.next()
            return Immediate(int(token.text[2:], 16), 32 if token.text[1] in "fF" else 64)
        if token.kind == "number" or token.text == "-":
            if token.text == "-" and self.tokens[self.at + 1].kind == "float":
                raise self.fail("a negated floating-point literal")
            return Immediate(self.integer())
        name = self.word()
        if name == "_":
            return Sink()
        if name == "WARP_SZ":
            return Immediate(32)
        if name in SPECIAL_REGISTERS:
            return Special(name)
        unique = self.look_up(name)
        assert self.kernel is not None
        if unique in self.kernel.registers:
            return Register(unique)
        if name.startswith("%"):
            raise EmulatorError(f"PTX line {token.line}: {name} is neither a declared register nor a special register that is modelled")
        offset = 0
        if self.token.text == "+" and self.tokens[self.at + 1].kind == "number":
            self.next()
            offset = self.integer()
        return Symbol(unique, offset)

    def resolve_labels(self, kernel: Kernel) -> None:
        # labels may stand behind their branches, so names of nested scopes are resolved by suffix
        for i, each in enumerate(kernel.instructions):
            if each.opcode in ("bra", "bra.uni"):
                target = each.operands[0] if each.operands else None
                if not isinstance(target, Symbol):
                    raise EmulatorError(f"PTX line {each.line}: a branch without a label")
                name = target.name
                if name not in kernel.labels:
                    scoped = [label for label in kernel.labels if label.split("@")[0] == name]
                    following = [label for label in scoped if kernel.labels[label] >= i]
                    if not scoped:
                        raise EmulatorError(f"PTX line {each.line}: label {name} does not exist")
                    name = (following or scoped)[0]
                    kernel.instructions[i] = Instruction(each.line, each.opcode, (Symbol(name),), each.guard, each.negated)
        symbols = {**self.module.variables, **kernel.variables}
        for each in kernel.instructions:
            for operand in each.operands:
                base = operand.base if isinstance(operand, Memory) else operand
                if isinstance(base, Symbol) and not (base.name in kernel.labels or base.name in kernel.parameters or base.name in symbols):
                    raise EmulatorError(f"PTX line {each.line}: {base.name} is not declared")


def parse(text: str) -> Module:
    """Parses a PTX module.

    Raises:
        EmulatorError: a token, directive or operand that is not known, with its line.
    """
    return _Parser(text).parse()
