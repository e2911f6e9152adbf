"""The only room that imports deepspeed: its JSON, and the engine around `deepspeed.initialize`."""
