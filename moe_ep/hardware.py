"""GPUs, links and clusters, each figure with its source.

All units are decimal: 1 GB = 1e9 bytes. Link rates are one way (a "900 GB/s"
NVLink, which adds both directions up, is 450e9 here).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU as its maker, or the experiment under study, describes it."""

    name: str
    memory_bytes: float
    bf16_flops_per_s: float  # dense, no sparsity
    fp8_flops_per_s: float  # dense, no sparsity
    tf32_flops_per_s: float  # dense: float32 products rounded to TF32, jax's default
    fp32_flops_per_s: float  # float32 products that stay float32, without tensor cores
    memory_bytes_per_s: float
    nvlink_bytes_per_s: float  # to the other GPUs of the node, one way
    streaming_multiprocessors: int
    clock_hz: float  # boost
    l2_bytes: int
    compute_capability: tuple[int, int]
    source: str


_H100_DATASHEET = "NVIDIA H100 Tensor Core GPU datasheet (SXM5), and the Hopper architecture whitepaper"

PAPER_H100 = Gpu(
    name="paper_h100",
    memory_bytes=64e9,
    bf16_flops_per_s=400e12,
    fp8_flops_per_s=800e12,
    tf32_flops_per_s=200e12,
    fp32_flops_per_s=67e12,
    memory_bytes_per_s=1.8e12,
    nvlink_bytes_per_s=450e9,
    streaming_multiprocessors=132,
    clock_hz=1.98e9,
    l2_bytes=50 * 2**20,
    compute_capability=(9, 0),
    source="the reference experiment's own description of its H100; FP8 taken as twice BF16, TF32 as half of it, FP32 as the datasheet's",
)

H100 = Gpu(
    name="h100",
    memory_bytes=80e9,
    bf16_flops_per_s=989e12,
    fp8_flops_per_s=1979e12,
    tf32_flops_per_s=494.5e12,
    fp32_flops_per_s=67e12,
    memory_bytes_per_s=3.35e12,
    nvlink_bytes_per_s=450e9,
    streaming_multiprocessors=132,
    clock_hz=1.98e9,
    l2_bytes=50 * 2**20,
    compute_capability=(9, 0),
    source=_H100_DATASHEET,
)

H800 = dataclasses.replace(
    H100,
    name="h800",
    nvlink_bytes_per_s=200e9,
    source=_H100_DATASHEET + "; NVLink at 400 GB/s both ways (DeepSeek-V3 technical report, section 3.1 hardware)",
)

H200 = dataclasses.replace(
    H100,
    name="h200",
    memory_bytes=141e9,
    memory_bytes_per_s=4.8e12,
    source="NVIDIA H200 Tensor Core GPU datasheet (SXM)",
)

B200 = Gpu(
    name="b200",
    memory_bytes=180e9,
    bf16_flops_per_s=2250e12,
    fp8_flops_per_s=4500e12,
    tf32_flops_per_s=1100e12,
    fp32_flops_per_s=80e12,
    memory_bytes_per_s=8.0e12,
    nvlink_bytes_per_s=900e9,
    streaming_multiprocessors=148,
    clock_hz=1.965e9,
    l2_bytes=126 * 2**20,
    compute_capability=(10, 0),
    source="NVIDIA DGX B200 datasheet (a system's eighth): 1,440 GB, 64 TB/s, 72 PFLOP/s FP8 with sparsity; "
    "TF32 and FP32: NVIDIA Blackwell architecture technical brief, HGX B200",
)

GB200 = dataclasses.replace(
    B200,
    name="gb200",
    memory_bytes=186e9,
    bf16_flops_per_s=2500e12,
    fp8_flops_per_s=5000e12,
    tf32_flops_per_s=1250e12,
    fp32_flops_per_s=90e12,
    source="NVIDIA GB200 NVL72 datasheet (a 72nd): 13.4 TB, 576 TB/s, 720 PFLOP/s FP8 with sparsity, NVLink 130 TB/s; "
    "TF32 and FP32: NVIDIA Blackwell architecture technical brief",
)

GPUS = {gpu.name: gpu for gpu in (PAPER_H100, H100, H800, H200, B200, GB200)}

# What a device reports as its kind -> the entry above.
_DEVICE_KINDS = {"NVIDIA H100": "h100", "NVIDIA H800": "h800", "NVIDIA H200": "h200", "NVIDIA B200": "b200"}


def gpu_of_device_kind(device_kind: str) -> Gpu | None:
    """Returns the GPU that a device's kind string names, None when it is not one of ours (a CPU)."""
    for prefix, name in _DEVICE_KINDS.items():
        if device_kind.startswith(prefix):
            return GPUS[name]
    return None
