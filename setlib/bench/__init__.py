"""Speed and memory of the parts, as ratios taken in one run."""
