"""The workers' costs, fitted to what they report.

Apart from `cost_model`, which is compiled: what it imports is part of the cache's digest, and each change of a message
would have every kernel compiled anew.
"""

from collections.abc import Mapping

import numpy as np

from warmfront.coordinator.balancing.cost_model import WorkerCosts
from warmfront.shared.wire.messages import LoadReport

__all__ = ["fit_costs"]


def fit_costs(
    costs: Mapping[str, WorkerCosts], before: Mapping[str, LoadReport], reports: Mapping[str, LoadReport]
) -> None:
    """Fit the workers' costs to what they did since the reports `before`."""
    for name, report in reports.items():
        last, layers = before.get(name), len(report.busy_ns)
        busy, read, jobs = np.array(report.busy_ns), np.array(report.bytes), report.jobs
        if last is not None:
            busy, read, jobs = busy - last.busy_ns, read - last.bytes, jobs - last.jobs
        if jobs > 0:
            costs[name].update(jobs / layers, busy, read)
