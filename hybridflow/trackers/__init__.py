"""Where metrics go: console, jsonl, tensorboard, wandb; and the clock and the plots that belong to them."""
