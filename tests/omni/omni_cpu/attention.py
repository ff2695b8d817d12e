"""Attention of the second stage: vLLM-Omni's torch backend, which does not know a platform outside its tree."""

from vllm_omni.diffusion.attention.backends.sdpa import SDPABackend, SDPAImpl


class CPUSDPAImpl(SDPAImpl):
    """Torch's scaled dot product, whatever the platform."""

    def forward(self, query, key, value, attn_metadata=None):
        """Skip the look-up of the platform, which raises here."""
        return self._forward_impl(query, key, value, attn_metadata, mask_mode="broadcast_k")


class CPUSDPABackend(SDPABackend):
    """Names the above."""

    @staticmethod
    def get_impl_cls():
        """The class that attends."""
        return CPUSDPAImpl
