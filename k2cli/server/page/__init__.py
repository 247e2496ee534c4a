"""The web page of a run: its files, and the headers that they are sent with."""
