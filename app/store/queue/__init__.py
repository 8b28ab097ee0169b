"""The queue of streams that need attention: its rows, and what an append does to them."""
