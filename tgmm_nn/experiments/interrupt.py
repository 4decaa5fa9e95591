"""`InterruptCheckpoint`: Ctrl-C between two steps, with a checkpoint that resumes."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning

from tgmm_nn.checks import check_string

__all__ = ["InterruptCheckpoint"]


class InterruptCheckpoint(lightning.Callback):
    """Finish the step in which Ctrl-C comes, save a checkpoint, and stop; a second Ctrl-C stops at once.

    An interrupt in the middle of an update would leave parameters of which some are new and some old. Put it behind
    `EMCallback`, so that the step's EM is in the checkpoint. With several processes, which would have to agree on the
    step, Ctrl-C stops at once, and the last checkpoint is the one to resume from.

    Args:
        dirpath: Folder of the checkpoint.
        filename: Its name, without ``.ckpt``.

    Raises:
        TypeError: If an option is no string.

    Example:
        >>> InterruptCheckpoint("checkpoints").path.as_posix()
        'checkpoints/interrupted.ckpt'
    """

    def __init__(self, dirpath: str, filename: str = "interrupted") -> None:
        check_string("dirpath", dirpath)
        check_string("filename", filename)
        self.path = Path(dirpath) / f"{filename}.ckpt"
        self.saved: Path | None = None
        self._asked = self._listening = False
        self._before: Any = signal.default_int_handler

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Listen to Ctrl-C, before training too: the first step is then finished."""
        self._asked, self.saved = False, None
        alone = trainer.world_size == 1 and threading.current_thread() is threading.main_thread()
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as of a job that `nohup` started: it stays so
        if stage == "fit" and alone and not ignored:
            before = signal.signal(signal.SIGINT, self._ask)
            self._before = self._before if before == self._ask else before
            self._listening = True

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop if Ctrl-C came in this step."""
        self._stop_if_asked(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save and stop if Ctrl-C came behind the last step; from here on it stops at once."""
        self._stop_if_asked(trainer)
        self._release()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Stop listening."""
        self._release()

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Stop listening."""
        self._release()

    def _stop_if_asked(self, trainer: lightning.Trainer) -> None:
        if self._asked:
            trainer.save_checkpoint(self.path)
            self.saved = self.path
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: FrameType | None) -> None:
        # Lightning gives signals back after teardown, to whom they belonged after setup: to us, who pass them on.
        if self._asked or not self._listening:
            handler = self._before if callable(self._before) else signal.default_int_handler
            handler(number, frame)
            return
        self._asked = True
        print("\nFinishing this step, to save a checkpoint; Ctrl-C again stops at once.", file=sys.stderr, flush=True)

    def _release(self) -> None:
        if self._listening:
            signal.signal(signal.SIGINT, self._before)
            self._listening = False
