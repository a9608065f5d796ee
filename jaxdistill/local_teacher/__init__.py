"""The shipped teacher: procedural problems, the texts it writes about them, and a real HTTP server that misbehaves."""
