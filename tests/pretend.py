"""A simulated GPU. Operations on the device "cuda" run on the CPU, with CUDA's argument checks.

In one process: `with PretendedGPU("Tesla T4"):`. With torchrun, this file replaces train_tst.py,
and its first argument is the name of the card. On a simulated GPU autocast changes nothing, so that
the products are in float32, because autocast on "cuda" ignores tensors that are on the CPU.
"""
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils import _device

CAPABILITY = {"NVIDIA B200": (10, 0), "NVIDIA H100 80GB HBM3": (9, 0), "Tesla T4": (7, 5)}


class PretendedGPU(TorchFunctionMode):
    """Replaces every device "cuda" by the CPU. `current` is the index of `set_device`."""

    def __init__(self, name):
        super().__init__()
        self.current = 0
        native_bfloat16 = CAPABILITY[name] >= (8, 0)        # older cards emulate bfloat16
        self.patches = [
            mock.patch.multiple(
                torch.cuda, is_available=lambda: True, device_count=lambda: 2,
                current_device=lambda: self.current, set_device=self.set_device,
                get_device_name=lambda device=None: name,
                get_device_capability=lambda device=None: CAPABILITY[name],
                is_bf16_supported=lambda including_emulation=True: (
                    including_emulation or native_bfloat16),
                is_current_stream_capturing=lambda: False),     # AdamW calls this
            mock.patch.object(torch, "set_float32_matmul_precision"),   # would change the CPU's
            mock.patch.object(torch, "compile", self.compile),
            # A build of PyTorch for CUDA would look for a real GPU in this function
            mock.patch.object(torch.accelerator, "current_accelerator", lambda *_, **__: None),
            mock.patch.object(dist, "init_process_group", self.init_gloo),
            mock.patch.object(dist.device_mesh, "init_device_mesh", self.init_cpu_mesh)]

    def __enter__(self):
        for patch in self.patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for patch in self.patches:
            patch.stop()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.device:            # `torch.device("cuda")` has to stay this device
            return function(*args, **kwargs)
        if function is torch.Tensor.pin_memory:
            return args[0]
        # PyTorch would read the device of `with torch.device(...):` after this function
        default = _device.CURRENT_DEVICE
        if default and kwargs.get("device") is None and function in _device._device_constructors():
            kwargs["device"] = default
        kwargs = {name: self.on_cpu(value) for name, value in kwargs.items()}
        return function(*map(self.on_cpu, args), **kwargs)

    def on_cpu(self, value):
        """The CPU if value is a device of CUDA, else value."""
        if isinstance(value, str) and value.startswith("cuda"):
            value = torch.device(value)
        is_cuda = isinstance(value, torch.device) and value.type == "cuda"
        return torch.device("cpu") if is_cuda else value

    def set_device(self, device):
        self.current = torch.cuda._utils._get_device_index(device)      # fails without an index

    @staticmethod
    def compile(function, real=torch.compile, **options):
        """torch.compile with the backend that runs a graph unchanged."""
        compiled = real(function, backend="eager", **options)

        def run(*args, **kwargs):       # the compiler must see neither this mode nor a GPU
            with torch._C.DisableTorchFunction(), \
                    mock.patch.object(torch.cuda, "is_available", lambda: False):
                return compiled(*args, **kwargs)
        return run

    @staticmethod
    def init_gloo(backend, *args, real=dist.init_process_group, **kwargs):
        assert backend == "cpu:gloo,cuda:nccl"
        return real("gloo", *args, **kwargs)

    @staticmethod
    def init_cpu_mesh(device_type, *args, real=dist.device_mesh.init_device_mesh, **kwargs):
        assert device_type == "cuda"            # a device with an index is an error here
        return real("cpu", *args, **kwargs)


if __name__ == "__main__":
    card, *flags = sys.argv[1:]
    with PretendedGPU(card) as gpu:     # first, because some modules copy the patched functions
        import train_tst
        train_tst.main(flags)
        assert gpu.current == train_tst.LOCAL_RANK
