"""What a run of the chain shows a person: one HTML page that needs no network."""
