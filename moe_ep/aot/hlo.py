"""Reads the text of a compiled (scheduled) XLA module into instructions with shapes.

Only what the reports need is understood; everything else of a line is kept as
text. The grammar: https://openxla.org/xla/operation_semantics, and HLO's printer.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
_ASYNC_SUFFIXES = ("-start", "-update", "-done")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: its element type as HLO spells it, and its dimensions."""

    element: str
    dimensions: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.dimensions)

    @property
    def bytes(self) -> float:
        return self.elements * element_bytes(self.element)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = shapes opcode(operands), attributes`."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # the result's arrays, a tuple's flattened
    operands: tuple[str, ...]
    literal: str  # what stands between the parentheses
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> float:
        """Bytes of the result."""
        return sum(shape.bytes for shape in self.shapes)

    @functools.cached_property
    def op_name(self) -> str:
        """The path of names under which the program issued it: jit(f)/scope/primitive."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def target(self) -> str:
        """A custom call's target, else the empty string."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @functools.cached_property
    def backend_config(self) -> dict:
        """XLA's JSON on how the instruction runs; empty when there is none or it is not JSON."""
        start = self.attributes.find("backend_config={")
        if start < 0:
            return {}
        try:
            return json.JSONDecoder().raw_decode(self.attributes[start + len("backend_config=") :])[0]
        except json.JSONDecodeError:
            return {}

    def called(self, attribute: str) -> str | None:
        """Returns the computation that an attribute (calls, body, condition, to_apply) names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None

    def integers(self, attribute: str) -> tuple[int, ...]:
        """Returns an attribute like `dimensions={0,1}` as integers; empty when absent."""
        found = re.search(rf"\b{attribute}={{([\d,]*)}}", self.attributes)
        return tuple(int(number) for number in found.group(1).split(",") if number) if found else ()


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in self.instructions if i.is_root)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction)
        return users

    def operand_shapes(self, instruction: Instruction) -> list[Shape]:
        """Returns the shapes of the operands, tuples flattened."""
        return [shape for name in instruction.operands for shape in self.by_name[name].shapes]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled module."""

    computations: dict[str, Computation]
    entry: Computation

    def callee(self, instruction: Instruction, attribute: str = "calls") -> Computation | None:
        """Returns the computation that the instruction calls, None when it calls none."""
        return self.computations.get(instruction.called(attribute) or "")


def element_bytes(element: str) -> float:
    """Returns the bytes of one element of a type like bf16, f8e4m3fn or s32."""
    if element in _BYTES:
        return _BYTES[element]
    bits = re.search(r"\d+", element)
    return int(bits.group()) / 8 if bits else 0


def parse(text: str) -> Module:
    """Parses `compiled.as_text()`.

    Raises:
      ValueError: the text has no ENTRY computation.
    """
    computations: dict[str, Computation] = {}
    entry = None
    header, lines = "", []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            header, lines = line, []
        elif line.startswith("}") and header:
            name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", header).group(1)
            computations[name] = Computation(name, tuple(filter(None, map(parse_instruction, lines))))
            entry = computations[name] if header.startswith("ENTRY") else entry
            header = ""
        elif header:
            lines.append(line)
    if entry is None:
        raise ValueError(f"no ENTRY computation in an HLO text of {len(text)} characters")
    return Module(computations, entry)


def parse_instruction(line: str) -> Instruction | None:
    """Parses one line; None when it is not an instruction."""
    line = re.sub(r"/\*.*?\*/", "", line).strip()
    is_root = line.startswith("ROOT ")
    name, separator, rest = line.removeprefix("ROOT ").partition(" = ")
    if not separator:
        return None
    shape_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    call = rest[shape_end:].lstrip()
    opening = call.index("(")
    closing = _closing(call, opening)
    literal = call[opening + 1 : closing]
    opcode = call[:opening]
    takes_operands = opcode not in ("constant", "parameter")
    operands = tuple(_operand_name(part) for part in _split(literal)) if takes_operands else ()
    return Instruction(
        name.lstrip("%"), opcode, parse_shapes(rest[:shape_end]), operands, literal, call[closing + 1 :], is_root
    )


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Returns the arrays of a printed shape, `(bf16[2,3]{1,0}, s32[])`, in order."""
    return tuple(
        Shape(element, tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size))
        for element, sizes in _ARRAY.findall(text)
    )


def _closing(text: str, opening: int) -> int:
    depth, quoted = 0, False
    for position in range(opening, len(text)):
        character = text[position]
        if character == '"':
            quoted = not quoted
        if quoted:
            continue
        depth += (character in "({") - (character in ")}")
        if depth == 0:
            return position
    raise ValueError(f"unbalanced brackets in {text[opening : opening + 80]!r}")


def _split(text: str) -> Iterator[str]:
    depth, start = 0, 0
    for position, character in enumerate(text):
        depth += (character in "({[") - (character in ")}]")
        if character == "," and depth == 0:
            yield text[start:position]
            start = position + 1
    if text[start:].strip():
        yield text[start:]


def _operand_name(text: str) -> str:
    return text.strip().split(" ")[-1].lstrip("%")


def is_start(instruction: Instruction) -> bool:
    """Whether the instruction begins something that its done waits for."""
    return instruction.opcode.endswith("-start")


def is_done(instruction: Instruction) -> bool:
    return instruction.opcode.endswith("-done")


def plain_opcode(module: Module, instruction: Instruction) -> str:
    """Returns the opcode without -start or -done; of a generic async pair, the opcode that it wraps."""
    opcode = instruction.opcode
    for suffix in _ASYNC_SUFFIXES:
        opcode = opcode.removesuffix(suffix)
    wrapped = module.callee(instruction)
    return wrapped.root.opcode if opcode == "async" and wrapped else opcode


def trip_count(module: Module, loop: Instruction) -> int | None:
    """Returns how often a `while` runs its body; None where the data says, not the program."""
    known = loop.backend_config.get("known_trip_count", {}).get("n")
    if known is not None:
        return int(known)
    condition = module.callee(loop, "condition")
    constants = [int(i.literal) for i in condition.instructions if i.opcode == "constant" and i.literal.isdigit()]
    return constants[0] if len(constants) == 1 else None
