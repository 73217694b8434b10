"""A program of one layout on its devices, with values for all it takes, ready to be stepped."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int32

from moe_ep.bench.grid import Cell, Contender, Layout, config_of
from moe_ep.bench.routings import DRAWS, draw_choices, draw_tokens
from moe_ep.config import Config
from moe_ep.dispatch import DispatchCounts, check_transport
from moe_ep.mesh import REPLICATED, compiler_options, make_mesh, place_batch, some_devices
from moe_ep.model.kv_cache import CACHE, LatentCache, make_cache, round_up_rows
from moe_ep.model.transformer import Transformer
from moe_ep.programs import CHOICES_OF_LAYERS, init_served_parameters, make_program
from moe_ep.train.state import init_state, platform_of
from moe_ep.train.step import CHOICES, with_waves
from moe_ep.train.waves import Waves


class Counted(NamedTuple):
    """What a step's routing gave."""

    expert_counts: np.ndarray  # assignments [layers, experts], over all devices
    rows_away: float  # assignments that a device has for other devices, over all layers; a mean over devices
    rows_sent: int  # of the buffers, over all layers and devices
    rows_padded: int
    rows_dropped: int


class Running:
    """One contender of a cell. A step launches its program on the next of a few batches.

    Args:
      config: of the run.
      cell: the phase and the context.
      contender: the layout and its sequences.
      served: parameters of layouts that were served before; this one's are added.
    """

    def __init__(self, config: Config, cell: Cell, contender: Contender, served: dict[Layout, Transformer]):
        self.contender, self.context = contender, cell.context
        self.config = config_of(config, contender)
        devices = some_devices(contender.layout.devices)
        self.mesh = make_mesh(self.config.mesh, self.config.cluster, contender.layout.experts, devices)
        check_transport(self.config.dispatch.transport, self.mesh)
        self.batch = contender.sequences * self.mesh.size
        self._phase, self._report = cell.phase, None
        self._waves = Waves(self.config.dispatch.waves)
        self._compiled: dict[int, jax.stages.Compiled] = {}
        self._make_values(served)

    def start(self, routing: str) -> None:
        """Takes up a routing from the state in which any other began, and runs its batches once on a program with waves enough."""
        self._renew()
        self._waves = Waves(self.config.dispatch.waves)
        self._batches = itertools.cycle(list(self._place_batches(routing)))
        while True:
            most = 0
            for _ in range(DRAWS):
                jax.block_until_ready(self.step())
                most = max(most, int(self._dispatch.waves_needed))
            if self.config.dispatch.drop or self._waves.accept(most):
                return

    def _renew(self) -> None:
        """Undoes what steps changed; serving changes nothing that a step reads."""

    def step(self) -> Array:
        """Launches the next step and returns what is ready when it is done."""
        return self._launch(self.compiled, *next(self._batches))

    def count(self) -> Counted:
        """Returns what the last step's routing gave."""
        counts, away = _count(self._choices, self.contender.layout, self.mesh)
        dispatch = jax.tree.map(int, self._dispatch)
        rows = (dispatch.rows_sent, dispatch.rows_padded, dispatch.rows_dropped)
        return Counted(np.asarray(counts), int(away) / self.mesh.size, *rows)

    @property
    def loss(self) -> float | None:
        """The loss behind the batches that `start` ran, of a step that has one: layouts and dispatches differ in rounding."""
        return None

    @property
    def waves(self) -> int:
        return self._waves.current

    @property
    def compiled(self) -> jax.stages.Compiled:
        waves = self._waves.current
        if waves not in self._compiled:
            self._compiled[waves] = self._compile(waves)
        return self._compiled[waves]

    def _compile(self, waves: int) -> jax.stages.Compiled:
        program = make_program(
            with_waves(self.config, waves), self.mesh, self._phase,
            sequences=self.contender.sequences, context=self.context, replay=True,
        )  # fmt: skip
        lowered = program.function.lower(*program.arguments)
        return lowered.compile(compiler_options=compiler_options(platform_of(self.mesh)))

    def _place_batches(self, routing: str):
        """Yields (tokens, choices) on the devices."""
        length, tokens = self._token_shape()
        batches = draw_tokens(self.config, routing, self.batch, length)
        for ids, choices in zip(batches, draw_choices(self.config, routing, tokens), strict=True):
            yield self._place(ids, choices)

    @property
    def _dispatch(self) -> DispatchCounts:
        return self._report.dispatch

    @property
    def _choices(self) -> Array:
        return self._report.choices


