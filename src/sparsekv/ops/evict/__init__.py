from sparsekv.ops.evict.api import at_random, least_important, least_shared, record, when_full

__all__ = ["at_random", "least_important", "least_shared", "record", "when_full"]
