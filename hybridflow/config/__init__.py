"""The configuration: schema (what can be set), load (YAML and overrides to frozen dataclasses), rules (across keys)."""
