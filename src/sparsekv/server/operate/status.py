"""The server at one moment, for the page: no word of any conversation."""

from typing import Any

from sparsekv.modeling.attach import attachment_of
from sparsekv.server.service import Service


def describe(service: Service) -> dict[str, Any]:
    """JSON-ready."""
    llm, dial = service.llm, service.dial
    scheduler, pool = llm.engine.scheduler, llm.engine.runner.ragged.pool
    running = list(scheduler.running)
    used = scheduler.ledger.pages - scheduler.ledger.free
    return {
        "model": service.settings.name,
        "policy": attachment_of(llm.model).policy.name,
        "running": len(running),
        "waiting": max(0, service.samples - len(running)),
        "held_bytes": used * pool.page_bytes,
        "pool_bytes": pool.pages * pool.page_bytes,
        "watchable": service.watch is not None,
        "most_samples": min(service.settings.max_samples, service.rows + service.settings.max_waiting),
        "dial": None
        if dial is None
        else {"cr": dial.cr, "low": dial.low, "high": dial.high, "open": not dial.adaptive},
    }
