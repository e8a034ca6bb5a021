"""Pipeline schedules: their orders, the time they take, and where a model is best cut for them."""
