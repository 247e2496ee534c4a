"""What each adapter makes of a run."""
