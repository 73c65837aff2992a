"""The diagonal Fisher: estimating it, keeping it in files, and looking at it."""
