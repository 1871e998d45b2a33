"""`prefix_attention` beside concatenation, FlexAttention and others, on a CPU and on a GPU."""
