"""Gated DeltaNet: the gated delta rule with one decay a head. See README.md here."""
