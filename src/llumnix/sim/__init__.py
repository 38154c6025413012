"""Virtual time: the scheduler's core on simulated instances, and the workloads for it."""
