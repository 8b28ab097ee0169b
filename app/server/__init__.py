"""One server process: its parts (`assembly`), its socket (`listener`, `protocol`), its life (`process`)."""
