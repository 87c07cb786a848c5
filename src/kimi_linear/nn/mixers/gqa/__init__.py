"""Grouped-query softmax attention, with a sliding window if asked. See README.md here."""
