"""What uses a Fisher on whole models: penalties, masks, dampening, merging, and differences of models."""
