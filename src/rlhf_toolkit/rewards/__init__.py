"""Where scores come from: one finite number for each response."""
