"""The mixers: one line each. Layers are imported when they are first built, so this table needs no torch."""

from kimi_linear.nn.component import ComponentTable
from kimi_linear.nn.mixers.config import MixerConfig
from kimi_linear.nn.mixers.gdn.config import GDNConfig
from kimi_linear.nn.mixers.gqa.config import GQAConfig
from kimi_linear.nn.mixers.kda.config import KDAConfig
from kimi_linear.nn.mixers.mla.config import MLAConfig

MIXERS = ComponentTable("mixer")
MIXERS.register(KDAConfig, "kimi_linear.nn.mixers.kda.layer:KimiDeltaAttention")
MIXERS.register(GDNConfig, "kimi_linear.nn.mixers.gdn.layer:GatedDeltaNet")
MIXERS.register(MLAConfig, "kimi_linear.nn.mixers.mla.layer:MultiHeadLatentAttention")
MIXERS.register(GQAConfig, "kimi_linear.nn.mixers.gqa.layer:GroupedQueryAttention")

__all__ = ["MIXERS", "GDNConfig", "GQAConfig", "KDAConfig", "MLAConfig", "MixerConfig"]
