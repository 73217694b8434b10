"""What a run leaves behind: a line a step on screen, JSON lines and TensorBoard events, a picture."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_HEAT_COLUMNS = 400  # of the load heat map; longer runs are averaged into these


class Recorder:
    """Writes each step's metrics where people and programs look for them.

    Args:
      workdir: gets metrics.jsonl, TensorBoard events, expert_load.npz, routing_trace.npy, training.png.
      first_step: steps from here on are new; lines of an interrupted attempt at them are dropped.
      steps: of the whole run.
    """

    def __init__(self, workdir: Path, first_step: int, steps: int):
        self._workdir = workdir
        self._steps = steps
        self.history = [line for line in _read_lines(workdir / "metrics.jsonl") if line["step"] <= first_step]
        self._lines = (workdir / "metrics.jsonl").open("w", encoding="utf-8")
        for line in self.history:
            self._lines.write(json.dumps(line) + "\n")
        self._load = _read_load(workdir / "expert_load.npz", first_step)
        self._events = _open_events(workdir)
        self._bar = _open_bar(first_step, steps)

    def step(self, metrics: dict, expert_counts: np.ndarray) -> None:
        """Records one accepted step; `metrics["step"]` counts from 1."""
        self.history.append(metrics)
        self._lines.write(json.dumps(metrics) + "\n")
        self._lines.flush()
        self._load[metrics["step"]] = expert_counts
        if self._events:
            for name, value in metrics.items():
                if name != "step" and value is not None:
                    self._events.add_scalar(name, value, metrics["step"])
        self._show(metrics)

    def say(self, text: str) -> None:
        """Prints a line without tearing the progress bar."""
        self._bar.write(text, file=sys.stdout) if self._bar is not None else print(text, flush=True)

    def save_choices(self, choices: np.ndarray) -> Path:
        """Writes one step's choices as `simulate.routing=trace:FILE` reads them, [layers, tokens, choices of a token].

        Args:
          choices: int [micro-batches, layers, tokens, choices of a token].
        """
        layers, top_k = choices.shape[1], choices.shape[3]
        path = self._workdir / "routing_trace.npy"
        np.save(path, choices.swapaxes(0, 1).reshape(layers, -1, top_k).astype(np.int32))
        return path

    def save_load(self) -> None:
        """Writes the load history, so that a resumed run draws all of it."""
        steps = np.array(sorted(self._load))
        counts = np.stack([self._load[step] for step in steps]) if len(steps) else np.zeros((0, 1, 1))
        np.savez_compressed(self._workdir / "expert_load.npz", steps=steps, counts=counts)

    def close(self) -> Path | None:
        """Ends the bar and the files, and draws training.png; returns its path, None after no steps."""
        self.save_load()
        self._lines.close()
        if self._events:
            self._events.close()
        if self._bar is not None:
            self._bar.close()
        return draw(self._workdir / "training.png", self.history, self._load) if self.history else None

    def _show(self, metrics: dict) -> None:
        facts = (
            f"loss {metrics['loss']:.4f}  {metrics['tokens_per_s']:,.0f} tokens/s  {metrics['ms_per_step']:.0f} ms"
            + (f"  MFU {metrics['mfu']:.1%}" if metrics["mfu"] is not None else "")
            + f"  load max/mean {metrics['max_over_mean_load']:.2f} CV {metrics['load_cv']:.2f}"
            + f"  dropped {metrics['rows_dropped']}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(facts, refresh=False)
            self._bar.update(metrics["step"] - self._bar.n)
        else:
            print(f"step {metrics['step']:>{len(str(self._steps))}}/{self._steps}  {facts}", flush=True)


class Follower:
    """A process that leaves the record to the first one, and keeps the history alone; arguments as Recorder's."""

    def __init__(self, workdir: Path, first_step: int, steps: int):
        del steps
        self.history = [line for line in _read_lines(workdir / "metrics.jsonl") if line["step"] <= first_step]

    def step(self, metrics: dict, expert_counts: np.ndarray) -> None:
        del expert_counts
        self.history.append(metrics)

    def say(self, text: str) -> None:
        del text

    def save_choices(self, choices: np.ndarray) -> None:
        del choices

    def save_load(self) -> None:
        pass

    def close(self) -> None:
        pass


def _read_lines(path: Path) -> Iterator[dict]:
    """Yields the whole lines of a file that a killed run may have left with half a line at its end."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


def _read_load(path: Path, first_step: int) -> dict[int, np.ndarray]:
    if not path.exists():
        return {}
    with np.load(path) as saved:
        pairs = zip(saved["steps"].tolist(), saved["counts"], strict=True)
        return {step: counts for step, counts in pairs if step <= first_step}


def _open_events(workdir: Path):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:  # a GPU machine may lack it; metrics.jsonl has the same numbers
        return None
    return SummaryWriter(str(workdir / "tensorboard"))


def _open_bar(first_step: int, steps: int):
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:  # a GPU machine may lack it; a line a step instead
        return None
    return tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)


def draw(path: Path, history: list[dict], load: dict[int, np.ndarray]) -> Path:
    """Draws the loss curve above the load of every expert over steps, layer by layer; returns the path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(10, 8), height_ratios=(2, 3), layout="constrained", sharex=True
    )
    above.plot([line["step"] for line in history], [line["loss"] for line in history], label="training")
    validated = [line for line in history if line.get("validation_loss") is not None]
    if validated:
        steps, losses = zip(*((line["step"], line["validation_loss"]) for line in validated), strict=True)
        above.plot(steps, losses, "o-", label="validation")
    above.set_ylabel("loss, nats per token")
    above.grid(alpha=0.3)
    above.legend()
    if load:
        _draw_load(figure, below, load)
    below.set_xlabel("step")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _draw_load(figure, axes, load: dict[int, np.ndarray]) -> None:
    steps = sorted(load)
    counts = np.stack([load[step] for step in steps]).astype(np.float64)
    relative = counts / np.maximum(counts.mean(axis=-1, keepdims=True), 1e-9)
    columns = np.array_split(np.arange(len(steps)), min(len(steps), _HEAT_COLUMNS))
    image = np.stack([relative[column].mean(axis=0).reshape(-1) for column in columns], axis=1)
    layers, experts = counts.shape[1:]
    drawn = axes.imshow(
        image,
        aspect="auto",
        interpolation="nearest",
        cmap="RdBu_r",
        vmin=0,
        vmax=2,
        extent=(steps[0] - 0.5, steps[-1] + 0.5, layers * experts, 0),
    )
    for layer in range(1, layers):
        axes.axhline(layer * experts, color="black", linewidth=0.5)
    shown = range(0, layers, max(1, layers // 12))
    axes.set_yticks([(layer + 0.5) * experts for layer in shown], [f"layer {layer}" for layer in shown])
    axes.set_ylabel(f"MoE layers, {experts} experts each")
    figure.colorbar(drawn, ax=axes, label="load / mean load", extend="max")
