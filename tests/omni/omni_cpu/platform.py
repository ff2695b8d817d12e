"""The platform: what vLLM-Omni asks beyond what vLLM's CPU platform answers."""

import psutil
import torch
from vllm.platforms.cpu import CpuPlatform
from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum


class CPUOmniPlatform(OmniPlatform, CpuPlatform):
    """One device, the machine's memory, no compiler."""

    _omni_enum = OmniPlatformEnum.OOT

    @classmethod
    def get_omni_ar_worker_cls(cls):
        """The worker of the stage that samples tokens."""
        return "omni_cpu.worker.CPUARWorker"

    @classmethod
    def get_omni_generation_worker_cls(cls):
        """The worker of the stage that turns them into audio."""
        return "omni_cpu.worker.CPUGenerationWorker"

    @classmethod
    def get_default_stage_config_path(cls):
        """The folder of vllm-omni's deploy profiles."""
        return "vllm_omni/deploy"

    @classmethod
    def get_torch_device(cls, local_rank=None):
        """The CPU."""
        return torch.device("cpu")

    @classmethod
    def get_device_count(cls):
        """One."""
        return 1

    @classmethod
    def get_device_version(cls):
        """None: there is no driver."""
        return None

    @classmethod
    def synchronize(cls):
        """Nothing runs behind our back."""

    @classmethod
    def supports_torch_inductor(cls):
        """Compiling would take longer than the tests."""
        return False

    @classmethod
    def get_free_memory(cls, device=None):
        """Bytes."""
        return psutil.virtual_memory().available

    @classmethod
    def get_device_total_memory(cls, device_id=0):
        """Bytes."""
        return psutil.virtual_memory().total

    @classmethod
    def get_device_memory(cls, device=None):
        """Free and total bytes."""
        return cls.get_free_memory(), cls.get_device_total_memory()

    @classmethod
    def get_diffusion_attn_backend_cls(cls, selected_backend, head_size, allow_trtllm_default=False):
        """Torch's own attention."""
        return "omni_cpu.attention.CPUSDPABackend"
