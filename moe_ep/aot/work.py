"""How much one scheduled instruction computes and moves: matrix products, attention, bytes.

XLA's own cost analysis returns nothing for an absent GPU, so both come from the
shapes in the module's text.
"""

import dataclasses
import math

from moe_ep.aot.hlo import Computation, Instruction, Module, Shape

# Bookkeeping: no kernel runs for these.
FREE_OPCODES = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all",
    "partition-id", "replica-id", "add-dependency", "domain",
})  # fmt: skip
_SLICES = frozenset({"dynamic-slice", "slice"})
# Written in place: where it was not possible the compiler has put a copy before. Their update's operand.
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}
_CUBLAS = "__cublas$"
_CUDNN_ATTENTION = "__cudnn$fmha"
# Products of an attention pass in units of the forward's two: the backward pass makes
# the scores again and then dV, dP, dQ and dK, five products for two.
_ATTENTION_BACKWARD = 2.5


@dataclasses.dataclass(frozen=True)
class Gemm:
    """`batch` products of [rows, inner] x [inner, columns]."""

    rows: int
    columns: int
    inner: int
    batch: int = 1

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.columns * self.inner * self.batch


@dataclasses.dataclass(frozen=True)
class Attention:
    """One fused attention call: the FLOPs it does and what kernel tables know it by."""

    flops: float
    context: int
    head_dim: int
    backward: bool


@dataclasses.dataclass(frozen=True)
class Work:
    """What one instruction asks of a GPU: matrix products, attention, bytes through its memory."""

    gemms: tuple[Gemm, ...] = ()
    attention: Attention | None = None
    memory_bytes: float = 0.0

    @property
    def flops(self) -> float:
        return sum(gemm.flops for gemm in self.gemms) + (self.attention.flops if self.attention else 0.0)


def work_of(module: Module, computation: Computation, instruction: Instruction) -> Work:
    """Returns the work of one instruction; loops, calls and collectives are walked by the caller."""
    if instruction.opcode in FREE_OPCODES or instruction.opcode.endswith("-done"):
        return Work()
    bytes_moved = memory_bytes(module, computation, instruction)
    if instruction.opcode == "custom-call" and instruction.target.startswith(_CUDNN_ATTENTION):
        return Work((), cudnn_attention(computation, instruction), bytes_moved)
    return Work(tuple(gemms_of(module, computation, instruction)), None, bytes_moved)


def gemms_of(module: Module, computation: Computation, instruction: Instruction) -> list[Gemm]:
    """Returns the matrix products of an instruction, those inside a fusion included."""
    if instruction.opcode == "dot":
        return [_dot(computation, instruction, *_dot_numbers(instruction))]
    if instruction.opcode == "custom-call" and instruction.target.startswith(_CUBLAS):
        numbers = instruction.backend_config.get("gemm_backend_config", {}).get("dot_dimension_numbers", {})
        contracting, batch = (
            tuple(int(d) for d in numbers.get(f"lhs_{kind}_dimensions", ())) for kind in ("contracting", "batch")
        )
        return [_dot(computation, instruction, contracting, batch)]
    if instruction.opcode == "custom-call" and "mosaic" in instruction.target:
        return _kernel_gemms(computation, instruction)
    inner = module.callee(instruction)
    if inner is None:
        return []
    return [gemm for nested in inner.instructions for gemm in gemms_of(module, inner, nested)]


def _dot_numbers(instruction: Instruction) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return instruction.integers("lhs_contracting_dims"), instruction.integers("lhs_batch_dims")


def _dot(computation: Computation, instruction: Instruction, contracting, batch) -> Gemm:
    left = computation.operand_shapes(instruction)[0]
    inner = math.prod(left.dimensions[d] for d in contracting)
    batches = math.prod(left.dimensions[d] for d in batch)
    rows = left.elements // max(1, inner * batches)
    columns = instruction.shapes[0].elements // max(1, rows * batches)
    return Gemm(rows, columns, inner, batches)


def _kernel_gemms(computation: Computation, instruction: Instruction) -> list[Gemm]:
    """A Pallas kernel's product, from its largest matrices: [R, K] and [.., K, N] give [R, N].

    An upper bound where the kernel skips tiles; empty when no operands fit that form.
    """
    operands = [shape for shape in computation.operand_shapes(instruction) if len(shape.dimensions) >= 2]
    operands.sort(key=lambda shape: -shape.elements)
    for result in sorted(instruction.shapes, key=lambda shape: -shape.elements):
        for left in operands:
            gemm = _matching_gemm(left, operands, result)
            if gemm is not None:
                return [gemm]
    return []


