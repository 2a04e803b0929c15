"""Fixed performance studies of attention_zoo, run by `python -m benchmarks`. Not part of the wheel."""
