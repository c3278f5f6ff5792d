"""What sources are like, found out without training."""
