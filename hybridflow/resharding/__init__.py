"""Moving the actor's weights from the training layout to the engine's, in flat buckets."""
