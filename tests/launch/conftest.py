from launched_run import launched as launched
