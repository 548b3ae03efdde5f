"""What a run says: a bar on stderr, a file of JSON lines, and TensorBoard where it is installed."""

from __future__ import annotations

import json
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

__all__ = ["Log"]


class Log:
    """Of the process that writes; of the others, silent.

    ``log.jsonl`` in the run's folder has an object a line: update, loss (the mean since the line before),
    norm (of the gradients before the clip, of that update), lr, images_per_second.

    Args:
        folder: of the run; None: nothing is written or shown.
        updates, update: of the run, and how many are done. Lines of later ones are a run's that was killed:
            they go.
        bar: show the bar.
    """

    def __init__(self, folder: Path | None, updates: int, update: int, bar: bool) -> None:
        self._file = self._board = None
        self._update, self._time = update, time.perf_counter()
        self.bar = tqdm(total=updates, initial=update, unit="update", disable=folder is None or not bar)
        if folder is None:
            return
        path = folder / "log.jsonl"
        _drop_after(path, update)
        self._file = path.open("a", encoding="utf-8")
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=update + 1)

    def write(self, update: int, images: int, values: dict[str, float]) -> None:
        """The values of ``update`` updates done, ``images`` of them since the last line."""
        now = time.perf_counter()
        seconds, self._time = now - self._time, now
        values = {**values, "images_per_second": images / seconds}
        self.bar.update(update - self._update)
        self._update = update
        self.bar.set_postfix_str(f"loss {values['loss']:.4f}, {values['images_per_second']:.0f} images/s")
        if self._file is not None:
            line: dict[str, Any] = {"update": update, **values}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, update)

    def paused(self, seconds: float) -> None:
        """Time that no update took: of pictures and checkpoints."""
        self._time += seconds

    def close(self) -> None:
        self.bar.close()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _drop_after(path: Path, update: int) -> None:
    """Keep the whole lines of the first ``update`` updates."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["update"] > update:
                break
        except (ValueError, KeyError, TypeError):  # half a line: the process was killed
            break
        kept.append(line + "\n")
    new = path.with_suffix(".new")
    new.write_text("".join(kept), encoding="utf-8")
    os.replace(new, path)
