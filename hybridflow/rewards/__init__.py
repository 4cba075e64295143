"""Rules that score a response, and how a user's own function is called: in processes beside the GPUs."""
