"""Plan a profile, compute its runs, reuse and rerun them."""
