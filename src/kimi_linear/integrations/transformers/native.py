"""Our model under the released model type, for `register(native=True)`; transformers wants a class for each type."""

from kimi_linear.integrations.transformers.configuration import KimiLinearHybridConfig
from kimi_linear.integrations.transformers.model import KimiLinearHybridForCausalLM


class KimiLinearReleaseConfig(KimiLinearHybridConfig):
    """`KimiLinearHybridConfig` for checkpoints of the released type."""

    model_type = "kimi_linear"
    # A configuration class of transformers without a constructor in its own body is given another one.
    __init__ = KimiLinearHybridConfig.__init__


class KimiLinearReleaseForCausalLM(KimiLinearHybridForCausalLM):
    """`KimiLinearHybridForCausalLM` for checkpoints of the released type."""

    config_class = KimiLinearReleaseConfig
    config: KimiLinearReleaseConfig
