"""The training loop: batches in, steps on the program with waves enough, metrics and checkpoints out."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from moe_ep import metrics
from moe_ep.config import Config, ConfigError, require, to_json
from moe_ep.parameter_counts import parameters_by_part
from moe_ep.data import Dataset, make_dataset
from moe_ep.dispatch import check_chunks, check_transport
from moe_ep.hardware import gpu_of_device_kind
from moe_ep.mesh import expert_degree, is_first_process, peak_bytes, place_batch
from moe_ep.train.ahead import Accepted, Launcher
from moe_ep.train.balance import interval_from_ms
from moe_ep.train.checkpoint import Checkpoints
from moe_ep.train.record import Follower, Recorder
from moe_ep.train.sample import sample_text
from moe_ep.train.state import TrainState, abstract_state, init_state
from moe_ep.train.step import make_evaluate, make_step, with_waves
from moe_ep.train.summary import summarize_run
from moe_ep.train.waves import Waves

_RECENT_STEPS = 50  # that end-of-run averages are taken over
_TIMED_STEPS = 10  # measured before an interval in ms is turned into steps
_MOST_SKIPPED = 3  # updates skipped in a row for a gradient that is not finite


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says at which step and why."""


class _Run(NamedTuple):
    """What one run's steps share."""

    config: Config
    mesh: Mesh
    evaluations: Callable[[int], Callable]  # waves -> program
    launcher: Launcher
    recorder: Recorder | Follower


def train(config: Config, mesh: Mesh, workdir: Path) -> dict:
    """Trains to `config.train.steps`, from the work directory's newest checkpoint if it has one.

    Returns:
      The facts of the run under the keys of the JSON result.

    Raises:
      ConfigError: the batch does not divide, or the directory holds another model's run.
      TrainingStopped: gradients were not finite several steps in a row.
    """
    check_transport(config.dispatch.transport, mesh)
    _check_batch(config, mesh)
    _claim(workdir, config)
    dataset, validation = (_dataset(config, split) for split in ("train", "validation"))
    checkpoints = Checkpoints(workdir / "checkpoints", config.train.checkpoints_kept)
    state, first_step = _start(config, mesh, checkpoints, dataset)
    for line in summarize_run(config, mesh, dataset.statistics, workdir):
        print(line, flush=True)
    if first_step:
        print(f"resumed after step {first_step} of {config.train.steps}", flush=True)
    record = Recorder if is_first_process() else Follower
    recorder = record(workdir, first_step, config.train.steps)
    steps = functools.cache(lambda waves: make_step(with_waves(config, waves), mesh))
    evaluations = functools.cache(lambda waves: make_evaluate(with_waves(config, waves), mesh))
    launcher = Launcher(config.dispatch, mesh, steps, recorder.say)
    run = _Run(config, mesh, evaluations, launcher, recorder)
    try:
        state = _run_steps(run, state, first_step, dataset, validation, checkpoints)
    finally:  # an interrupted run keeps its last checkpoint and its picture
        checkpoints.close()
        picture = recorder.close()
    result = _result(config, recorder.history, workdir) | {"peak_bytes_per_device": peak_bytes(mesh)}
    _say_goodbye(config, mesh, state, dataset, result, picture)
    return result


def _run_steps(
    run: _Run, state: TrainState, first_step: int, dataset: Dataset, validation: Dataset, checkpoints: Checkpoints
) -> TrainState:
    train, launcher, skipped, step_ms = run.config.train, run.launcher, 0, []
    for step in range(first_step + 1, train.steps + 1):
        state = launcher.launch(state, place_batch(next(dataset), run.mesh), step)
        settle = _needs_state(run.config, step, len(step_ms))
        while len(launcher) > (0 if settle else 1):
            state, accepted = launcher.read(state)
            skipped = _count_skipped(run, accepted, skipped)
            validate = accepted.step == step and _is_due(train.validation_every, step)
            _record(run, accepted, _validate(run, state, validation) if validate else None)
            # A step that compiled a program says nothing about how long a step takes.
            step_ms += [accepted.elapsed_ms] if accepted.attempts == 1 and accepted.step > first_step + 1 else []
        if settle:
            state = _set_interval(run, state, step, step_ms)
        if train.checkpoint_every and (step == train.steps or _is_due(train.checkpoint_every, step)):
            run.recorder.save_load()
            checkpoints.save(step, state, {"data": dataset.get_state()})
    return state


