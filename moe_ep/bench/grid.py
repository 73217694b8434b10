"""What the studies time: layouts side by side, ways for rows to travel, and device counts for scaling."""

import dataclasses
from typing import NamedTuple

from moe_ep.checks import check, check_node_split
from moe_ep.config import Config, ConfigError, MeshConfig
from moe_ep.dispatch import check_chunks
from moe_ep.override import apply


class Layout(NamedTuple):
    """How a model stands on `devices` devices: `data` replicas of an expert axis of `ep` devices."""

    name: str  # "proposed": one expert a device and layer; "baseline": several
    experts: int
    ep: int
    data: int

    @property
    def devices(self) -> int:
        return self.ep * self.data

    def __str__(self) -> str:
        return f"{self.name} EP={self.ep}" + (f" x {self.data}" if self.data > 1 else "")


class Contender(NamedTuple):
    """One layout with its share of the batch."""

    layout: Layout
    sequences: int  # of each device
    dispatch: str = ""  # a name of bench.dispatches; "": the run's own


class Cell(NamedTuple):
    """Contenders that are timed in turns: the same work by the same devices, a scaling curve, or one alone."""

    study: str
    phase: str
    context: int  # tokens of a sequence
    contenders: tuple[Contender, ...]

    def tokens_per_microbatch(self, contender: Contender) -> int:
        """Returns the tokens that a device computes in a step."""
        return contender.sequences * (1 if self.phase == "decode" else self.context)


def make_cells(config: Config, devices: int) -> list[Cell]:
    """Returns the grid of `config.bench` on so many devices.

    Raises:
      ConfigError: more devices asked for than there are, no combination of the lists is whole, or more chunks than
        one of them has rows for.
    """
    counts = _device_counts(config, devices)
    cells = [
        Cell(study, phase, context, together)
        for study in config.bench.studies
        if study in _STUDIES
        for phase in config.bench.phases
        for context in config.bench.sequences
        for sequences in _sequences(config, phase, context)
        if (contenders := _STUDIES[study](config, devices, counts, sequences))
        for together in ([(one,) for one in contenders] if study == "dispatch" else [contenders])
    ]
    if not cells and set(config.bench.studies) & set(_STUDIES):
        raise ConfigError(
            f"--set bench.tokens_per_gpu={','.join(map(str, config.bench.tokens_per_gpu))}: allowed are multiples of one "
            f"of bench.sequences = {', '.join(map(str, config.bench.sequences))}, on at least two devices for scaling"
        )
    for cell in cells:
        _check_chunks(config, cell)
    return cells


def _check_chunks(config: Config, cell: Cell) -> None:
    for one in cell.contenders:
        sizes = {"experts": one.layout.experts, "peers": one.layout.ep, "top_k": config.model.moe.top_k}
        check_chunks(config_of(config, one).dispatch, tokens=cell.tokens_per_microbatch(one), **sizes)


def config_of(config: Config, contender: Contender) -> Config:
    """Returns the run's config with a contender's experts, mesh and dispatch."""
    layout = contender.layout
    moe = dataclasses.replace(config.model.moe, num_experts=layout.experts)
    return dataclasses.replace(
        _with_dispatch(config, contender.dispatch) if contender.dispatch else config,
        model=dataclasses.replace(config.model, moe=moe),
        mesh=MeshConfig(layout.data, layout.ep),
        train=dataclasses.replace(config.train, accumulation=1),
    )


def _with_dispatch(config: Config, name: str) -> Config:
    """Returns the config with the transport, overlap and chunks that a name of bench.dispatches gives.

    Raises:
      ConfigError: a name that says something else, or what does not go together.
    """
    transport, overlap, chunks = (name.split(":") + ["1"])[:3] if name.count(":") in (1, 2) else ("", "", "")
    fields = {"transport": transport, "overlap": overlap, "chunks": chunks}
    try:
        return check(apply(config, [f"dispatch.{field}={value}" for field, value in fields.items()]))
    except ConfigError as error:
        raise ConfigError(
            f"--set bench.dispatches={name}: allowed is TRANSPORT:OVERLAP or TRANSPORT:chunks:CHUNKS ({error})"
        ) from None


def _device_counts(config: Config, devices: int) -> list[int]:
    counts = sorted(config.bench.devices) or [2**power for power in range(1, devices.bit_length()) if 2**power <= devices]
    if counts and counts[-1] > devices:
        raise ConfigError(f"--set bench.devices={counts[-1]}: allowed is at most the {devices} devices at hand")
    return counts


def _sequences(config: Config, phase: str, context: int) -> list[int]:
    """Returns the sequences of a device; micro-batches that are not whole sequences are left out."""
    if phase == "decode":
        return list(config.bench.sequences_per_gpu)
    return [tokens // context for tokens in config.bench.tokens_per_gpu if tokens % context == 0]


def _side_by_side(config: Config, devices: int, counts: list[int], sequences: int) -> tuple[Contender, ...]:
    del counts
    experts = config.model.moe.num_experts
    degrees = _degrees(config, experts, devices)
    chosen = [degree for degree in degrees if degree == degrees[-1] or degree in config.bench.baselines]
    return tuple(Contender(_layout(experts, degree, devices), sequences) for degree in reversed(chosen))


def _dispatches(config: Config, devices: int, counts: list[int], sequences: int) -> tuple[Contender, ...]:
    """Every layout with every dispatch, half batches where there are halves; each alone, for two states may not fit."""
    layouts = [one.layout for one in _side_by_side(config, devices, counts, sequences)]
    contenders = [Contender(layout, sequences, name) for layout in layouts for name in config.bench.dispatches]
    return tuple(
        one for one in contenders if sequences % 2 == 0 or config_of(config, one).dispatch.overlap != "staggered"
    )


def _strong(config: Config, devices: int, counts: list[int], sequences: int) -> tuple[Contender, ...]:
    """The model and the global batch of the largest count, on each."""
    experts, most = config.model.moe.num_experts, counts[-1] if counts else 1
    return tuple(
        Contender(_layout(experts, _degrees(config, experts, count)[-1], count), sequences * most // count)
        for count in counts
        if most % count == 0
    )


def _weak(config: Config, devices: int, counts: list[int], sequences: int) -> tuple[Contender, ...]:
    """Experts in proportion to the devices: what a device holds and does stays."""
    most, contenders = counts[-1] if counts else 1, []
    for count in counts:
        experts, rest = divmod(config.model.moe.num_experts * count, most)
        degrees = _degrees(config, experts, count) if not rest else []
        if degrees and _can_be(config, one := Contender(_layout(experts, degrees[-1], count), sequences)):
            contenders.append(one)
    return tuple(contenders)


def _degrees(config: Config, experts: int, devices: int) -> list[int]:
    """Returns the EP degrees that divide both, in increasing order."""
    return [
        degree
        for degree in range(1, min(experts, devices) + 1)
        if experts % degree == 0 and devices % degree == 0 and _fits_nodes(degree, config.cluster.gpus_per_node)
    ]


def _fits_nodes(degree: int, gpus_per_node: int) -> bool:
    try:
        check_node_split(degree, gpus_per_node)
    except ConfigError:
        return False
    return True


def _can_be(config: Config, contender: Contender) -> bool:
    try:
        check(config_of(config, contender))
    except ConfigError:
        return False
    return True


def _layout(experts: int, ep: int, devices: int) -> Layout:
    return Layout("proposed" if ep == experts else "baseline", experts, ep, devices // ep)


_STUDIES = {"layouts": _side_by_side, "dispatch": _dispatches, "strong": _strong, "weak": _weak}
