"""/metrics, for Prometheus: what requests wait for and get, and what the front does.

Names begin with warmfront_; docs/grafana.json is a board that shows them.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from warmfront.coordinator.engine.batching.async_engine import AsyncEngine
from warmfront.coordinator.engine.stats import Stats

__all__ = ["Metrics"]

_WAITS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
_GAPS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2)


class Metrics:
    """The figures of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._prompts = self._held = 0
        kept = self._registry
        self._requests = Counter(
            "warmfront_requests", "Requests by path and status.", ["path", "status"], registry=kept
        )
        self._first = Histogram(
            "warmfront_time_to_first_token_seconds",
            "From the request's queueing to its first token.",
            buckets=_WAITS,
            registry=kept,
        )
        self._gap = Histogram(
            "warmfront_inter_token_seconds", "Between two tokens of an answer.", buckets=_GAPS, registry=kept
        )
        self._whole = Histogram(
            "warmfront_answer_seconds",
            "From the request's queueing to the end of its answer.",
            buckets=_WAITS,
            registry=kept,
        )
        self._prompt = Counter("warmfront_prompt_tokens", "Tokens of prompts.", registry=kept)
        self._cached = Counter(
            "warmfront_prompt_tokens_cached", "Tokens of prompts that the KV cache held.", registry=kept
        )
        self._new = Counter("warmfront_generated_tokens", "Tokens of answers.", registry=kept)
        self._embedded = Counter("warmfront_embedded_tokens", "Tokens of embedded texts.", registry=kept)
        self._batch = Histogram(
            "warmfront_tokens_per_pass",
            "Tokens that a decode pass gave.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=kept,
        )

    def request(self, path: str, status: int) -> None:
        """A request was answered with this status."""
        self._requests.labels(path, str(status)).inc()

    def first_token(self, seconds: float) -> None:
        """An answer has begun."""
        self._first.observe(seconds)

    def gap(self, seconds: float) -> None:
        """A further token came so much later."""
        self._gap.observe(seconds)

    def answered(self, stats: Stats, seconds: float) -> None:
        """An answer has ended, or its client has left."""
        self._whole.observe(seconds)
        self._prompt.inc(stats.prompt_tokens)
        self._cached.inc(max(0, stats.prompt_tokens - stats.prefilled) if stats.new_tokens else 0)
        self._new.inc(stats.new_tokens)
        self._prompts += stats.prompt_tokens
        self._held += max(0, stats.prompt_tokens - stats.prefilled) if stats.new_tokens else 0

    def embedded(self, tokens: int) -> None:
        """Texts of so many tokens have become vectors."""
        self._embedded.inc(tokens)

    @property
    def cached_share(self) -> float:
        """Of the prompts' tokens the part that the KV cache held."""
        return self._held / max(1, self._prompts)

    def a_pass(self, tokens: int) -> None:
        """A pass gave so many tokens."""
        self._batch.observe(tokens)

    def follow(self, engine: AsyncEngine) -> None:
        """From now on tell of this engine too."""
        self._registry.register(_Workers(engine))

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


class _Workers(Collector):
    """What the engine knows at the moment of the question."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._pids = {worker.name: worker.pid for worker in engine.engine.statistics.workers()}
        self._replaced = 0

    def collect(self) -> Iterator[Metric]:
        """Gauges of requests; counters of each worker and of moves."""
        engine = self._engine.engine
        yield GaugeMetricFamily("warmfront_requests_waiting", "Requests in the queue.", self._engine.waiting)
        yield GaugeMetricFamily("warmfront_requests_running", "Requests being computed.", self._engine.running)
        busy = CounterMetricFamily("warmfront_worker_busy_seconds", "Computing on single tokens.", labels=["worker"])
        neurons = CounterMetricFamily("warmfront_worker_neurons", "Neurons computed.", labels=["worker"])
        groups = GaugeMetricFamily("warmfront_worker_groups", "Groups of neurons owned now.", labels=["worker"])
        for worker in engine.statistics.workers():
            busy.add_metric([worker.name], worker.busy_s)
            neurons.add_metric([worker.name], worker.neurons)
            groups.add_metric([worker.name], worker.groups)
            # Seen from here: how often a question met another process than the one before.
            self._replaced += self._pids[worker.name] != worker.pid
            self._pids[worker.name] = worker.pid
        yield CounterMetricFamily("warmfront_workers_replaced", "Workers that were lost.", value=self._replaced)
        yield from (busy, neurons, groups)
        flow = engine.ownership.flow
        yield CounterMetricFamily("warmfront_moves", "Groups of neurons that were copied.", value=flow.moves)
        yield CounterMetricFamily("warmfront_flips", "Owners changed without a copy.", value=flow.flips)
        yield CounterMetricFamily("warmfront_unused_copies", "Copies dropped before they fired.", value=flow.unused)
