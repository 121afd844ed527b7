"""What a cubin says about itself: a reader for NVIDIA's ELF64, without a toolkit or a driver.

Section and attribute numbers were found by comparing with ``cuobjdump -elf``: ``.nv.info`` holds (format, attribute, size) records; attribute
0x2F is registers, 0x12 the minimum stack, 0x11 the frame, per symbol index; ``.nv.info.<kernel>`` attribute 0x17 is one parameter (index,
ordinal, offset, size) and 0x19 the parameter block's size.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from densemoe.runtime.errors import AuditError

__all__ = ["Cubin", "read_cubin", "read_sections", "warpgroup_products_and_waits"]

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_EM_CUDA = 190
_SHT_SYMTAB, _SHT_NOBITS = 2, 8
_FORMAT_NO_VALUE, _FORMAT_BYTE, _FORMAT_HALF, _FORMAT_SIZED = 1, 2, 3, 4
_REGISTERS, _FRAME, _MINIMUM_STACK = 0x2F, 0x11, 0x12
_PARAMETER, _PARAMETER_BLOCK = 0x17, 0x19
_INSTRUCTION = struct.Struct("<QQ")
_OPCODE = 0xFFF  # bits of an instruction's first word, sm_90
_HGMMA, _WARPGROUP, _WAITS = 0xDF0, 0x9C5, 1 << 47  # found by comparing with nvdisasm -hex; WARPGROUP.DEPBAR has the bit, WARPGROUP.ARRIVE has not
_GLOBAL_FUNCTION = 0x12  # symbol binding global, type function


@dataclass(frozen=True)
class Cubin:
    """One kernel's cubin.

    Attributes:
        sm: number of the architecture, 90 for sm_90a.
        symbol: the kernel's name.
        text_bytes: size of its machine code.
        registers: per thread.
        stack: bytes of local memory a thread uses for its frame: 0 where nothing spills.
        static_smem: bytes of static shared memory, with the 1,024 that the system reserves on sm_90 and later.
        parameters: (offset, size) in order.
        parameter_bytes: size of the parameter block.
        ptxas: version text of the assembler.
    """

    sm: int
    symbol: str
    text_bytes: int
    registers: int
    stack: int
    static_smem: int
    parameters: tuple[tuple[int, int], ...]
    parameter_bytes: int
    ptxas: str = field(default="")


def _text(table: bytes, offset: int) -> str:
    end = table.find(b"\0", offset)
    if offset >= len(table) or end < 0:
        raise AuditError("not a cubin that can be read: a name lies outside its string table")
    return table[offset:end].decode("utf-8", "replace")


def _records(data: bytes) -> list[tuple[int, bytes]]:
    """(attribute, value) pairs of a ``.nv.info`` section."""
    result, at = [], 0
    while at + 4 <= len(data):
        form, attribute, size = struct.unpack_from("<BBH", data, at)
        at += 4
        if form == _FORMAT_SIZED:
            result.append((attribute, data[at : at + size]))
            at += size
        elif form in (_FORMAT_NO_VALUE, _FORMAT_BYTE, _FORMAT_HALF):
            result.append((attribute, struct.pack("<H", size)))  # the size field is the value itself
        else:
            raise AuditError(f"not a cubin that can be read: .nv.info has a record of format {form}")
    return result


def read_cubin(data: bytes) -> Cubin:
    """Reads a cubin that holds one kernel.

    Raises:
        AuditError: the bytes are truncated, not a CUDA ELF, or hold another number of kernels than one.
    """
    try:
        return _read(data)
    except (struct.error, IndexError, ValueError, OverflowError) as error:
        raise AuditError(f"not a cubin that can be read ({len(data)} bytes): {error}") from None


def read_sections(data: bytes) -> dict[str, bytes]:
    """Every section of a cubin by name, in the file's order, to compare two of them; a section without bytes in the file is empty.

    Raises:
        AuditError: the bytes are truncated, or not a CUDA ELF.
    """
    try:
        _, headers, content = _headers(data)
        return {name: content(header) for name, header in headers.items()}
    except (struct.error, IndexError, ValueError, OverflowError) as error:
        raise AuditError(f"not a cubin that can be read ({len(data)} bytes): {error}") from None


def warpgroup_products_and_waits(data: bytes) -> tuple[int, int]:
    """How many warpgroup products (HGMMA) and waits for them (WARPGROUP.DEPBAR) stand in the machine code of an sm_90 cubin."""
    products = waits = 0
    for name, code in read_sections(data).items():
        if name.startswith(".text."):
            for first, _ in _INSTRUCTION.iter_unpack(code):
                products += (first & _OPCODE) == _HGMMA
                waits += (first & _OPCODE) == _WARPGROUP and bool(first & _WAITS)
    return products, waits


_Header = tuple[int, ...]


def _headers(data: bytes) -> tuple[int, dict[str, _Header], Callable[[_Header], bytes]]:
    """Architecture number, section headers by name, and what gives a section's bytes."""
    identity, _, machine, _, _, _, sections_at, flags, _, _, _, section_size, section_count, names_index = _HEADER.unpack_from(data)
    if identity[:5] != b"\x7fELF\x02" or machine != _EM_CUDA or section_size != _SECTION.size:
        raise AuditError(f"not a cubin: {len(data)} bytes that start with {data[:8]!r}, not a 64-bit CUDA ELF")
    # ELF ABI 8 and later keep the architecture in bits 8–15, earlier ones in bits 0–7
    sm = (flags >> 8) & 0xFF if identity[8] >= 8 else flags & 0xFF
    headers: list[_Header] = [_SECTION.unpack_from(data, sections_at + i * section_size) for i in range(section_count)]

    def content(header: _Header) -> bytes:
        if header[1] == _SHT_NOBITS:
            return b""
        if header[4] + header[5] > len(data):
            raise AuditError(f"not a cubin that can be read: a section ends at byte {header[4] + header[5]} of {len(data)}; it is truncated")
        return data[header[4] : header[4] + header[5]]

    name_table = content(headers[names_index])
    return sm, {_text(name_table, header[0]): header for header in headers}, content


