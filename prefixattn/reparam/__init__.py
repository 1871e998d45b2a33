"""The network that makes a prefix, as an op: all layers at once, written where the attention reads them."""
