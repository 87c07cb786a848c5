"""What the delta-rule mixers share: sizes, projections, short convolutions, states. Not a mixer by itself."""
