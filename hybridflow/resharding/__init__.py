"""Moving the actor's weights from the training layout to the engine's: which slice is where, the shortest schedule of
sends (layout, schedule, volumes: pure Python), and carrying it out in flat buckets (buckets, transfer, checksum)."""
