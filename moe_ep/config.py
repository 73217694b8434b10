"""What a run is: frozen dataclasses, one per part, and what is made of them.

Every module receives its own part (`AttentionConfig`, `MoEConfig`, ...), never
the whole. A field whose type is a `Literal` states its allowed values there.
"""

import dataclasses
import json
import typing
from typing import Literal

from moe_ep.hardware import GPUS, Gpu


class ConfigError(ValueError):
    """A wrong value or combination; the message is one line: flag, value, what is allowed."""


Activation = Literal["gelu", "silu_gated"]


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Multi-Head Latent Attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""

    heads: int = 128
    nope_dim: int = 40  # per head, without position
    rope_dim: int = 16  # per head, rotary; the key's is shared by all heads
    value_dim: int = 56
    latent_dim: int = 3584
    query_latent_dim: int = 0  # 0: queries come straight from the width
    rope_theta: float = 10_000.0
    rope_layout: Literal["halves", "interleaved"] = "halves"  # DeepSeek checkpoints interleave
    weights: Literal["replicated", "split"] = "replicated"  # split over the GPUs of a node
    implementation: Literal["auto", "xla", "cudnn"] = "auto"

    @property
    def query_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    @property
    def cache_dim(self) -> int:
        """Values cached per token and layer: the normed latent and the rotated key."""
        return self.latent_dim + self.rope_dim


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Routed experts and their router."""

    num_experts: int = 16
    top_k: int = 2
    hidden: int = 18432
    activation: Activation = "gelu"
    shared_experts: int = 0
    # softmax: over all experts, before the choice. softmax_chosen: over the chosen ones
    # only (Mixtral). sigmoid: DeepSeek-V3. They are different functions.
    score: Literal["softmax", "softmax_chosen", "sigmoid"] = "softmax"
    normalize: bool = True  # weights of the chosen sum to 1
    scaling_factor: float = 1.0  # multiplies the weights
    groups: int = 1  # group-limited routing: experts in this many groups ...
    groups_kept: int = 1  # ... of which a token may use these many
    group_score: Literal["max", "top2_sum"] = "top2_sum"  # top2_sum where a bias exists (DeepSeek-V3)
    # Of the experts' products; auto reads the table measured for the GPU.
    implementation: Literal["auto", "reference", "dense", "tiled", "scanned", "mosaic"] = "auto"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The transformer: `dense_layers` dense blocks, then MoE blocks up to `layers`."""

    layers: int = 61
    dense_layers: int = 3
    width: int = 7168
    hidden: int = 18432
    activation: Activation = "gelu"
    vocabulary: int = 50304
    norm_epsilon: float = 1e-6
    # Standard deviation of the embedding's first values. Layers write about 1 / sqrt(2 layers) to the stream:
    # far below that, what attention averages over all tokens outweighs the token itself.
    embedding_scale: float = 0.02
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the computation; master weights are float32
    # What the backward pass computes again: nothing; everything but what crossed the
    # network; whole blocks (the network's traffic too).
    remat: Literal["none", "keep_dispatch", "block"] = "keep_dispatch"
    # In training, write the layers out one after another instead of looping over them: compiling takes as many
    # times longer; nothing is copied into and out of stacks over the layers, and while one layer goes back the
    # gradients of the one behind it are summed over its copies.
    unroll: bool = False
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig = MoEConfig()

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices: `data` replicas of an expert axis of `expert` devices. None takes what is there."""

    data: int | None = None
    expert: int | None = None


# Tokens on a device from which half batches pay: below it products wait for their weights, which two halves
# read twice (predicted on five GPUs, results/LOG.md).
STAGGERED_FROM_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class DispatchConfig:
    """How rows travel between tokens and experts."""

    transport: Literal["all_to_all", "all_gather", "ragged"] = "all_to_all"
    # auto: staggered where a program's batch is large enough to gain by it, else none (`overlap_for`).
    overlap: Literal["auto", "none", "chunks", "staggered"] = "chunks"
    chunks: int = 1
    waves: int = 1  # the waves the first compiled program has; it grows when routing needs it
    margin_sigmas: float = 5.0  # a buffer holds mean + margin sqrt(mean) + 1 rows
    drop: bool = False  # True: rows beyond the program's waves are dropped and counted

    def overlap_for(self, tokens: float, sequences: float) -> str:
        """Returns the overlap of a program, "auto" resolved.

        Args:
          tokens: that each device computes in a micro-batch.
          sequences: that they belong to; half of them make a half batch.
        """
        if self.overlap != "auto":
            return self.overlap
        halves = sequences > 0 and sequences % 2 == 0
        return "staggered" if halves and tokens >= STAGGERED_FROM_TOKENS else "none"


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
    """The rule that moves the router's bias so that experts receive equal load."""

    rule: Literal["none", "load_fraction", "sign"] = "load_fraction"
    rate: float = 0.01  # load_fraction: in units of the mean score; sign: of the score itself
    interval_steps: int = 1
    interval_ms: float | None = None  # turned into steps once, from measured step time


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = 3e-4
    final_fraction: float = 0.1  # of the peak, at the last step
    warmup_steps: int = 20
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    steps: int = 200
    batch_sequences: int = 16  # global
    sequence: int = 128
    accumulation: int = 1  # micro-batches whose gradients make one update
    router_z_loss: float = 0.0
    validation_every: int = 50  # steps; 0: never
    validation_batches: int = 2
    checkpoint_every: int = 100  # steps, and at the end; 0: never
    checkpoints_kept: int = 2
    sample_tokens: int = 120  # generated at the end as a sample; 0: none
    optimizer: OptimizerConfig = OptimizerConfig()


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """What `--mode=generate` completes, and how it draws tokens; the seed is the run's."""

    prompt: str = ""  # one prompt; "": prompt_file
    prompt_file: str = ""  # a prompt a line; "": standard input
    # jsonl: a line is an object with "prompt" and, if it likes, "id", "max_tokens", "temperature",
    # "top_k", "top_p", "seed". auto: a file named .jsonl is, everything else is text.
    prompt_format: Literal["auto", "text", "jsonl"] = "auto"
    max_tokens: int = 64  # of a completion; the end of a text ends it earlier
    temperature: float = 0.0  # 0: always the most likely token
    top_k: int = 0  # draw from so many most likely tokens; 0: from all
    top_p: float = 1.0  # draw from the most likely tokens that together have this probability
    sequences_per_device: int = 8  # that decode at once, at most
    context: int | None = None  # tokens of the longest prompt and its completion, in whole pages of 64; none: as needed
    prefill_tokens: int | None = None  # of a step on one device; none: the most that fits, up to 4096
    cache_tokens_per_device: int | None = None  # none: the most that fits and is of use


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where tokens come from."""

    # "": the English that every CPython carries (pydoc_data.topics). Else a .txt or .jsonl
    # file, a directory of those, "synthetic:uniform" or "synthetic:zipf:EXPONENT".
    path: str = ""
    text_field: str = "text"
    tokenizer: str = "bytes"  # or the path of a tokenizer.json
    validation_fraction: float = 0.05


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """The machines a run is laid out for; emulated and predicted runs take their shape from here."""

    gpu: str = "paper_h100"
    gpus_per_node: int = 8
    nics_per_node: int = 8  # 8: one for each GPU; 1: all GPUs of a node share one
    nic_gigabits_per_s: float = 200.0

    @property
    def device(self) -> Gpu:
        return GPUS[self.gpu]


@dataclasses.dataclass(frozen=True)
class AotConfig:
    """What `--mode=aot` compiles."""

    program: Literal["prefill", "decode", "train"] = "prefill"
    tokens_per_gpu: int = 2048
    context: int = 1024
    search: bool = False  # also the largest batch and the longest context that fit
    compare: bool = False  # also every transport and overlap beside this one


@dataclasses.dataclass(frozen=True)
class SimulateConfig:
    """What `--mode=simulate` predicts. GPUs are mesh.data x mesh.expert x simulate.pp."""

    point: str = ""  # the id of a published measurement, or "all"
    published_values: str = ""  # a CSV with columns id and value that predictions are compared with
    schedule: str = ""  # a schedule that --mode=aot wrote: walk it instead
    expert_row_share: float | None = None  # of a schedule: expert rows that hold tokens; none: under even routing
    sweep: Literal[
        "none", "strong", "weak", "batch", "context", "skew", "nics", "memory", "break_even", "search"
    ] = "none"
    results: str = "results"  # where the tables of all points and of the claims are written
    phase: Literal["prefill", "decode", "train"] = "prefill"
    tokens_per_gpu: int | None = 2048  # of a micro-batch; none: the most that fits
    sequences_per_gpu: int | None = 8  # in decode; none: the most that fits
    context: int = 1024  # tokens of a sequence, in decode tokens in the cache
    micro_batches: int = 1  # of a training step
    tp: int = 1  # attention split over so many GPUs of a node
    pp: int = 1  # pipeline stages
    routing: str = "uniform"  # balanced, uniform, zipf:EXPONENT, power_law:ALPHA, histogram:FILE, trace:FILE
    placement: Literal["contiguous", "balanced", "co_activated"] = "contiguous"
    slots: int | None = None  # experts of a layer on each GPU; more than experts / EP means replicas
    # "dispatch" takes what the program's own dispatch is set to.
    transport: Literal["dispatch", "ragged", "all_to_all", "all_gather", "two_level"] = "dispatch"
    overlap: Literal["dispatch", "none", "chunks", "staggered", "forward_backward"] = "dispatch"
    efficiency: Literal["measured", "assumed"] = "measured"  # assumed: the reference experiment's own percentages
    ignore_memory: bool = False  # time a layout that does not fit, as a counterfactual
    latency_ms: float | None = None  # search: the most that a token may take


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What `--mode=bench` times. Every combination of the lists is a row; "per GPU" is per device, emulated ones too."""

    # layouts: one expert a device beside the baselines, on all devices. strong: one model and one
    # global batch on more and more devices. weak: experts grow with the devices. dispatch: ways for
    # rows to travel, on those layouts. all_to_all: the transports' collectives alone, over message sizes.
    studies: tuple[Literal["layouts", "strong", "weak", "dispatch", "all_to_all"], ...] = ("layouts", "strong", "weak")
    phases: tuple[Literal["prefill", "decode", "train"], ...] = ("prefill", "decode", "train")
    baselines: tuple[int, ...] = (4, 8, 16)  # EP degrees; those that divide devices and experts are timed
    devices: tuple[int, ...] = ()  # of the scaling studies; none: doubled from 2 up to all
    dispatches: tuple[str, ...] = (  # of the dispatch study: TRANSPORT:OVERLAP, or TRANSPORT:chunks:CHUNKS
        "all_to_all:none", "all_to_all:chunks:2", "all_to_all:staggered", "all_gather:none", "all_gather:staggered",
        "ragged:none", "ragged:staggered",
    )  # fmt: skip
    sequences: tuple[int, ...] = (128,)  # tokens of one; in decode those it has
    tokens_per_gpu: tuple[int, ...] = (512,)  # of a micro-batch in prefill and training
    sequences_per_gpu: tuple[int, ...] = (8,)  # of a micro-batch in decode, one token each
    # uniform and zipf:EXPONENT: choices are drawn and replayed; text: the run's own router on its data.
    routing: tuple[str, ...] = ("uniform", "zipf:1.0", "text")
    turns: int = 3  # the layouts take turns, in changing order ...
    steps: int = 4  # ... of so many steps each
    ceilings: bool = True  # on a GPU, first what a copy and a product reach at most
    profile: bool = False  # on a GPU, also how long it idles between kernels
    predict: bool = False  # also the full-size comparison, by the simulator
    transports: tuple[Literal["all_to_all", "all_gather", "ragged"], ...] = ("all_to_all", "all_gather", "ragged")
    smallest_bytes: int = 2**14  # messages of all_to_all, four times the last up to ...
    largest_bytes: int = 2**22
    results: str = ""  # a folder that the finished tables are copied to; none: the work directory only


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    dispatch: DispatchConfig = DispatchConfig()
    balance: BalanceConfig = BalanceConfig()
    train: TrainConfig = TrainConfig()
    generate: GenerateConfig = GenerateConfig()
    data: DataConfig = DataConfig()
    cluster: ClusterConfig = ClusterConfig()
    aot: AotConfig = AotConfig()
    simulate: SimulateConfig = SimulateConfig()
    bench: BenchConfig = BenchConfig()
    seed: int = 0


