"""One plain class per role. Ray wraps them from outside (controller/), tests build them directly."""
