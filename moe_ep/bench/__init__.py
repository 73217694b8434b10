"""Programs and kernels measured against their rivals, in one process each."""
