"""`make bench`: speed as ratios against floors taken in the same run."""
