"""Long work made of rows: a bar or lines while it runs, and every finished row kept, so that a killed run goes on."""

import json
import sys
from pathlib import Path

Rows = list[dict]


class Finished:
    """Rows of the work directory, a line of JSON for what was finished together.

    Args:
      path: of the lines; a killed run may leave half a line at the end.
      writes: whether this process adds lines.
    """

    def __init__(self, path: Path, writes: bool = True):
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        self._rows: dict[str, Rows] = {entry["key"]: entry["rows"] for entry in map(json.loads, whole.splitlines())}
        self._file = None
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
            self._file.truncate(len(whole))

    def get(self, key: str) -> Rows | None:
        return self._rows.get(key)

    def add(self, key: str, rows: Rows) -> None:
        self._rows[key] = rows
        if self._file is not None:
            self._file.write(json.dumps({"key": key, "rows": rows}) + "\n")
            self._file.flush()


class Progress:
    """A bar over rows on a terminal, a line each elsewhere; both on standard error."""

    def __init__(self, name: str, total: int, shown: bool = True):
        self._name, self._total, self._done, self._shown = name, total, 0, shown
        self._bar = _open_bar(total) if shown and sys.stderr.isatty() else None

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_description_str(text)
        elif self._shown:
            print(f"{self._name} {self._done}/{self._total}  {text}", file=sys.stderr, flush=True)

    def done(self, text: str) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        self.say(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _open_bar(total: int):
    try:
        from tqdm import tqdm
    except ImportError:  # a GPU machine may lack it; lines instead
        return None
    return tqdm(total=total, unit="row set", dynamic_ncols=True)
