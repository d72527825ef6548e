"""Doctor's checks of what trains: the device with its arithmetic, and the threads."""

import os
from collections.abc import Mapping

from lathe.common import operating_system
from lathe.doctor.checks import Finding, Findings


def check_device(precision: str) -> Findings:
    """Name the device that would train, and check that it has the arithmetic of `training.precision`."""
    import torch
    from transformers.utils import is_liger_kernel_available

    from lathe.common.text import readable_bytes
    from lathe.models.precision import has_native_bf16, resolve_precision

    native = has_native_bf16()
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        text = f"{device.name}, {readable_bytes(device.total_memory)}"
        if not is_liger_kernel_available():
            text += " (`make setup EXTRAS=gpu` adds faster kernels)"
    else:
        text = f"no GPU that torch sees; CPU with {os.cpu_count()} cores"
    text += f", {'native' if native else 'no native'} bf16"
    resolved = resolve_precision(precision)
    if resolved == "bf16" and not native:
        yield Finding("device", "warning", f"{text}: emulated, many times slower", "set training.precision to auto")
    else:
        yield Finding("device", "ok", f"{text}; training in {resolved}")


def check_threads(environment: Mapping[str, str]) -> Findings:
    """Check OpenMP's settings; the stages make waiting threads sleep unless the environment says otherwise."""
    policy, count = environment.get("OMP_WAIT_POLICY", ""), environment.get("OMP_NUM_THREADS", "")
    cores = operating_system.count_usable_cores()
    problem = False
    if policy.upper() == "ACTIVE":
        problem = True
        text = "OMP_WAIT_POLICY is ACTIVE: waiting threads spin, and slow each other on shared cores"
        yield Finding("threads", "warning", text, "unset it, or set it to PASSIVE")
    if count and count != str(cores):
        problem = True
        text = f"OMP_NUM_THREADS is {count}; {cores} cores are there"
        yield Finding("threads", "warning", text, "unset it unless the other cores are wanted elsewhere")
    if not problem:
        yield Finding("threads", "ok", f"one for each of {cores} cores")
