"""From a spec to a record: seeds, training, evaluation, checkpoints, executors."""