def _needs_state(config: Config, step: int, timed: int) -> bool:
    """Returns whether something needs the state right after this step, so that the next may not be launched yet."""
    unset = config.balance.interval_ms is not None and timed <= _TIMED_STEPS
    every = (config.train.validation_every, config.train.checkpoint_every)
    return unset or step == config.train.steps or any(_is_due(one, step) for one in every)


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _record(run: _Run, accepted: Accepted, validation_loss: float | None) -> None:
    batch = accepted.report.batch
    run.recorder.step(_line(run, accepted, validation_loss), np.asarray(batch.expert_counts))
    if accepted.step == run.config.train.steps and batch.choices.is_fully_addressable:
        run.recorder.save_choices(np.asarray(batch.choices))


def _validate(run: _Run, state: TrainState, validation: Dataset) -> float | None:
    """Returns the mean loss over the same first batches of the validation split every time."""
    validation.set_state(validation.get_state() | {"sequences_read": 0})
    losses = []
    for _ in range(run.config.train.validation_batches):
        tokens = place_batch(next(validation), run.mesh)
        waves = Waves(run.launcher.waves.current)
        while True:
            loss, needed = run.evaluations(waves.current)(state.parameters, tokens, state.bias)
            if run.config.dispatch.drop or waves.accept(int(needed)):
                break
        losses.append(float(loss))
    return float(np.mean(losses)) if losses else None


def _count_skipped(run: _Run, accepted: Accepted, skipped: int) -> int:
    """Returns how many updates in a row were skipped, and stops the run at too many."""
    if accepted.report.finite:
        return 0
    step = accepted.step
    run.recorder.say(f"step {step}: loss or gradient is not finite; the update was skipped")
    if skipped + 1 >= _MOST_SKIPPED:
        raise TrainingStopped(f"step {step}: {_MOST_SKIPPED} updates in a row had a gradient that is not finite")
    return skipped + 1


def _line(run: _Run, accepted: Accepted, validation_loss: float | None) -> dict:
    """Returns one step's metrics as plain numbers."""
    config, report, batch, elapsed_ms = run.config, accepted.report, accepted.report.batch, accepted.elapsed_ms
    counts = np.asarray(batch.expert_counts)
    tokens_per_s = config.train.batch_sequences * config.train.sequence / elapsed_ms * 1e3
    flops = metrics.training_flops_per_token(config.model, config.train.sequence)
    gpu = gpu_of_device_kind(run.mesh.devices.flat[0].device_kind)
    return {
        "step": accepted.step,
        "loss": float(batch.loss),
        "gradient_norm": float(report.gradient_norm),
        "tokens_per_s": tokens_per_s,
        "ms_per_step": elapsed_ms,
        "mfu": metrics.mfu(tokens_per_s, flops, gpu, run.mesh.size),
        "max_over_mean_load": float(metrics.max_over_mean(counts).mean()),
        "max_over_mean_load_worst_layer": float(metrics.max_over_mean(counts).max()),
        "load_cv": float(metrics.load_cv(counts).mean()),
        "max_bias": float(report.max_bias),
        "rows_sent": int(batch.dispatch.rows_sent),
        "rows_padded": int(batch.dispatch.rows_padded),
        "rows_dropped": int(batch.dispatch.rows_dropped),
        "waves": int(batch.dispatch.waves_needed),
        "validation_loss": validation_loss,
    }


def _set_interval(run: _Run, state: TrainState, step: int, step_ms: list[float]) -> TrainState:
    """Turns a balance interval in ms into steps, once; the checkpoint keeps it, so a resumed run has the same."""
    interval_ms = run.config.balance.interval_ms
    if interval_ms is None or len(step_ms) != _TIMED_STEPS or int(state.balance_interval) > 0:
        return state
    interval = interval_from_ms(interval_ms, float(np.median(step_ms)))
    interval = int(multihost_utils.broadcast_one_to_all(np.int32(interval)))
    run.recorder.say(f"step {step}: the balance interval of {interval_ms:g} ms is {interval} steps from here on")
    placed = jax.device_put(jnp.int32(interval), state.balance_interval.sharding)
    return state._replace(balance_interval=placed)


