"""What Prometheus reads at /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from jaxdistill.serve.worker import Worker

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)


class Metrics:
    """Counters of one server."""

    def __init__(self, worker: Worker):
        self._registry = CollectorRegistry()

        def named(kind: type, name: str, about: str, labels: tuple[str, ...] = (), **more: object):
            return kind(f"jaxdistill_{name}", about, labels, registry=self._registry, **more)

        self.requests: Counter = named(Counter, "http_requests", "HTTP requests answered", ("path", "status"))
        self.prompt_tokens: Counter = named(Counter, "prompt_tokens", "Prompt tokens of the calls taken on")
        self.output_tokens: Counter = named(Counter, "output_tokens", "Output tokens told")
        self.left: Counter = named(Counter, "disconnects", "Clients that left before their answer was whole")
        self.first_token_s: Histogram = named(
            Histogram, "first_token_seconds", "From a call to its first tokens", buckets=_SECONDS
        )
        self.answer_s: Histogram = named(
            Histogram, "answer_seconds", "From a call to its whole answer", buckets=_SECONDS
        )
        schedule = worker.engine.schedule  # of another thread; a number that is a step old does no harm
        gauges = {
            "unfinished_samples": ("Samples that decode or wait", lambda: worker.unfinished),
            "running_samples": ("Samples that hold a slot", lambda: sum(s is not None for s in schedule.slots)),
            "slots": ("Samples that can be decoded at once", lambda: len(schedule.slots)),
            "cache_pages": ("Pages of the cache", lambda: sum(pool.pages for pool in schedule.pools)),
            "free_cache_pages": ("Pages that no sample holds", lambda: sum(pool.available for pool in schedule.pools)),
            "preemptions": ("Samples that gave way and were read again", lambda: schedule.preemptions),
        }
        for name, (about, value) in gauges.items():
            gauge: Gauge = named(Gauge, name, about)
            gauge.set_function(value)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