def _read(data: bytes) -> Cubin:
    sm, sections, content = _headers(data)
    kernels = [name[len(".text.") :] for name in sections if name.startswith(".text.")]
    if len(kernels) != 1:
        raise AuditError(f"a cubin with {len(kernels)} kernels ({', '.join(kernels)}): one is expected")
    symbol = kernels[0]
    symbol_index = _symbol_index(content, sections, symbol)
    registers = stack = -1
    for attribute, value in _records(content(sections[".nv.info"])):
        if attribute in (_REGISTERS, _FRAME, _MINIMUM_STACK) and len(value) >= 8:
            index, number = struct.unpack_from("<II", value)
            if index == symbol_index and attribute == _REGISTERS:
                registers = number
            elif index == symbol_index:
                stack = max(stack, number)
    parameters: dict[int, tuple[int, int]] = {}
    block = 0
    for attribute, value in _records(content(sections[f".nv.info.{symbol}"])):
        if attribute == _PARAMETER:
            _, ordinal, offset, packed = struct.unpack_from("<IHHI", value)
            parameters[ordinal] = (offset, packed >> 18)
        elif attribute == _PARAMETER_BLOCK:
            block = struct.unpack_from("<H", value)[0]
    shared = sections.get(f".nv.shared.{symbol}")
    notes = b"".join(content(header) for name, header in sections.items() if name.startswith(".note.nv"))
    return Cubin(
        sm=sm,
        symbol=symbol,
        text_bytes=sections[f".text.{symbol}"][5],
        registers=registers,
        stack=max(stack, 0),
        static_smem=shared[5] if shared else 0,
        parameters=tuple(parameters[i] for i in range(len(parameters))),
        parameter_bytes=block,
        ptxas=_ptxas_version(notes),
    )


def _symbol_index(content: Callable[[_Header], bytes], sections: dict[str, _Header], symbol: str) -> int:
    symbols, strings = content(sections[".symtab"]), content(sections[".strtab"])
    for index in range(len(symbols) // _SYMBOL.size):
        name, info, *_ = _SYMBOL.unpack_from(symbols, index * _SYMBOL.size)
        if info == _GLOBAL_FUNCTION and _text(strings, name) == symbol:
            return index
    raise AuditError(f"a cubin whose symbol table lacks its kernel {symbol}")


def _ptxas_version(notes: bytes) -> str:
    """The assembler's version text out of the toolkit note."""
    for part in notes.split(b"\0"):
        text = part.decode("ascii", "ignore")
        if "Build cuda_" in text or "release" in text:
            return text.strip()
    return ""
