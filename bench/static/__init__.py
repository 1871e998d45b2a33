"""What the Triton kernels issue and need, counted and compiled for GPUs that need not be here."""
