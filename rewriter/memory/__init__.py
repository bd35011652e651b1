"""The memory planner: what the backward needs is kept, recomputed, or sent to host memory and back."""
