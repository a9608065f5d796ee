"""What a recipe needs on hardware that is not here: memory, time and money."""
