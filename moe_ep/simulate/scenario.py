"""What is predicted: model, cluster, layout, workload, routing and the software that runs it."""

import dataclasses
import functools

from moe_ep.config import ConfigError, ModelConfig
from moe_ep.cost import network
from moe_ep.cost.kernels import AssumedKernels, KernelTable, load_table
from moe_ep.cost.recipe import Recipe
from moe_ep.cost.routing import Routing
from moe_ep.cost.units import Number
from moe_ep.cost.work import BF16, Precision

OVERLAPS = ("none", "chunks", "staggered", "forward_backward")
PLACEMENTS = ("contiguous", "balanced", "co_activated")
TRANSPORTS = ("ragged", "all_to_all", "all_gather", "two_level")
PHASES = ("prefill", "decode", "train")


class DoesNotFit(ConfigError):
    """A layout whose memory exceeds the GPU's; `missing_bytes` says by how much."""

    def __init__(self, message: str, missing_bytes: Number) -> None:
        super().__init__(message)
        self.missing_bytes = missing_bytes


@dataclasses.dataclass(frozen=True)
class Stack:
    """The software that runs the layout: its kernels, its network library, its types.

    Attributes:
      step_factor: measured step over the sum of its modelled parts, of a calibrated
        system; 1 where nothing was fitted.
      expert_launch_s: added to each call of the experts (dispatch of three kernels).
      overlap_compute_share: SMs left to compute while communication kernels run.
      is_compiled: this project's programs, with the passes that moe_ep/cost/program.py counts.
      recipe: of a published system that trains; moe_ep/cost/recipe.py counts its passes.
    """

    name: str
    kernels: KernelTable | AssumedKernels
    network: network.NetworkParameters
    precision: Precision = BF16
    step_factor: Number = 1.0
    expert_launch_s: Number = 0.0
    overlap_compute_share: Number = 1.0
    is_compiled: bool = False
    recipe: Recipe | None = None


