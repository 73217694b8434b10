"""The command line: flags -> config -> one mode.

python -m moe_ep.run --mode=train --config=configs/cpu8_tiny.py --set train.steps=100 --devices=8
"""

import contextlib
import datetime
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import app, flags, logging

from moe_ep import command, override
from moe_ep.checks import check
from moe_ep.config import Config, ConfigError, cpu8_tiny

_MOST_EMULATED = 1024


def _train(config: Config, workdir: Path) -> dict:
    from moe_ep.mesh import make_mesh
    from moe_ep.train.loop import TrainingStopped, train

    mesh = make_mesh(config.mesh, config.cluster, config.model.moe.num_experts)
    try:
        return train(config, mesh, workdir)
    except TrainingStopped as error:
        print(f"moe_ep: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def _generate(config: Config, workdir: Path) -> dict:
    from moe_ep.serve.generate import generate

    return generate(config, workdir)


def _aot(config: Config, workdir: Path) -> dict:
    from moe_ep.aot.main import aot

    return aot(config, workdir)


def _bench(config: Config, workdir: Path) -> dict:
    from moe_ep.bench.main import bench

    return bench(config, workdir)


def _simulate(config: Config, workdir: Path) -> dict:
    from moe_ep.simulate.main import simulate

    return simulate(config, workdir)


def _claims(config: Config, workdir: Path) -> dict:
    from moe_ep.simulate.main import claims

    return claims(config, workdir)


MODES: dict[str, Callable[[Config, Path], dict]] = {
    "train": _train,
    "generate": _generate,
    "bench": _bench,
    "aot": _aot,
    "simulate": _simulate,
    "claims": _claims,
}

_MODE = flags.DEFINE_enum("mode", "train", list(MODES), "What to do.")
_CONFIG = flags.DEFINE_string("config", None, "A Python file that sets config = Config(...); cpu8_tiny without it.")
_SET = flags.DEFINE_multi_string("set", [], "A field of the config and its value, a.b=value; may be repeated.")
_DEVICES = flags.DEFINE_integer(
    "devices", 0, "Emulate so many CPU devices; 0 takes the real ones.", lower_bound=0, upper_bound=_MOST_EMULATED
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results go; the same one resumes. A new one under runs/ without it.")
_JSON = flags.DEFINE_string("json", None, "Also write the result as one JSON object; - for standard output, alone on it.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Be one of several processes: HOST:PORT of process 0, or auto under Slurm and the like."
)
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are, with --coordinator=HOST:PORT.")
_PROCESS = flags.DEFINE_integer("process", None, "The number of this one, from 0.")
_PROFILE = flags.DEFINE_string("profile", None, "A directory for a trace of the run by the JAX profiler (scripts/profile).")


def _choose_devices(emulated: int) -> None:
    """Settles what jax will see; must run before jax is imported."""
    if emulated:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = " ".join([
            os.environ.get("XLA_FLAGS", ""),
            f"--xla_force_host_platform_device_count={emulated}",
            # Emulated devices share the cores: the last may reach a collective long after the first.
            "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
            "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        ])  # fmt: skip
    elif not Path("/dev/nvidiactl").exists():
        # With jax[cuda12] installed and no GPU, jax would print its plugin's traceback.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _load_config() -> Config:
    config = override.load(_CONFIG.value) if _CONFIG.value else cpu8_tiny()
    return check(override.apply(config, _SET.value))


def _workdir() -> Path:
    if _WORKDIR.value:
        return Path(_WORKDIR.value)
    name = Path(_CONFIG.value).stem if _CONFIG.value else "cpu8_tiny"
    return Path("runs") / f"{_MODE.value}-{name}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"


def _write_json(result: dict, target: str, stdout) -> None:
    text = json.dumps(result, indent=2)
    if target == "-":
        print(text, file=stdout)
        return
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text(text + "\n", encoding="utf-8")


def _check_json_target(target: str | None) -> None:
    """Refuses a file that cannot be written, before the work and not after it."""
    if not target or target == "-":
        return
    path = Path(target)
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"--json={target}: allowed is the path of a file that can be written, or - for standard "
                          f"output ({error.strerror})") from None  # fmt: skip
    if not existed:
        path.unlink(missing_ok=True)  # several processes may look at once


def main(_: list[str]) -> None:
    stdout = sys.stdout
    logging.set_verbosity(logging.WARNING)  # orbax tells every step of a save
    try:
        _check_json_target(_JSON.value)
        config = _load_config()
        _choose_devices(_DEVICES.value)
        first = _join_processes()
        with _printing(first), _profiling():
            result = MODES[_MODE.value](config, _workdir())
        if _JSON.value and first:
            _write_json(result, _JSON.value, stdout)
    except ConfigError as error:
        command.refuse(str(error))


def _join_processes() -> bool:
    """Returns whether this process prints and writes files: the first of those that `--coordinator` joins does."""
    if _COORDINATOR.value is None:
        for name, value in (("processes", _PROCESSES.value), ("process", _PROCESS.value)):
            if value is not None:
                raise ConfigError(f"--{name}={value}: allowed is a number with --coordinator=HOST:PORT")
        return True
    if _WORKDIR.value is None:
        raise ConfigError(f"--coordinator={_COORDINATOR.value}: allowed is one with --workdir, the same in all processes")
    from moe_ep.mesh import is_first_process, join_processes

    join_processes(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    return is_first_process()


@contextlib.contextmanager
def _printing(first: bool) -> Iterator[None]:
    """Leaves standard output to the first process; with --json=- it carries the object alone, tables go to standard error."""
    with contextlib.ExitStack() as stack:
        if not first:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        elif _JSON.value == "-":
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def _profiling() -> contextlib.AbstractContextManager:
    if _PROFILE.value is None:
        return contextlib.nullcontext()
    import jax

    return jax.profiler.trace(_PROFILE.value)


def _parse_flags(argv: list[str]) -> list[str]:
    return command.parse(argv, ", ".join("--" + name for name in _FLAG_NAMES))


_FLAG_NAMES = (
    "mode", "config", "set", "devices", "workdir", "json", "coordinator", "processes", "process", "profile",
)  # fmt: skip

if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
