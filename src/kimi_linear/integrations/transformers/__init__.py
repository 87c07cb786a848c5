"""Our models in transformers, and in what builds on it: Auto classes, `generate`, Trainer, PEFT and TRL.

Importing this registers our own model type with AutoConfig, AutoModelForCausalLM and AutoTokenizer. Checkpoints of the
released type stay with transformers' own class unless `register(native=True)` is called. Needs transformers >= 5.17.

    >>> import kimi_linear.integrations.transformers
    >>> from transformers import AutoConfig
    >>> type(AutoConfig.for_model("kimi_linear_hybrid", network=kimi_linear.preset("tiny"))).__name__
    'KimiLinearHybridConfig'
"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kimi_linear.integrations.transformers.accelerate import Acceleration, accelerate
from kimi_linear.integrations.transformers.cache import KimiLinearCache
from kimi_linear.integrations.transformers.configuration import KimiLinearHybridConfig
from kimi_linear.integrations.transformers.model import KimiLinearHybridForCausalLM
from kimi_linear.integrations.transformers.native import KimiLinearReleaseConfig, KimiLinearReleaseForCausalLM
from kimi_linear.integrations.transformers.tokenizer import KimiLinearTokenizer, wrap_tokenizer

__all__ = [
    "Acceleration",
    "KimiLinearCache",
    "KimiLinearHybridConfig",
    "KimiLinearHybridForCausalLM",
    "accelerate",
    "register",
    "wrap_tokenizer",
]


def register(native: bool = False) -> None:
    """Register our own model type with transformers' Auto classes, as importing this package does; safe to repeat.

    Args:
        native: Let checkpoints of the released type (`model_type: kimi_linear`) load as our model too, in place of
            transformers' own class, in this process and from now on. Tokenizers of that type are left alone.

    Example:
        >>> register()
    """
    AutoConfig.register(KimiLinearHybridConfig.model_type, KimiLinearHybridConfig, exist_ok=True)
    AutoModelForCausalLM.register(KimiLinearHybridConfig, KimiLinearHybridForCausalLM, exist_ok=True)
    AutoTokenizer.register(KimiLinearHybridConfig, fast_tokenizer_class=KimiLinearTokenizer, exist_ok=True)
    if native:
        AutoConfig.register(KimiLinearReleaseConfig.model_type, KimiLinearReleaseConfig, exist_ok=True)
        AutoModelForCausalLM.register(KimiLinearReleaseConfig, KimiLinearReleaseForCausalLM, exist_ok=True)


register()
