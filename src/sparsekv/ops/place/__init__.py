from sparsekv.ops.place.api import align_marks, place

__all__ = ["align_marks", "place"]
