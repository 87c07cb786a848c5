"""The demonstration: train a small hybrid, generate, compare with full attention, report."""

from kimi_linear.recipes.demo.run import DemoConfig, demo

__all__ = ["DemoConfig", "demo"]
