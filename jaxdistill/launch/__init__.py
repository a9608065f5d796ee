"""Files that start a recipe on other machines: environment and process start only."""
