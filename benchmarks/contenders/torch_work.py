"""torch on the GPU where there is one, else on the CPU, the same way for all contenders on it."""

import contextlib

import torch

from benchmarks.contenders import Work

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sees_gpu():
    return DEVICE == "cuda"


@contextlib.contextmanager
def on_device(dtype=None):
    """Within it new tensors are on the device, and floats of `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype or "float32"))
    try:
        with torch.device(DEVICE):
            yield
    finally:
        torch.set_default_dtype(before)


def to_device(array):
    return torch.from_numpy(array).to(DEVICE)


def work(launch, **extras):
    """`Work` that calls `launch` as often as it is asked and waits once."""

    def run(times=1):
        for _ in range(times):
            result = launch()
        if sees_gpu():
            torch.cuda.synchronize()
        return result

    return Work(run, **extras)


def forward(function, tensors, **extras):
    def launch():
        with torch.inference_mode():
            return function(*tensors)

    return work(launch, **extras)


def gradient(function, inputs, weights=(), **extras):
    """`Work` for the gradients of inputs that are floats and of weights, from one of the output."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    with torch.no_grad():
        output_gradient = torch.randn_like(function(*inputs))

    def launch():
        for tensor in (*inputs, *weights):
            tensor.grad = None
        function(*inputs).backward(output_gradient)

    return work(launch, **extras)


def notes(floor):
    """The floor and the most memory that torch had on the GPU."""

    def found():
        peak = {"device_mib": torch.cuda.max_memory_allocated() / 2**20} if sees_gpu() else {}
        return {**floor, **peak}

    return found


def delta_rule_tensors(length, key_heads, heads, dim):
    """As the layer has them in bfloat16, the log decay float32."""
    with on_device("bfloat16"):
        query, key = (
            torch.nn.functional.normalize(torch.randn(1, length, key_heads, dim), dim=-1)
            for _ in range(2)
        )
        value, beta = torch.randn(1, length, heads, dim), torch.rand(1, length, heads)
        log_decay = -0.1 * torch.rand(1, length, heads, dtype=torch.float32)
    return [query, key, value, log_decay, beta]
