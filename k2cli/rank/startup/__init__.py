"""What a rank does between loading and *ready*: warm-up and checks of what the ranks compute."""