def cpu8_tiny() -> Config:
    """Returns the run of someone who names none: 8 experts, real text, minutes on two CPU cores."""
    attention = AttentionConfig(heads=4, nope_dim=24, rope_dim=8, value_dim=32, latent_dim=64)
    model = ModelConfig(
        layers=4,
        dense_layers=1,
        width=128,
        hidden=256,
        vocabulary=320,  # 256 bytes and the end of a text, padded to a multiple of 64
        dtype="float32",  # CPUs have no fast BF16
        remat="none",
        attention=attention,
        moe=MoEConfig(num_experts=8, top_k=2, hidden=256, implementation="tiled"),  # computes no padding
    )
    return Config(
        model=model,
        # Buffers for any routing in one wave: the uneven first steps then need no second program.
        dispatch=DispatchConfig(margin_sigmas=24.0),
        balance=BalanceConfig(rate=0.06),
        train=TrainConfig(
            steps=200, batch_sequences=16, sequence=128, optimizer=OptimizerConfig(learning_rate=3e-3)
        ),
    )


def require(condition: bool, flag: str, value: object, allowed: str) -> None:
    """Raises ConfigError naming the flag, its value and what is allowed, unless the condition holds."""
    if not condition:
        raise ConfigError(f"--set {flag}={value}: allowed is {allowed}")


def to_json(config: Config) -> str:
    """Returns the resolved config as indented JSON, one object per part."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_dict(kind: type, values: dict) -> typing.Any:
    """Returns the dataclass `kind` of a dictionary as `to_json` writes it; fields that it lacks have their defaults.

    Raises:
      KeyError: a field that the dataclass does not have.
    """
    types, fields = typing.get_type_hints(kind), {}
    for name, value in values.items():
        if dataclasses.is_dataclass(types[name]):
            value = from_dict(types[name], value)
        fields[name] = tuple(value) if isinstance(value, list) else value
    return kind(**fields)


def flatten(config: object, prefix: str = "") -> typing.Iterator[tuple[str, object, object]]:
    """Yields (dotted name, declared type, value) of every leaf field."""
    types = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from flatten(value, name + ".")
        else:
            yield name, types[field.name], value
