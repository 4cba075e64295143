"""Where metrics go: console, jsonl, tensorboard, wandb, mlflow; and the clock and the plots that belong to them."""
