"""What the GPU kernels cost, counted in their machine code: `python scripts/gpu_budget.py` prints it."""
