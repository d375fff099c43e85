"""A small step that runs millions of times: on a CUDA device it becomes one graph after a few eager calls.

Each kernel of a small network takes longer to start than to compute, and a graph starts them all at once. The eager
step is the reference: it is what other devices run, and the graph is recorded from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: eager calls before the recording: they create gradients and workspaces, which must not happen inside it
WARM_UP = 3

Step = Callable[..., Tensor]
#: records a step on fixed inputs; the step itself may run or not. Gives what runs it again, and where its result lies
Record = Callable[[Step, Sequence[Tensor]], tuple[Callable[[], None], Tensor]]


class Repeated:
    """A step called again and again, nearly always with inputs of one shape.

    What the step changes (parameters, moments, gradients) it must change in place: after the recording it always works
    on the same memory. What varies from call to call is an input, a learning rate too; it may neither wait for the
    device nor choose its way by the content of a tensor. Random numbers come from the given generators alone, which
    stand after a call where the eager step leaves them.

    Args:
        step: takes tensors and numbers, gives one tensor. A number becomes a float32 scalar on the device.
        record: by default a CUDA graph where the device is one, and nothing elsewhere: the step stays eager.
        device, generators: of the step.
    """

    def __init__(
        self,
        step: Step,
        device: torch.device,
        generators: Sequence[torch.Generator] = (),
        record: Record | None = None,
    ) -> None:
        self.step, self.device, self.calls = step, device, 0
        if record is None and device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._run, record = self._beside, lambda s, inputs: cuda_graph(s, inputs, generators, self._stream)
        else:
            self._run = step
        self._record = record
        self._inputs: list[Tensor] = []
        self._again: Callable[[], None] | None = None

    def __call__(self, *inputs: Tensor | float) -> Tensor:
        """The step's result, which the next call may overwrite. A batch of another shape goes the eager way."""
        self.calls += 1
        if self._record is None or self.calls <= WARM_UP:
            return self._run(*inputs)
        if self._again is None:
            self._inputs = [self._fixed(x) for x in inputs]
            self._again, self._result = self._record(self.step, self._inputs)
        if any(isinstance(x, Tensor) and x.shape != place.shape for x, place in zip(inputs, self._inputs, strict=True)):
            return self._run(*inputs)
        for x, place in zip(inputs, self._inputs, strict=True):
            if isinstance(x, Tensor):
                place.copy_(x)
            else:
                place.fill_(x)
        self._again()
        return self._result

    def _fixed(self, x: Tensor | float) -> Tensor:
        return x.clone() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float32, device=self.device)

    def _beside(self, *inputs: Tensor | float) -> Tensor:
        """The eager step on the stream of the recording, as torch's notes on CUDA graphs ask of a warm-up."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            result = self.step(*inputs)
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        return result


def cuda_graph(
    step: Step, inputs: Sequence[Tensor], generators: Sequence[torch.Generator], stream: torch.cuda.Stream
) -> tuple[Callable[[], None], Tensor]:
    """Record a step as a CUDA graph, without running it."""
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, stream=stream):
        result = step(*inputs)
    return graph.replay, result
