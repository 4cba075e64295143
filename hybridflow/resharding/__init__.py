"""Moving the actor's weights from the training layout to the engine's, in flat buckets (buckets, transfer, checksum).

schedule, volumes and the layouts of whole models in layout (`FsdpLayout`, `TrainingLayout`, `GenerationLayout`) are a
reference, in pure Python: the shortest list of sends. No sync runs them; tests hold the plan that syncs carry out against them.
"""
