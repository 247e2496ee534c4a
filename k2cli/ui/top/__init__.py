"""The live view of ``k2 top``. Only ``app`` imports textual."""
