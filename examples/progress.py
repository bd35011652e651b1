"""One progress bar for a run of Trainer: it says while the first step compiles, then loss and speed."""

import time
from typing import Any

from curves import Curve
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from transformers import TrainerCallback


class StepBar(TrainerCallback):
    """Shows the steps on a bar, keeps their ``Curve``, and can end the run before its schedule does."""

    def __init__(
        self, title: str, steps: int, console: Console, *, first: str = "", stop_after: int | None = None
    ):
        self.curve = Curve()
        self._title, self._steps, self._stop_after = title, stop_after or steps, stop_after
        self._first = first or title
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._task = self._bar.add_task(self._first, total=self._steps, note="")
        self._bar.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began, self._processor_began = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.curve.seconds.append(time.perf_counter() - self._began)
        self.curve.processor_seconds.append(time.process_time() - self._processor_began)
        self._bar.update(self._task, advance=1, description=self._title)
        if state.global_step == self._stop_after:
            control.should_training_stop = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if logs and "loss" in logs:
            self.curve.losses.append(logs["loss"])
            note = f"loss {logs['loss']:.3f}, {self.curve.seconds[-1]:.2f} s a step"
            self._bar.update(self._task, note=note)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.stop()
