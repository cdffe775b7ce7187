"""What Prometheus is told."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jax_lora.serving.engine import Engine

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BETWEEN = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """Counters of a server and of its engine. Times are in seconds."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"jax_lora_{name}", text, labels, registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"jax_lora_{name}", text, buckets=buckets, registry=self._registry)

        self.answers = counter("answers", "Answers that ended.", "model", "finish_reason")
        self.errors = counter("errors", "Requests that got an error.", "status")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.", "model")
        self.tokens = counter("generation_tokens", "Tokens of answers.", "model")
        self.first = histogram("time_to_first_token_seconds", "To an answer's start.", _FIRST)
        self.between = histogram("time_per_output_token_seconds", "From then on.", _BETWEEN)

    def text(self) -> bytes:
        """In Prometheus's form."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """What an engine and its bank know themselves."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        engine = self._engine
        yield GaugeMetricFamily("jax_lora_requests_open", "Run or wait.", engine.num_open)
        yield CounterMetricFamily("jax_lora_steps", "Steps of the engine.", engine.steps)
        yield GaugeMetricFamily("jax_lora_adapters", "Known by name.", len(engine.adapters))
        if engine.bank is None:
            return
        usage = engine.bank.usage()
        for name in ("slots", "free", "reserved"):
            gauge = GaugeMetricFamily(f"jax_lora_bucket_{name}", "By rank.", labels=["rank"])
            for rank, use in usage.items():
                gauge.add_metric([str(rank)], getattr(use, name))
            yield gauge
        for name in ("hits", "loads", "evictions"):
            counter = CounterMetricFamily(f"jax_lora_bucket_{name}", "By rank.", labels=["rank"])
            for rank, use in usage.items():
                counter.add_metric([str(rank)], getattr(use, name))
            yield counter
