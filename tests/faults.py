"""Cutting a request off at its k-th step, for every k.

A trio instrument sees each step that the request's task, or a task below it, is about to make. Over memory streams
their sequence is the same in every run, so that counting to k names one place in the code.
"""

from __future__ import annotations

from collections.abc import Callable

import trio
from trio.abc import Instrument


class Cut(Instrument):
    """Calls `action` right before the k-th step (from 1) of a task or of one below it."""

    def __init__(self, k: int, action: Callable[[], None]) -> None:
        self.steps = 0
        """How many steps there have been."""
        self._k = k
        self._action = action
        self._tasks: set[trio.lowlevel.Task] = set()

    def follow(self, task: trio.lowlevel.Task) -> None:
        """Count this task's steps from now on."""
        self._tasks.add(task)

    @property
    def made(self) -> bool:
        """Whether the request lived long enough to be cut off there."""
        return self.steps >= self._k

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        """Tasks below count too."""
        nursery = task.parent_nursery
        if nursery is not None and nursery.parent_task in self._tasks:
            self._tasks.add(task)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Count, and strike."""
        if task in self._tasks:
            self.steps += 1
            if self.steps == self._k:
                self._action()
