"""What is known of a sandbox beside its log: its kept end, and questions to the worker beside its engine."""
