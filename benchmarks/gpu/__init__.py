"""The check on a GPU: contracts, ceilings, times beside peers, and the page made of the records."""
