"""A pretended GPU: what the code asks of "cuda" happens on the CPU, with CUDA's argument checks.

`with PretendedGPU("Tesla T4"):` for this process; for several torchrun runs this file instead of
train_tst.py. What is computed is float32, since autocast on "cuda" leaves CPU tensors alone.
"""
import json
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils import _device

GPUS = 2
CAPABILITY = {"NVIDIA B200": (10, 0), "NVIDIA H100 80GB HBM3": (9, 0), "Tesla T4": (7, 5)}
PARTS = {"embedding": "embed", "scaled_dot": "block", "silu": "block", "log_softmax": "loss"}


class PretendedGPU(TorchFunctionMode):
    """Sends every device argument "cuda..." to the CPU.

    `current` is the index that was set. `graphs` are torch.compile's, [part, with gradients?] each.
    """

    def __init__(self, name):
        super().__init__()
        self.current, self.graphs = 0, []
        native = CAPABILITY[name] >= (8, 0)                 # bfloat16, which others emulate
        stand_ins = dict(
            is_available=lambda: True, device_count=lambda: GPUS,
            current_device=lambda: self.current, set_device=self.set_device,
            get_device_name=lambda device=None: name,
            get_device_capability=lambda device=None: CAPABILITY[name],
            is_bf16_supported=lambda including_emulation=True: including_emulation or native,
            is_current_stream_capturing=lambda: False)      # which AdamW asks
        self.patches = [mock.patch.object(torch.cuda, function, stand_in)
                        for function, stand_in in stand_ins.items()]
        self.patches += [
            mock.patch.object(torch, "set_float32_matmul_precision"),   # it is the CPU's too
            mock.patch.object(torch, "compile", self.compile),
            # A build of PyTorch for CUDA would look for a real one here
            mock.patch.object(torch.accelerator, "current_accelerator", lambda *_, **__: None),
            mock.patch.object(dist, "init_process_group", self.with_gloo),
            # Its users take it by name, so be there before they are imported
            mock.patch.object(dist.device_mesh, "init_device_mesh", self.cpu_mesh)]

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
        if function is torch.device:            # only a name until something is put there
            return function(*args, **kwargs)
        if function is torch.Tensor.pin_memory:
            return args[0]
        # `with torch.device(...):` acts below every other mode, so its part is done here
        default = _device.CURRENT_DEVICE
        if default and kwargs.get("device") is None and function in _device._device_constructors():
            kwargs["device"] = default
        kwargs = {name: self.on_cpu(value) for name, value in kwargs.items()}
        return function(*map(self.on_cpu, args), **kwargs)

    def on_cpu(self, value):
        """The CPU for a CUDA device that is there, anything else as it is."""
        if isinstance(value, str) and value.startswith("cuda"):
            value = torch.device(value)
        if not isinstance(value, torch.device) or value.type != "cuda":
            return value
        if (value.index or 0) >= GPUS:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return torch.device("cpu")

    def set_device(self, device):               # it has to have an index
        self.current = torch.cuda._utils._get_device_index(device)

    def compile(self, function, real=torch.compile, **options):
        """torch.compile, which runs a graph as it is traced, by PyTorch's own operators."""
        compiled = real(function, backend=self.count, **options)

        def run(*args, **kwargs):
            # Not to be traced: it makes no tensors. And the compiler must not look for the GPU
            with torch._C.DisableTorchFunction(), \
                    mock.patch.object(torch.cuda, "is_available", lambda: False):
                return compiled(*args, **kwargs)
        return run

    def count(self, graph, inputs):
        part = [PARTS[word] for word in PARTS if word in graph.code]
        if part:                                # not the line that tries the compiler
            self.graphs.append([part[0], torch.is_grad_enabled()])
        return graph.forward

    @staticmethod
    def with_gloo(backend, *args, real=dist.init_process_group, **kwargs):
        assert backend == "cpu:gloo,cuda:nccl"
        return real("gloo", *args, **kwargs)

    @staticmethod
    def cpu_mesh(device_type, *args, real=dist.device_mesh.init_device_mesh, **kwargs):
        assert device_type == "cuda"    # it is given no index
        return real("cpu", *args, **kwargs)


if __name__ == "__main__":
    with PretendedGPU(sys.argv[1]) as gpu:
        import train_tst
        train_tst.main(sys.argv[2:])
        assert gpu.current == train_tst.LOCAL_RANK
        out = train_tst.parse(sys.argv[2:]).out
    Path(out, f"graphs{train_tst.RANK}.json").write_text(json.dumps(gpu.graphs))
