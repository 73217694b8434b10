"""The pages of one device's cache: who has which."""


class PagePool:
    """Hands out page numbers from 0 to `pages` - 1, each to one holder at a time."""

    def __init__(self, pages: int):
        self.pages = pages
        self.most_in_use = 0
        self._free = list(range(pages - 1, -1, -1))
        self._held: set[int] = set()

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def in_use(self) -> int:
        return len(self._held)

    def take(self, count: int) -> list[int]:
        """Returns so many pages.

        Raises:
          ValueError: there are not as many free.
        """
        if count > self.free:
            raise ValueError(f"{count} pages asked for, {self.free} of {self.pages} are free")
        taken = [self._free.pop() for _ in range(count)]
        self._held.update(taken)
        self.most_in_use = max(self.most_in_use, self.in_use)
        return taken

    def give_back(self, pages: list[int]) -> None:
        """Makes pages free again.

        Raises:
          ValueError: one of them is not held.
        """
        if not self._held.issuperset(pages) or len(set(pages)) < len(pages):
            raise ValueError(f"pages {pages} given back, not all of them are held")
        self._held.difference_update(pages)
        self._free.extend(reversed(pages))
