"""NVIDIA cards in the words of XLA's GpuTargetConfigProto, from NVIDIA's published figures."""


def _describe(
    name: str,
    *,
    capability: tuple[int, int],
    feature: str = "",
    num_multiprocessors: int,
    shared_memory: int,  # bytes per multiprocessor; a block may have all but 1 KiB of it
    l2_cache: int,  # bytes
    memory: int,  # bytes
    bandwidth: int,  # bytes per second
    clock_ghz: float,
) -> str:
    major, minor = capability
    return f"""
    platform_name: "CUDA"
    device_description_str: "{name}"
    dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
    gpu_device_info {{
      cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
      core_count: {num_multiprocessors}
      fpus_per_core: {128 if major >= 9 else 64}
      clock_rate_ghz: {clock_ghz}
      threads_per_warp: 32
      threads_per_block_limit: 1024
      threads_per_core_limit: 2048
      registers_per_block_limit: 65536
      registers_per_core_limit: 65536
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
      shared_memory_per_block: 49152
      shared_memory_per_block_optin: {shared_memory - 1024}
      shared_memory_per_core: {shared_memory}
      l2_cache_size: {l2_cache}
      device_memory_size: {memory}
      memory_bandwidth: {bandwidth}
    }}
    """


_HOPPER = dict(
    capability=(9, 0),
    feature="feature_extension: ACCELERATED_FEATURES",  # sm_90a
    num_multiprocessors=132,
    shared_memory=228 * 1024,
    l2_cache=50 * 2**20,
    clock_ghz=1.98,
)

DESCRIPTIONS = {
    "a100": _describe(
        "NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        num_multiprocessors=108,
        shared_memory=164 * 1024,
        l2_cache=40 * 2**20,
        memory=81_152 * 2**20,
        bandwidth=2_039_000_000_000,
        clock_ghz=1.41,
    ),
    "h100": _describe("NVIDIA H100 80GB HBM3", memory=81_559 * 2**20, bandwidth=3_350_000_000_000, **_HOPPER),
    "h200": _describe("NVIDIA H200", memory=143_771 * 2**20, bandwidth=4_800_000_000_000, **_HOPPER),
}
