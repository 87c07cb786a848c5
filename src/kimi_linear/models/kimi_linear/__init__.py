"""Kimi Linear: hybrids of Kimi Delta Attention (or another mixer) and latent attention, with experts.

`config`, `presets`, `keys` and `release_config` import no torch; `model` does.
"""
