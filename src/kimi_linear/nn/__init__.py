"""Network parts: mixers, feed-forward networks, residual schemes, their states, placement, the block and the decoder.

Importing this package, or any `config` module in it, imports no torch.
"""
