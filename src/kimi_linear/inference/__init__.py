"""Generation: sampling, prefill and decode with a cache, streaming, stop handling."""
