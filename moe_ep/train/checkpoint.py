"""Saving and resuming everything that training carries, through orbax."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from moe_ep.model.names import by_path
from moe_ep.train.state import TrainState


class Checkpoints:
    """The checkpoints of one work directory.

    Arrays are stored under their path in the state, so that any tool can read them
    by name; what is not an array (the data's position) is JSON beside them.

    Args:
      directory: made if missing.
      kept: how many of the latest stay.
    """

    def __init__(self, directory: Path, kept: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=kept, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, extra: dict) -> None:
        """Starts saving; training may go on, donation included, once this returns."""
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(by_path(state)), extra=ocp.args.JsonSave(extra))
        self._manager.save(step, args=arguments)

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict]:
        """Returns the state, placed as `abstract` says (any mesh will do), and the JSON saved with it."""
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(by_path(abstract)), extra=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=arguments)
        leaves = [restored["state"][name] for name in by_path(abstract)]
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves), restored["extra"]

    def close(self) -> None:
        """Waits for the last save; a disk that is full shows here."""
        self._manager.wait_until_finished()
        self._manager.close()
