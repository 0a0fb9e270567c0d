"""Where a process stands in its job, and starting jobs."""