@functools.lru_cache(maxsize=None)
def own_stack() -> Stack:
    """Returns this project's programs: BF16, its kernels as measured on one H200, NCCL's collectives."""
    return Stack("moe_ep", load_table("h200_moe_ep"), network.NCCL, is_compiled=True)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the model is spread.

    A pipeline stage has gpus / pp GPUs; expert groups of `ep` GPUs are replicated
    over it; attention is split over `tp` GPUs of a node.

    Attributes:
      slots: experts of a layer on each GPU; None is experts / ep, more means replicas.
      placement: "contiguous"; "balanced" (replicas and packing from the routing's shares);
        "co_activated" (from a trace's pairs).
      split_attention_weights: over the GPUs of a node, gathered before use.
      overlap: "staggered" staggers two micro-batches; "forward_backward" (training) lets
        one micro-batch's forward pass cover another's backward pass.
      schedule: of a training pipeline: "1f1b" or "dualpipe".
      interleaved: virtual stages of the 1f1b schedule on each GPU.
    """

    gpus: int
    ep: int
    tp: int = 1
    pp: int = 1
    overlap: str = "none"
    chunks: int = 1
    transport: str = "all_to_all"
    margin_sigmas: Number = 5.0
    slots: int | None = None
    placement: str = "contiguous"
    split_attention_weights: bool = False
    schedule: str = "1f1b"
    interleaved: int = 1

    @property
    def stage_gpus(self) -> int:
        return self.gpus // self.pp

    @property
    def expert_replicas(self) -> int:
        return self.stage_gpus // self.ep


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a step does.

    Attributes:
      tokens_per_gpu: of one micro-batch, in prefill and training.
      sequences_per_gpu: in decode.
      verified, accepted: tokens of a sequence that a decode step computes and keeps
        (more than one with speculation).
      context: tokens of a sequence (prefill, training), or in the cache (decode).
      paged_keys: of prefill in a serving engine: tokens that a sequence's pages have room
        for, which its queries are masked against; 0: its own tokens alone.
      micro_batches: of one training step.
    """

    phase: str
    context: int
    tokens_per_gpu: Number = 0.0
    sequences_per_gpu: Number = 0.0
    verified: int = 1
    accepted: Number = 1.0
    micro_batches: int = 1
    paged_keys: int = 0

    @property
    def tokens(self) -> Number:
        """Tokens that one GPU computes in a micro-batch."""
        return self.sequences_per_gpu * self.verified if self.phase == "decode" else self.tokens_per_gpu

    @property
    def tokens_kept(self) -> Number:
        """Tokens that a step of one GPU advances by."""
        if self.phase == "decode":
            return self.sequences_per_gpu * self.accepted
        return self.tokens_per_gpu * (self.micro_batches if self.phase == "train" else 1)


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One prediction's whole input."""

    model: ModelConfig
    fabric: network.Fabric
    layout: Layout
    workload: Workload
    routing: Routing
    stack: Stack
    remat: str = "none"  # what the backward pass computes again, as ModelConfig.remat
    ignore_memory: bool = False

    @property
    def slots(self) -> int:
        return self.layout.slots or self.model.moe.num_experts // self.layout.ep


def check(scenario: Scenario) -> Scenario:
    """Returns the scenario unchanged.

    Raises:
      ConfigError: degrees that do not divide, EP above the GPUs or the experts, no room for a replica.
    """
    layout, model, width = scenario.layout, scenario.model, scenario.fabric.gpus_per_node
    experts, phase = model.moe.num_experts, scenario.workload.phase
    _require(layout.overlap in OVERLAPS, "simulate.overlap", layout.overlap, "one of " + ", ".join(OVERLAPS))
    _require(layout.transport in TRANSPORTS, "simulate.transport", layout.transport, "one of " + ", ".join(TRANSPORTS))
    _require(phase in PHASES, "simulate.phase", phase, "one of " + ", ".join(PHASES))
    _require(layout.gpus % layout.pp == 0, "simulate.pp", layout.pp, f"a divisor of the {layout.gpus} GPUs")
    _require(layout.pp <= model.layers, "simulate.pp", layout.pp, f"at most the {model.layers} layers")
    _require(layout.ep <= layout.stage_gpus, "mesh.expert", layout.ep,
             f"at most the {layout.stage_gpus} GPUs of a stage ({layout.gpus} GPUs / {layout.pp} stages)")  # fmt: skip
    _require(layout.stage_gpus % layout.ep == 0, "mesh.expert", layout.ep, f"a divisor of {layout.stage_gpus} GPUs")
    _require(layout.ep <= width or layout.ep % width == 0, "mesh.expert", layout.ep,
             f"at most, or a multiple of, the {width} GPUs of a node")  # fmt: skip
    _require(width % layout.tp == 0 and layout.tp <= layout.stage_gpus, "simulate.tp", layout.tp,
             f"a divisor of the {width} GPUs of a node")  # fmt: skip
    heads = model.attention.heads
    _require(heads % layout.tp == 0, "simulate.tp", layout.tp, f"a divisor of model.attention.heads = {heads}")
    _require(layout.slots is not None or experts % layout.ep == 0, "mesh.expert", layout.ep,
             f"a divisor of model.moe.num_experts = {experts}, unless simulate.slots is given")  # fmt: skip
    _require(scenario.slots * layout.ep >= experts, "simulate.slots", scenario.slots,
             f"at least {-(-experts // layout.ep)}: {experts} experts on {layout.ep} GPUs")  # fmt: skip
    _require(layout.placement in PLACEMENTS, "simulate.placement", layout.placement, "one of " + ", ".join(PLACEMENTS))
    _require(layout.overlap != "forward_backward" or scenario.workload.phase == "train", "simulate.overlap",
             layout.overlap, "forward_backward only with simulate.phase=train")  # fmt: skip
    _require(layout.placement != "co_activated" or scenario.routing.together is not None, "simulate.placement",
             layout.placement, "co_activated only with simulate.routing=trace:FILE")  # fmt: skip
    return scenario


def _require(condition: bool, flag: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"--set {flag}={value}: allowed is {allowed}")
