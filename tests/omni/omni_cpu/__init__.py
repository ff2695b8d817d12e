"""Lets vLLM-Omni run on a CPU: a platform plug-in for the tests, found through omni_cpu.dist-info on PYTHONPATH.

vllm-omni 0.30 has no CPU platform. vLLM's own and vLLM-Omni's runners, put together, are one.
"""


def register() -> str:
    """Return the platform's class, as vllm_omni.platform_plugins wants it."""
    return "omni_cpu.platform.CPUOmniPlatform"