class Prefill(Running):
    """Whole prompts, all as long as the context."""

    def _make_values(self, served: dict[Layout, Transformer]) -> None:
        self.parameters = _take_parameters(self, served)
        self._bias = _zero_bias(self)
        self._lengths = place_batch(np.full(self.batch, self.context, np.int32), self.mesh)

    def _token_shape(self) -> tuple[int, int]:
        return self.context, self.batch * self.context

    def _place(self, ids: np.ndarray, choices: np.ndarray) -> tuple:
        return place_batch(ids, self.mesh), place_batch(choices, self.mesh, CHOICES_OF_LAYERS)

    def _launch(self, compiled: Any, tokens: Array, choices: Array) -> Array:
        logits, _, self._report = compiled(self.parameters, tokens, self._lengths, self._bias, choices)
        return logits


class Decode(Running):
    """One token of every sequence, the last of its context; each step writes the same row of the cache."""

    def _make_values(self, served: dict[Layout, Transformer]) -> None:
        self.parameters = _take_parameters(self, served)
        self._bias = _zero_bias(self)
        self._lengths = place_batch(np.full(self.batch, self.context - 1, np.int32), self.mesh)
        self._held = {"cache": _random_cache(self)}

    def _token_shape(self) -> tuple[int, int]:
        return 1, self.batch

    def _place(self, ids: np.ndarray, choices: np.ndarray) -> tuple:
        return place_batch(ids[:, 0], self.mesh), place_batch(choices, self.mesh, CHOICES_OF_LAYERS)

    def _launch(self, compiled: Any, tokens: Array, choices: Array) -> Array:
        out = compiled(self.parameters, tokens, self._held, self._lengths, self._bias, choices)
        logits, cache, self._report = out
        self._held = {"cache": cache}
        return logits


class Train(Running):
    """A whole step, its update among it."""

    def _make_values(self, served: dict[Layout, Transformer]) -> None:
        served.clear()  # a state needs the room
        self._state = init_state(self.config, self.mesh)
        self._is_new = True

    def _renew(self) -> None:
        if not self._is_new:  # a trained router would choose otherwise, and not the same in every layout
            self._state = None
            self._state = init_state(self.config, self.mesh)

    def start(self, routing: str) -> None:
        super().start(routing)
        self._loss = float(self._report.loss)

    @property
    def loss(self) -> float | None:
        return self._loss

    @property
    def parameters(self) -> object:
        return self._state.parameters

    def _token_shape(self) -> tuple[int, int]:
        return self.context + 1, self.batch * self.context

    def _place(self, ids: np.ndarray, choices: np.ndarray) -> tuple:
        return place_batch(ids, self.mesh), place_batch(choices[None], self.mesh, CHOICES)

    def _launch(self, compiled: Any, tokens: Array, choices: Array) -> Array:
        self._is_new = False
        self._state, report = compiled(self._state, tokens, choices)
        self._report = report.batch
        return report.batch.loss

    @property
    def _choices(self) -> Array:
        return self._report.choices[0]


def _take_parameters(running: Running, served: dict[Layout, Transformer]) -> Transformer:
    layout = running.contender.layout
    if layout not in served:
        served[layout] = init_served_parameters(running.config, running.mesh)
    return served[layout]


def _zero_bias(running: Running) -> Array:
    model = running.config.model
    bias = np.zeros((model.moe_layers, model.moe.num_experts), np.float32)
    return place_batch(bias, running.mesh, REPLICATED)


def _random_cache(running: Running) -> LatentCache:
    """Returns a cache of random rows; every layer has the same ones, so little is drawn."""
    model = running.config.model
    shapes = jax.eval_shape(lambda: make_cache(model, running.batch, round_up_rows(running.context)))

    def fill(leaf: jax.ShapeDtypeStruct) -> Array:
        rows = jax.random.normal(jax.random.key(running.config.seed), leaf.shape[1:], leaf.dtype)
        return jnp.broadcast_to(rows[None], leaf.shape)

    make = jax.jit(lambda: jax.tree.map(fill, shapes), out_shardings=NamedSharding(running.mesh, CACHE))
    return make()


@functools.partial(jax.jit, static_argnums=(1, 2))
def _count(choices: Int32[Array, "L T K"], layout: Layout, mesh: Mesh) -> tuple[Array, Array]:
    """Returns the assignments of every expert, and how many leave their device; tokens are split over all devices."""
    layers, tokens, _ = choices.shape
    layer = jnp.arange(layers, dtype=jnp.int32)[:, None, None]
    counts = jnp.zeros((layers, layout.experts), jnp.int32).at[layer, choices].add(1)
    own = jnp.arange(tokens, dtype=jnp.int32) // (tokens // layout.devices) % layout.ep
    away = jnp.sum(choices // (layout.experts // layout.ep) != own[None, :, None], dtype=jnp.int32)
    return jax.lax.with_sharding_constraint((counts, away), NamedSharding(mesh, REPLICATED))


RUNNING = {"prefill": Prefill, "decode": Decode, "train": Train}
