"""One process drives all: loop, groups, protocols, placement, launch. The only folder that imports Ray."""
