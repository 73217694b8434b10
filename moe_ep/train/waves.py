"""How many waves the next step's program has: grown when routing needs more, shrunk after a long calm."""

import dataclasses


@dataclasses.dataclass
class Waves:
    """The count of waves, in powers of two so that few programs are compiled.

    Args:
      current: waves of the program that runs next.
      calm_steps: accepted steps in a row that would have fitted half the waves,
        after which the smaller program is used again.
    """

    current: int
    calm_steps: int = 100
    _calm: int = 0

    def accept(self, needed: int) -> bool:
        """Returns whether a step that needed so many waves fitted; if not, `current` now has enough."""
        if needed > self.current:
            self.current = 1 << (needed - 1).bit_length()
            self._calm = 0
            return False
        self._calm = self._calm + 1 if 2 * needed <= self.current else 0
        if self._calm >= self.calm_steps:
            self.current //= 2
            self._calm = 0
        return True
