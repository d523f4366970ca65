from sparsekv.ops.release.api import BACKENDS, Tables, release

__all__ = ["BACKENDS", "Tables", "release"]
