"""Programs compiled before anything is measured: many at once, for a compiler beside a measurement would disturb it."""

import os
from collections.abc import Callable, Collection, Hashable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from tqdm import tqdm


def compile_all(compilations: dict[Hashable, Callable[[], Any]], tuned_by_xla: Collection[Hashable]) -> dict[Hashable, Any]:
    """Calls all in threads, with a progress bar on a terminal, and returns what they give.

    Args:
      compilations: what compiles each program.
      tuned_by_xla: those for which the compiler tries kernels on the GPU; they go one after another,
        or each would see the others' load.
    """
    with ThreadPoolExecutor(os.cpu_count()) as many, ThreadPoolExecutor(1) as one:
        futures = {
            (one if name in tuned_by_xla else many).submit(compilation): name for name, compilation in compilations.items()
        }
        done = tqdm(as_completed(futures), "compiling", len(futures), leave=False, unit="program", disable=None)
        return {futures[future]: future.result() for future in done}
