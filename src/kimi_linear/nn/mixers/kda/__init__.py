"""Kimi Delta Attention: the gated delta rule with one decay a channel. See README.md here."""
