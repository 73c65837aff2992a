"""Learning with forgetting: which examples to forget on the way, and the fine-tuning that does."""
