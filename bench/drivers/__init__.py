"""Programs that carry out the bench's orders in processes of their own (`bench.children`)."""
