"""SGLang's platforms for accelerators, as far as the plugin asks them, without an accelerator."""

from __future__ import annotations

from sglang.srt.platforms.cuda import CudaSRTPlatform
from sglang.srt.platforms.device_mixin import DeviceCapability
from sglang.srt.platforms.musa import MusaSRTPlatform
from sglang.srt.platforms.rocm import RocmSRTPlatform


class Gpu(CudaSRTPlatform):
    def get_device_capability(self, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(9, 0)


class OldGpu(CudaSRTPlatform):
    def get_device_capability(self, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(7, 5)


class RocmGpu(RocmSRTPlatform):
    """Compute capabilities are NVIDIA's."""

    def get_device_capability(self, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(7, 5)


class Musa(MusaSRTPlatform):
    pass
