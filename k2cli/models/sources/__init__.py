"""Places that models are downloaded from."""
