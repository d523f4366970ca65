"""A training step's forward and backward as a CUDA graph, recorded once and then launched as one.

The step of a small model is some two thousand kernels, which the host takes longer to launch than the GPU to run. A
replay runs them on the same memory each time: inputs are copied into it, results and gradients come to lie in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WARM_UPS = 3
"""Steps before the recording, taken as they are: compilation, and kernels' own first-time work."""

Work = Callable[..., dict[str, Tensor]]
"""(tensors by name) -> tensors by name, with gradients left on parameters. Whatever else it reads must be tensors that
stay in place; it may not wait for the device, nor draw from a generator."""

_Shapes = tuple[tuple[str, torch.Size], ...]


@dataclass(frozen=True, kw_only=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    gradients: list[tuple[nn.Parameter, Tensor]]

    def replay(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, held in self.inputs.items():
            held.copy_(given[name])
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.outputs


class Recorded:
    """Does the work, by a recording from its fourth call with the same shapes on. Before each call the parameters have
    no gradients. What it returns holds until the next call.

    Calls before the recording run on its stream too: a gradient that is still bound to another one cannot be recorded.
    """

    def __init__(self, work: Work, parameters: Sequence[nn.Parameter]) -> None:
        self.work, self.parameters = work, parameters
        self._stream = torch.cuda.Stream()
        self._done: dict[_Shapes, int] = {}
        self._recordings: dict[_Shapes, _Recording] = {}

    def __call__(self, **given: Tensor) -> dict[str, Tensor]:
        assert all(parameter.grad is None for parameter in self.parameters), "gradients of the last step are left"
        shapes = tuple((name, given[name].shape) for name in sorted(given))
        done = self._done[shapes] = self._done.get(shapes, 0) + 1
        if done <= WARM_UPS:
            return self._work_on_stream(given)
        if shapes not in self._recordings:
            self._recordings[shapes] = self._record(given)
        return self._recordings[shapes].replay(given)

    def _work_on_stream(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = self.work(**given)
        current.wait_stream(self._stream)
        return outputs

    def _record(self, given: dict[str, Tensor]) -> _Recording:
        inputs = {name: value.clone() for name, value in given.items()}
        graph = torch.cuda.CUDAGraph()
        # the backward runs in a thread of autograd's, which a capture of the whole process would forbid to allocate
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            outputs = self.work(**inputs)
        gradients = [(p, p.grad) for p in self.parameters if p.grad is not None]
        return _Recording(graph=graph, inputs=inputs, outputs=outputs, gradients=gradients)
