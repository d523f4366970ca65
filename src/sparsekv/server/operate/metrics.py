"""What Prometheus scrapes: vLLM's stems under our prefix, and what only a cache that forgets has.

No label holds anything that a client sent.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sparsekv.engine.outputs import RequestOutput
from sparsekv.modeling.attach import attachment_of
from sparsekv.policies.dms import DMSPolicy

if TYPE_CHECKING:
    from sparsekv.server.service import Service

PREFIX = "sparsekv"
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)


class Metrics:
    """Counters and histograms of requests; gauges are read from the engine at each scrape."""

    def __init__(self, service: "Service") -> None:
        self.registry = CollectorRegistry()
        model = service.settings.name

        def counter(stem: str, text: str, *labels: str) -> Counter:
            return Counter(f"{PREFIX}:{stem}", text, ["model_name", *labels], registry=self.registry)

        def histogram(stem: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"{PREFIX}:{stem}", text, ["model_name"], buckets=buckets, registry=self.registry)
            return made.labels(model)

        self._model = model
        self._success = counter("request_success", "Requests that ended by themselves.", "finished_reason")
        self._refused = counter("request_refused", "Requests that were not let in.", "reason")
        self._votes = counter("votes", "Votes by how they ended.", "outcome")
        self._answers = counter("http_responses", "HTTP responses by status.", "status")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens read.").labels(model)
        self.generation_tokens = counter("generation_tokens", "Tokens generated.").labels(model)
        self.first = histogram("time_to_first_token_seconds", "From arrival to the first token.", _FIRST)
        self.between = histogram("inter_token_latency_seconds", "Between two tokens of a sample.", _BETWEEN)
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the end.", _WHOLE)
        self.registry.register(_EngineGauges(service))

    def success(self, reason: str) -> None:
        self._success.labels(self._model, reason).inc()

    def refused(self, reason: str) -> None:
        self._refused.labels(self._model, reason).inc()

    def vote(self, outcome: str) -> None:
        self._votes.labels(self._model, outcome).inc()

    def answered(self, status: int) -> None:
        self._answers.labels(self._model, str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def watch(self) -> Callable[[RequestOutput], None]:
        """What hears of each state of one request."""
        lengths: list[int] = []
        last: float | None = None

        def see(output: RequestOutput) -> None:
            nonlocal lengths, last
            times = output.metrics
            assert times is not None
            before, lengths = lengths or [0] * len(output.outputs), [s.span[1] - s.span[0] for s in output.outputs]
            grown = [new - old for new, old in zip(lengths, before, strict=True)]
            self.generation_tokens.inc(sum(grown))
            if last is None and times.first_token_time is not None:
                self.prompt_tokens.inc(len(output.prompt_token_ids))
                self.first.observe(times.first_token_time - times.arrival_time)
                last = times.first_token_time
                grown = [max(0, new - 1) for new in lengths]
            if last is not None and times.last_token_time is not None and max(grown) > 0:
                self.between.observe((times.last_token_time - last) / max(grown))
                last = times.last_token_time
            if output.finished and times.finished_time is not None:
                self.whole.observe(times.finished_time - times.arrival_time)
                for sample in output.outputs:
                    self.success(sample.finish_reason or "abort")

        return see


class _EngineGauges(Collector):
    """Read while the engine runs: each number is right by itself, and at most one step old."""

    def __init__(self, service: "Service") -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        llm = self._service.llm
        engine = getattr(llm, "engine", None)
        if engine is None:
            return
        scheduler = engine.scheduler
        running, waiting, swapped = list(scheduler.running), list(scheduler.waiting), list(scheduler.swapped)
        pages, free = scheduler.ledger.pages, scheduler.ledger.free
        seen = sum(s.counters.seen for s in running)
        held = sum(s.counters.held / s.request.heads for s in running)
        pending = sum(len(s.request.sequences) - 1 for s in waiting)
        yield self._gauge("num_requests_running", "Samples that own a row.", len(running))
        yield self._gauge("num_requests_waiting", "Samples that wait for one.", len(waiting) + len(swapped) + pending)
        yield self._gauge("kv_cache_usage_perc", "Part of the pool's pages in use, 0 to 1.", 1 - free / pages)
        yield self._counter("num_preemptions", "Times a sample was swapped out for want of pages.", engine.preemptions)
        yield self._gauge("logical_tokens", "Tokens that running samples have seen.", seen)
        yield self._gauge("held_tokens", "Tokens that they hold, averaged over layers and heads.", held)
        yield self._gauge("compression_ratio", "Seen over held, 1 where nothing runs.", seen / held if held else 1.0)
        yield self._gauge("kv_pages", "Pages of the pool.", pages)
        yield self._gauge("kv_pages_free", "Pages that nobody owns.", free)
        yield self._gauge("swapped_sequences", "Samples in host memory.", len(swapped))
        yield self._gauge("engine_alive", "1 while the engine can run requests.", int(llm.alive))
        prefixes = self._service.prefixes
        yield self._counter("prefix_cache_queries", "Prompt tokens that were looked up.", prefixes.asked)
        yield self._counter("prefix_cache_hits", "Those that were stored.", prefixes.found)
        yield self._gauge("prefix_cache_bytes", "Host memory of stored chats.", prefixes.bytes)
        policy = attachment_of(llm.model).policy
        if isinstance(policy, DMSPolicy):
            yield self._gauge("dial_offset", "Added to every eviction logit.", policy.offset)
        dial = self._service.dial
        if dial is not None:
            yield self._gauge("dial_cr", "The compression ratio that the dial stands at.", dial.cr)
            yield self._counter("dial_changes", "Times that the dial was turned.", dial.turned)

    def _gauge(self, stem: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"{PREFIX}:{stem}", text, labels=["model_name"])
        family.add_metric([self._service.settings.name], value)
        return family

    def _counter(self, stem: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"{PREFIX}:{stem}", text, labels=["model_name"])
        family.add_metric([self._service.settings.name], value)
        return family
