"""`sandledger demo`: the main job in one narrated run, on real parts."""