def _start(
    config: Config, mesh: Mesh, checkpoints: Checkpoints, dataset: Dataset
) -> tuple[TrainState, int]:
    """Returns the state to go on from and the steps it has behind it."""
    latest = checkpoints.latest_step()
    if latest is None:
        return init_state(config, mesh), 0
    state, extra = checkpoints.restore(latest, abstract_state(config, mesh))
    dataset.set_state(extra["data"])
    return state, latest


def _dataset(config: Config, split: str) -> Dataset:
    return make_dataset(
        config.data,
        vocabulary=config.model.vocabulary,
        batch_sequences=config.train.batch_sequences,
        sequence=config.train.sequence,
        seed=config.seed,
        split=split,
    )


def _check_batch(config: Config, mesh: Mesh) -> None:
    train, moe = config.train, config.model.moe
    require(train.batch_sequences % (mesh.size * train.accumulation) == 0, "train.batch_sequences",
            train.batch_sequences, f"a multiple of {mesh.size} devices x train.accumulation = {train.accumulation}")  # fmt: skip
    tokens = train.batch_sequences * train.sequence // (mesh.size * train.accumulation)
    check_chunks(config.dispatch, experts=moe.num_experts, peers=expert_degree(mesh), tokens=tokens, top_k=moe.top_k)


def _claim(workdir: Path, config: Config) -> None:
    """Writes the resolved config, in the first process; a directory with another model's or data's run is refused."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--workdir={workdir}: allowed is a directory that can be written ({error.strerror})") from None
    path = workdir / "config.json"
    new = json.loads(to_json(config))
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        for part in ("model", "data", "seed"):
            if old.get(part) != new[part]:
                raise ConfigError(
                    f"--workdir={workdir}: allowed is a new directory, or one whose config.json has the same {part}"
                )
    if is_first_process():  # in one move: the others may be reading it
        (workdir / "config.json.new").write_text(to_json(config), encoding="utf-8")
        (workdir / "config.json.new").replace(path)


def _result(config: Config, history: list[dict], workdir: Path) -> dict:
    recent = history[-_RECENT_STEPS:]
    ms_per_step = metrics.median([line["ms_per_step"] for line in recent])
    tokens = config.train.batch_sequences * config.train.sequence
    return {
        "loss_first": history[0]["loss"],
        "loss_last": history[-1]["loss"],
        "validation_loss": next((x for line in reversed(history) if (x := line["validation_loss"]) is not None), None),
        "steps": history[-1]["step"],
        "tokens_per_s": tokens / ms_per_step * 1e3,
        "ms_per_step": ms_per_step,
        "mfu": metrics.median([line["mfu"] for line in recent if line["mfu"] is not None]),
        "max_over_mean_load": float(np.mean([line["max_over_mean_load"] for line in recent])),
        "max_over_mean_load_worst_layer": float(np.mean([line["max_over_mean_load_worst_layer"] for line in recent])),
        "load_cv": float(np.mean([line["load_cv"] for line in recent])),
        "rows_dropped": sum(line["rows_dropped"] for line in history),
        "parameters": sum(parameters_by_part(config.model).values()),
        "workdir": str(workdir),
    }


def _say_goodbye(
    config: Config, mesh: Mesh, state: TrainState, dataset: Dataset, result: dict, picture: Path | None
) -> None:
    mfu = "" if result["mfu"] is None else f", MFU {result['mfu']:.1%}"
    print(
        f"loss {result['loss_first']:.3f} -> {result['loss_last']:.3f} in {result['steps']} steps; medians of the last "
        f"{_RECENT_STEPS}: {result['tokens_per_s']:,.0f} tokens/s, {result['ms_per_step']:.0f} ms a step{mfu}; "
        f"load max/mean {result['max_over_mean_load']:.2f} (worst layer "
        f"{result['max_over_mean_load_worst_layer']:.2f}), CV {result['load_cv']:.2f}; "
        f"rows dropped {result['rows_dropped']}"
    )
    if config.train.sample_tokens and dataset.statistics is not None:
        prompt = "The value of "
        print("sample:", repr(sample_text(config, mesh, state, dataset.tokenizer, prompt)))
    if picture:
        print(f"picture: {picture}")
    print(f"work directory: {result['workdir']}")
