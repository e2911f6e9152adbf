"""The programs: they parse arguments, build the objects and run them. Nothing else in the project does."""
