"""How much one scheduled instruction computes and moves: matrix products, attention, bytes.

XLA's own cost analysis returns nothing for an absent GPU, so both come from the
shapes in the module's text.
"""

import dataclasses
import math
import re

from moe_ep.aot.hlo import Computation, Instruction, Module, Shape, element_bytes
from moe_ep.kernels.mla_decode.block import ROWS

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
_KERNEL = "mosaic"
# Products of an attention pass in units of the forward's two: the backward pass makes
# the scores again and then dV, dP, dQ and dK, five products for two.
_ATTENTION_BACKWARD = 2.5


# At whose rate a product runs, slowest first.
PRODUCT_DTYPES = ("float32", "tf32", "bf16", "fp8")


@dataclasses.dataclass(frozen=True)
class Gemm:
    """`batch` products of [rows, inner] x [inner, columns], at the rate of `dtype`."""

    rows: int
    columns: int
    inner: int
    batch: int = 1
    dtype: str = "bf16"

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
    # (sequences, context, heads, cached values a token) of one new token a sequence over the cache of latents.
    absorbed: tuple[int, int, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Work:
    """What one instruction asks of a GPU: matrix products, attention, bytes through its memory."""

    gemms: tuple[Gemm, ...] = ()
    attention: Attention | None = None
    memory_bytes: float = 0.0

    @property
    def flops(self) -> float:
        return sum(gemm.flops for gemm in self.gemms) + (self.attention.flops if self.attention else 0.0)


def work_of(
    module: Module, computation: Computation, instruction: Instruction, expert_rows: float = math.inf
) -> Work:
    """Returns the work of one instruction; loops, calls and collectives are walked by the caller.

    Args:
      module: the instruction's module.
      computation: the instruction's computation.
      instruction: any instruction.
      expert_rows: rows with tokens in one call of the experts' kernels, which skip the
        tiles of the buffer's other rows.
    """
    if instruction.opcode in FREE_OPCODES or instruction.opcode.endswith("-done"):
        return Work()
    if kernel := _kernel_of(module, computation, instruction):
        return _kernel_work(*kernel, expert_rows)
    bytes_moved = memory_bytes(module, computation, instruction)
    if instruction.opcode == "custom-call" and instruction.target.startswith(_CUDNN_ATTENTION):
        return Work((), cudnn_attention(computation, instruction), bytes_moved)
    return Work(tuple(gemms_of(module, computation, instruction)), None, bytes_moved)


def _kernel_of(
    module: Module, computation: Computation, instruction: Instruction
) -> tuple[Computation, Instruction] | None:
    """One of this project's kernels and where it stands: itself, or in a fusion that only slices its operands."""
    if instruction.opcode == "custom-call" and _KERNEL in instruction.target:
        return computation, instruction
    inner = module.callee(instruction) if instruction.opcode == "fusion" else None
    nested = (_kernel_of(module, inner, each) for each in inner.instructions) if inner else ()
    return next((kernel for kernel in nested if kernel), None)


def gemms_of(module: Module, computation: Computation, instruction: Instruction) -> list[Gemm]:
    """Returns the matrix products of an instruction, those inside a fusion included, kernels' apart."""
    if instruction.opcode == "dot":
        return [_dot(computation, instruction, *_dot_numbers(instruction), _is_rounded(instruction.attributes))]
    if instruction.opcode == "custom-call" and instruction.target.startswith(_CUBLAS):
        config = instruction.backend_config.get("gemm_backend_config", {})
        numbers = config.get("dot_dimension_numbers", {})
        contracting, batch = (
            tuple(int(d) for d in numbers.get(f"lhs_{kind}_dimensions", ())) for kind in ("contracting", "batch")
        )
        return [_dot(computation, instruction, contracting, batch, _is_rounded(str(config)))]
    inner = module.callee(instruction)
    if inner is None:
        return []
    return [gemm for nested in inner.instructions for gemm in gemms_of(module, inner, nested)]


def _dot_numbers(instruction: Instruction) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return instruction.integers("lhs_contracting_dims"), instruction.integers("lhs_batch_dims")


def _is_rounded(attributes: str) -> bool:
    """Whether float32 operands may be rounded to TF32: at jax's default precision, not at a higher one."""
    return re.search(r"operand_precision[^\]}]*high", attributes, re.IGNORECASE) is None


def _dot(computation: Computation, instruction: Instruction, contracting, batch, is_rounded: bool) -> Gemm:
    left = computation.operand_shapes(instruction)[0]
    inner = math.prod(left.dimensions[d] for d in contracting)
    batches = math.prod(left.dimensions[d] for d in batch)
    rows = left.elements // max(1, inner * batches)
    columns = instruction.shapes[0].elements // max(1, rows * batches)
    dtype = {"f32": "tf32" if is_rounded else "float32", "f8": "fp8"}.get(left.element.split("e")[0], "bf16")
    return Gemm(rows, columns, inner, batches, dtype)


def _kernel_work(computation: Computation, instruction: Instruction, expert_rows: float) -> Work:
    """The work of one of this project's kernels; of one whose operands fit none of them, its bytes alone."""
    operands = [shape for shape in computation.operand_shapes(instruction) if shape.element != "s32"]
    if "attention" in instruction.op_name:
        return _cache_read(computation, instruction)
    rows = [shape for shape in operands if len(shape.dimensions) == 2]
    weights = [shape for shape in (*operands, *instruction.shapes) if len(shape.dimensions) == 3]
    if not rows or not weights:
        return Work((), None, _plain_bytes(computation, instruction))
    held = rows[0].dimensions[0]
    count = int(min(held, expert_rows))
    by_rows = rows + [shape for shape in instruction.shapes if len(shape.dimensions) == 2]
    touched = sum(shape.bytes for shape in weights) + sum(shape.bytes for shape in by_rows) * count / held
    return Work(tuple(_expert_gemms(rows, weights, instruction, count)), None, touched)


def _expert_gemms(rows: list[Shape], weights: list[Shape], instruction: Instruction, count: int) -> list[Gemm]:
    """The products of an expert kernel (moe_ep.kernels.grouped_matmul.steps) on `count` rows, one a weight."""
    if weights[0] not in instruction.shapes:
        return [_rows_by_weights(count, rows[0].dimensions[1], weight) for weight in weights]
    # The weight gradient: [R, K] and [R, N] give [G, K, N], contracted over each group's rows.
    groups, inner, columns = weights[0].dimensions
    return [Gemm(inner, columns, max(1, count // groups), groups) for _ in weights]


def _rows_by_weights(count: int, inner: int, weight: Shape) -> Gemm:
    """[R, K] by [G, K, N], or by the transposed [G, N, K]: a group has R / G rows."""
    groups, *sides = weight.dimensions
    return Gemm(max(1, count // groups), sides[1] if sides[0] == inner else sides[0], inner, groups)


def _cache_read(computation: Computation, instruction: Instruction) -> Work:
    """The absorbed attention kernel: every sequence's pages of ROWS latents are read once, not the whole cache."""
    queries, _, cache, pages = computation.operand_shapes(instruction)[:4]
    sequences, heads, latent = queries.dimensions
    context, width = pages.dimensions[1] * ROWS, cache.dimensions[1]
    flops = 2.0 * sequences * context * heads * (width + latent)
    touched = sequences * context * width * element_bytes(cache.element) + 2 * queries.bytes
    return Work((), Attention(flops, context, width, False, (sequences, context, heads, width)), touched)


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
    if instruction.opcode in _IN_PLACE:
        return 2.0 * computation.by_name[instruction.operands[_IN_PLACE[instruction.opcode]]].bytes
    results = [shape for shape in instruction.shapes if shape.element != "s8"]  # s8: a library's scratch space
    return sum(s.bytes for s in computation.operand_shapes(instruction)) + sum(s.bytes for s in results)


def _bytes_read(module: Module, inner: Computation, parameter: Instruction) -> float:
    """Bytes of a fusion's parameter that its users touch: all, unless every user takes a slice."""
    read = 0.0
    for user in inner.users.get(parameter.name, ()):
        if user.opcode == "bitcast":
            read += _bytes_read(module, inner, user)
        elif user.opcode in _SLICES:  # of a slice of a slice only the smaller is touched
            read += min(user.bytes, _bytes_read(module, inner, user)) if inner.users.get(user.name) else user.bytes
        elif user.opcode == "gather" and user.operands[0] == parameter.name:
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
