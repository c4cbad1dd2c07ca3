"""Units of work on the machines of a Ray cluster.

The files that are read and the folder that is written must be seen under the same paths by all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...errors import DataError
from ..sources import Unit
from .local import Done
from .stage import Job, run_unit

WAITING = 2  # units a core that are handed out and not done


class RayExecutor:
    """Runs units as Ray's tasks of one core each.

    Args:
        address: of a cluster; "" for the one that RAY_ADDRESS names, or one on this machine alone.
    """

    def __init__(self, address: str = "") -> None:
        self.address = address

    def __call__(self, job: Job, units: Iterator[Unit], done: Done) -> None:
        try:
            import ray
        except ModuleNotFoundError:
            raise DataError(
                "the package ray is needed for --executor ray: pip install ray, or fastlm's extra: .[ray]"
            ) from None
        ours = not ray.is_initialized()
        if ours:
            try:
                ray.init(address=self.address or None, log_to_driver=False, configure_logging=False)
            except ConnectionError as error:
                raise DataError(f"ray_address={self.address!r}: no cluster there ({error})") from None
        try:
            _run(ray, job, units, done)
        finally:
            if ours:
                ray.shutdown()


def _run(ray: Any, job: Job, units: Iterator[Unit], done: Done) -> None:
    task = ray.remote(run_unit).options(num_cpus=1, max_retries=1)
    shared = ray.put(job)
    most = WAITING * max(1, int(ray.cluster_resources().get("CPU", 1)))
    running: dict[Any, Unit] = {}
    errors: list[tuple[int, Exception]] = []
    while True:
        while not errors and len(running) < most and (unit := next(units, None)) is not None:
            running[task.remote(shared, unit)] = unit
        if not running:
            break
        (ready,), _ = ray.wait(list(running), num_returns=1)
        unit = running.pop(ready)
        try:
            record = ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            errors.append((unit.number, error.cause if isinstance(error.cause, Exception) else error))
        except ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[:200]
            errors.append((unit.number, DataError(f"a worker of Ray was lost twice at {unit.place} ({reason})")))
        else:
            done(unit, record)
    if errors:
        raise min(errors, key=lambda pair: pair[0])[1]