def _matching_gemm(left: Shape, operands: list[Shape], result: Shape) -> Gemm | None:
    if len(left.dimensions) != 2 or len(result.dimensions) < 2:
        return None
    rows, inner = left.dimensions
    for right in operands:
        if right is left:
            continue
        # NN and NT: result [rows, columns].
        for depth, columns in (right.dimensions[-2:], right.dimensions[:-3:-1]):
            if depth == inner and result.dimensions == (rows, columns):
                return Gemm(rows, columns, inner)
        # The weight gradient: both operands have the rows, result [.., inner, columns].
        if right.dimensions[0] == rows and result.dimensions[-2:] == (inner, right.dimensions[-1]):
            return Gemm(inner, right.dimensions[-1], rows)
    return None


def cudnn_attention(computation: Computation, instruction: Instruction) -> Attention:
    """Returns what a cuDNN attention call does; half of the scores under a causal mask."""
    query, key, value = computation.operand_shapes(instruction)[:3]
    config = instruction.backend_config.get("cudnn_fmha_backend_config", {})
    causal = 0.5 if "CAUSAL" in str(config.get("mask_type", "")) else 1.0
    batch, queries, heads, query_dim = query.dimensions
    backward = "Backward" in instruction.target
    forward = 2.0 * batch * heads * queries * key.dimensions[1] * (query_dim + value.dimensions[3])
    flops = forward * causal * (_ATTENTION_BACKWARD if backward else 1.0)
    return Attention(flops, key.dimensions[1], query_dim, backward)


def memory_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Returns the bytes an instruction reads and writes, counting of a sliced operand only the slice."""
    inner = module.callee(instruction)
    if inner is None:
        return _plain_bytes(computation, instruction)
    parameters = {int(i.literal): i for i in inner.instructions if i.opcode == "parameter"}
    read = 0.0
    for index, name in enumerate(instruction.operands):
        operand = computation.by_name[name]
        read += _bytes_read(module, inner, parameters[index]) if index in parameters else operand.bytes
    return read + _bytes_written(module, inner, inner.root)


def _plain_bytes(computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode in _SLICES:
        return 2.0 * instruction.bytes
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * computation.by_name[instruction.operands[1]].bytes
    results = [shape for shape in instruction.shapes if shape.element != "s8"]  # s8: a library's scratch space
    return sum(s.bytes for s in computation.operand_shapes(instruction)) + sum(s.bytes for s in results)


def _bytes_read(module: Module, inner: Computation, parameter: Instruction) -> float:
    """Bytes of a fusion's parameter that its users touch: all, unless every user takes a slice."""
    read = 0.0
    for user in inner.users.get(parameter.name, ()):
        if user.opcode == "bitcast":
            read += _bytes_read(module, inner, user)
        elif user.opcode in _SLICES or (user.opcode == "gather" and user.operands[0] == parameter.name):
            read += user.bytes
        elif user.opcode in _IN_PLACE and user.operands[0] == parameter.name:
            pass
        elif user.opcode == "fusion":
            nested = module.callee(user)
            index = user.operands.index(parameter.name)
            read += _bytes_read(module, nested, next(i for i in nested.instructions
                                                     if i.opcode == "parameter" and int(i.literal) == index))  # fmt: skip
        else:
            return parameter.bytes
    return min(read, parameter.bytes)


def _bytes_written(module: Module, inner: Computation, root: Instruction) -> float:
    if root.opcode == "tuple":
        return sum(_bytes_written(module, inner, inner.by_name[name]) for name in root.operands)
    if root.opcode == "bitcast":
        return _bytes_written(module, inner, inner.by_name[root.operands[0]])
    if root.opcode in _IN_PLACE:
        return inner.by_name[root.operands[_IN_PLACE[root.opcode]]].bytes
    if root.opcode == "fusion" and module.callee(root) is not None:
        return _bytes_written(module, module.callee(root), module.callee(root).root)
    return sum(shape.bytes for shape in root.shapes if shape.element != "s8")
