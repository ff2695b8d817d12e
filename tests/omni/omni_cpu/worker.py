"""The two stages' workers: vLLM's CPU worker with vLLM-Omni's model runners."""

import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm_omni.worker.gpu_ar_model_runner import GPUARModelRunner
from vllm_omni.worker.gpu_generation_model_runner import GPUGenerationModelRunner
from vllm_omni.worker.mixins import OmniWorkerMixin


class CPUARModelRunner(GPUARModelRunner, CPUModelRunner):
    """Samples tokens, on the CPU."""


class CPUGenerationModelRunner(GPUGenerationModelRunner, CPUModelRunner):
    """Makes audio, on the CPU."""


class OmniCPUWorker(OmniWorkerMixin, CPUWorker):
    """A CPU worker whose model runner is vLLM-Omni's."""

    model_runner_cls: type[CPUModelRunner]

    def init_device(self):
        """Put vLLM-Omni's runner in the place of the one that vLLM made."""
        super().init_device()
        self.use_v2_model_runner = False
        self.model_runner = self.model_runner_cls(self.vllm_config, torch.device("cpu"))
        self.model_runner._postprocess_tensors()  # again: vLLM-Omni's runner makes buffers after vLLM's did this


class CPUARWorker(OmniCPUWorker):
    """Of the first stage."""

    model_runner_cls = CPUARModelRunner


class CPUGenerationWorker(OmniCPUWorker):
    """Of the second stage."""

    model_runner_cls = CPUGenerationModelRunner
